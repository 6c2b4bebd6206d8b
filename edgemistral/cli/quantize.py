"""edgemistral quantize."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from edgemistral.cli.errors import Command
from edgemistral.cli.options import size
from edgemistral.terminal import compile_notice, human_bytes


@click.command(cls=Command)
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--bits", type=float, metavar="BITS",
    help="Bits of a weight: 4, 8, or an average such as 4.5.  [default: 4; 8 for a GGUF that is quantized already]",
)
@click.option(
    "--lora", type=click.Path(path_type=Path), metavar="FOLDER", help="Merge this LoRA adapter (PEFT) into the weights."
)
@click.option(
    "--calibrate", type=click.Choice(["none", "fast", "full"]), default="fast", show_default=True,
    help="Measure on a text which weights matter most, and round them best.",
)
@click.option(
    "--calibration-text", type=click.Path(path_type=Path), metavar="FILE", help="The text to measure on, in UTF-8."
)
@click.option(
    "--chat-template", type=click.Path(path_type=Path), metavar="FILE", help="Use this Jinja template, not the checkpoint's."
)
@click.option("--max-ram", type=size, metavar="SIZE", default="2GiB", show_default=True, help="Most working memory.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--force", is_flag=True, help="Replace DST, and start again.")
def quantize(
    source: Path, destination: Path, bits: float | None, lora: Path | None, calibrate: str, calibration_text: Path | None,
    chat_template: Path | None, max_ram: int, resume: bool, force: bool,
) -> None:
    """Make a quantized model file DST from the checkpoint SRC.

    SRC is a directory in the layout of Hugging Face (config.json, *.safetensors, tokenizer.model or tokenizer.json) or of
    Mistral (params.json, consolidated.safetensors, tokenizer.model), or a GGUF file of the llama architecture.

    \b
    Example:
      edgemistral quantize ~/Mistral-7B-Instruct-v0.2 mistral-q4.safetensors
    """
    from edgemistral_quantize import quantize as make

    try:
        with compile_notice():
            path = make(
                source, destination, bits=bits, max_ram=max_ram, resume=resume, force=force,
                calibrate=calibrate,
                calibration_text=calibration_text, chat_template=chat_template, lora=lora,
                notice=lambda text: click.echo(text, err=True),
            )
    except KeyboardInterrupt:
        partial = Path(f"{destination}.partial")
        if partial.exists():
            click.echo(f"interrupted: {partial} holds what is done, --resume continues it", err=True)
        raise
    click.echo(f"{path}: {human_bytes(path.stat().st_size)}. Next: edgemistral run {shlex.quote(str(path))}")
