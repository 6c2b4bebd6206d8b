"""edgemistral warmup."""

from __future__ import annotations

import click

from edgemistral.cli.errors import Command
from edgemistral.cli.options import compile_ahead
from edgemistral.terminal import compile_notice


@click.command(cls=Command)
def warmup() -> None:
    """Compile for this processor and make the demo model now, so that no later command has to.

    Both are kept in the user's cache folder, or in the one that EDGEMISTRAL_CACHE names.

    \b
    Example:
      edgemistral warmup
    """
    from edgemistral.warm_up import warm_up

    compile_ahead()
    with compile_notice():
        folder = warm_up()
    click.echo(f"{folder}: ready")
