"""edgemistral warmup."""

from __future__ import annotations

from pathlib import Path

import click

from edgemistral.cli.errors import Command
from edgemistral.cli.options import compile_ahead
from edgemistral.kernels.kv_layout import KV_FORMATS
from edgemistral.terminal import compile_notice


@click.command(cls=Command)
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Write to this folder, for a frozen application (docs/embedding.md).")
def warmup(into: Path | None) -> None:
    """Compile everything for this processor now, so that later commands start faster.

    It is kept in the user's cache folder, or in the folder set by EDGEMISTRAL_CACHE.

    \b
    Example:
      edgemistral warmup
    """
    from edgemistral.warm_up import cache_in, warm_up

    with cache_in(into), compile_notice():
        compile_ahead(*KV_FORMATS)
        folder = warm_up()
    click.echo(f"{folder}: ready")
