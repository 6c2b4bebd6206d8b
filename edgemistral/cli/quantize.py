"""edgemistral quantize."""

from __future__ import annotations

from pathlib import Path

import click

from edgemistral.cli.errors import Command
from edgemistral.cli.options import pasteable, size
from edgemistral.terminal import compile_notice, human_bytes


@click.command(cls=Command)
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Bits of a weight.")
@click.option("--max-ram", type=size, metavar="SIZE", default="2GiB", show_default=True, help="Most working memory.")
@click.option("--resume", is_flag=True, help="Go on with the tensors that an interrupted run has written.")
@click.option("--force", is_flag=True, help="Replace DST, and start over.")
@click.option("--chat-template", type=click.Path(path_type=Path), metavar="FILE", help="Jinja; replaces SRC's own.")
def quantize(
    source: Path, destination: Path, bits: str, max_ram: int, resume: bool, force: bool, chat_template: Path | None
) -> None:
    """Make one quantized model file DST of the checkpoint directory SRC.

    SRC has the layout of Hugging Face (config.json, *.safetensors, tokenizer.model or tokenizer.json) or of Mistral
    (params.json, consolidated.safetensors, tokenizer.model). Its chat template goes into DST.

    \b
    Example:
      edgemistral quantize ~/Mistral-7B-Instruct-v0.2 mistral-q4.safetensors
    """
    from edgemistral_quantize import quantize as make

    try:
        with compile_notice():
            path = make(
                source, destination, bits=int(bits), max_ram=max_ram, resume=resume, force=force,
                chat_template=chat_template,
            )
    except KeyboardInterrupt:
        partial = Path(f"{destination}.partial")
        if partial.exists():
            click.echo(f"interrupted: {partial} holds what is done, --resume goes on with it", err=True)
        raise
    click.echo(f"{path}: {human_bytes(path.stat().st_size)}. Next: edgemistral run {pasteable(path)}")
