"""edgemistral eval."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemistral.cli.errors import Command
from edgemistral.cli.options import json_flag, model_argument, model_path, read_text, threads_option
from edgemistral.errors import BadInput
from edgemistral.terminal import StatusLine, compile_notice

if TYPE_CHECKING:
    from edgemistral.measure.evaluate import Evaluation
    from edgemistral.runtime.plan import Threads


@click.command("eval", cls=Command)
@model_argument
@click.argument("text", metavar="TEXT")
@click.option(
    "--reference", type=click.Path(path_type=Path), metavar="SOURCE", help="A checkpoint or model file to compare with."
)
@threads_option
@json_flag
def eval_(model: str, text: str, reference: Path | None, threads: Threads, as_json: bool) -> None:
    """Measure how well MODEL predicts the text file TEXT (- is standard input): its perplexity.

    TEXT may be a folder: then every .txt and .md file in it is measured, each alone and all together.

    With --reference, also compare the predictions of two models: the Kullback-Leibler divergence (mean and percentiles),
    and how often the most likely token differs. SOURCE is the checkpoint of MODEL, computed in float32, or a second model
    file of the same shape, which runs as usual.

    \b
    Example:
      edgemistral eval mistral-q4.safetensors novel.txt --reference ~/Mistral-7B-Instruct-v0.2
      edgemistral eval mistral-q4.safetensors texts/ --reference mistral-q8.safetensors
    """
    from edgemistral.measure.evaluate import Tally, cut, tally
    from edgemistral.measure.reference import Reference
    from edgemistral.model import load

    path, contents = model_path(model), _contents(text)
    with contextlib.ExitStack() as stack:
        source: Any = None
        if reference is not None and _is_blob(reference):
            source = stack.enter_context(load(reference, threads=threads))
        elif reference is not None:
            source = Reference.open(reference)
        stack.enter_context(compile_notice())
        loaded, status = stack.enter_context(load(path, threads=threads)), stack.enter_context(StatusLine())
        tallies = {}
        for name, content in contents.items():
            windows = cut(loaded, loaded.tokenizer.encode(content))
            tallies[name] = tally(loaded, windows, source, partial(_show, status, name))
    result, by_text = Tally.of(tallies.values()).result(), {name: each.result() for name, each in tallies.items()}
    if as_json:
        texts = {} if len(by_text) == 1 else {"texts": {name: dataclasses.asdict(each) for name, each in by_text.items()}}
        click.echo(json.dumps(dataclasses.asdict(result) | texts, indent=2))
        return
    if len(by_text) > 1:
        _table(by_text)
    click.echo(f"perplexity       {result.perplexity:.4f}   ({result.n_tokens} tokens)")
    if result.mean_kl is not None and result.top1_agreement is not None and result.kl_percentiles is not None:
        percentiles = ", ".join(f"{value:.6f} ({_percentile(p)})" for p, value in result.kl_percentiles.items())
        click.echo(f"mean KL          {result.mean_kl:.6f}   nats from the reference")
        click.echo(f"KL of tokens     {percentiles}")
        click.echo(f"top-1 agreement  {result.top1_agreement:.2%}")
        click.echo(f"flipped          {result.flipped:.2%}   of the most likely tokens")


def _show(status: StatusLine, name: str, what: str, done: int, total: int) -> None:
    status.show(f"{name}: {what}: {100 * done // total} %")


def _percentile(percent: str) -> str:
    return {"50": "median", "100": "most"}.get(percent, f"{percent} %")


def _table(results: dict[str, Evaluation]) -> None:
    width = max(map(len, results))
    compared = any(result.mean_kl is not None for result in results.values())
    heads = ("mean KL", "99 %", "flipped") if compared else ()
    click.echo(f"{'':{width}}{'tokens':>10}{'perplexity':>13}" + "".join(f"{head:>12}" for head in heads))
    for name, r in results.items():
        line = f"{name:{width}}{r.n_tokens:10}{r.perplexity:13.4f}"
        if r.mean_kl is not None and r.kl_percentiles is not None:
            line += f"{r.mean_kl:12.6f}{r.kl_percentiles['99']:12.6f}{r.flipped:12.2%}"
        click.echo(line)
    click.echo()


def _contents(text: str) -> dict[str, str]:
    """The texts of a file or a folder, by name."""
    folder = Path(text)
    if text == "-" or not folder.is_dir():
        return {text: read_text(text)}
    files = sorted(path for path in folder.iterdir() if path.suffix in (".txt", ".md") and path.is_file())
    if not files:
        raise BadInput(f"{text}: no file in this folder ends in .txt or .md")
    found = {path.name: read_text(str(path)) for path in files}
    if empty := [name for name, content in found.items() if not content]:
        raise BadInput(f"{folder / empty[0]}: empty; add text or remove the file")
    return found


def _is_blob(path: Path) -> bool:
    """Whether --reference names one of our model files; a checkpoint is a folder or a GGUF."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) != b"GGUF"
