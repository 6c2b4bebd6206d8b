"""The command line: thin commands over the Python API."""

from __future__ import annotations

import click

from edgemistral import __version__
from edgemistral.cli.bench import bench
from edgemistral.cli.errors import Cli
from edgemistral.cli.evaluate import eval_
from edgemistral.cli.inspect import inspect, plan, verify
from edgemistral.cli.quantize import quantize
from edgemistral.cli.run import run
from edgemistral.cli.serve import serve
from edgemistral.cli.sessions import sessions
from edgemistral.cli.warmup import warmup

__all__ = ["main"]


@click.group(cls=Cli, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Mistral-7B on this computer's processor: quantize a checkpoint once, then chat with it.

    \b
    Example:
      edgemistral quantize ~/Mistral-7B-Instruct-v0.2 mistral-q4.safetensors
      edgemistral run mistral-q4.safetensors
      edgemistral serve mistral-q4.safetensors
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (run, serve, sessions, quantize, inspect, verify, plan, bench, eval_, warmup):
    main.add_command(command)
