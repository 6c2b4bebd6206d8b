"""edgemistral eval."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemistral.cli.errors import Command
from edgemistral.cli.options import json_flag, model_argument, model_path, read_text, threads_option
from edgemistral.terminal import StatusLine, compile_notice

if TYPE_CHECKING:
    from edgemistral.runtime.plan import Threads


@click.command("eval", cls=Command)
@model_argument
@click.argument("text", metavar="TEXT")
@click.option("--reference", type=click.Path(path_type=Path), metavar="CHECKPOINT", help="Its source, to compare with.")
@threads_option
@json_flag
def eval_(model: str, text: str, reference: Path | None, threads: Threads, as_json: bool) -> None:
    """Measure how well MODEL predicts the text file TEXT (- is standard input): its perplexity.

    With the checkpoint that MODEL was made of also how far apart their predictions are: the mean Kullback-Leibler
    divergence, and how often both would choose the same token.

    \b
    Example:
      edgemistral eval mistral-q4.safetensors novel.txt --reference ~/Mistral-7B-Instruct-v0.2
    """
    from edgemistral.measure.evaluate import evaluate
    from edgemistral.measure.reference import Reference
    from edgemistral.model import load

    path, content = model_path(model), read_text(text)
    source = None if reference is None else Reference.open(reference)
    with compile_notice(), load(path, threads=threads) as loaded, StatusLine() as status:
        ids = loaded.tokenizer.encode(content)
        result = evaluate(
            loaded, ids, source, progress=lambda what, done, total: status.show(f"{what}: {100 * done // total} %")
        )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2))
        return
    click.echo(f"perplexity       {result.perplexity:.4f}   ({result.n_tokens} tokens)")
    if result.mean_kl is not None and result.top1_agreement is not None:
        click.echo(f"mean KL          {result.mean_kl:.6f}   nats from the reference")
        click.echo(f"top-1 agreement  {result.top1_agreement:.2%}")
