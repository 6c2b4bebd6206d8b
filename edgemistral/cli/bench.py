"""edgemistral bench: the speed of a model on this computer, compared with the computer's limits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from edgemistral.cli.errors import Command
from edgemistral.cli.options import json_flag, kv_bits_option, model_argument, open_blob, threads_option
from edgemistral.terminal import StatusLine, compile_notice

if TYPE_CHECKING:
    from edgemistral.runtime.plan import Threads


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, zero or more, separated by commas."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = (-1,)
    if min(values) < 0:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1,512,2048")
    return values


@click.command(cls=Command)
@model_argument
@click.option("--prompts", type=numbers, default="512", show_default=True, help="Prompt lengths to measure, in tokens.")
@click.option("--depths", type=numbers, default="0", show_default=True, help="Tokens already in the cache.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="Rounds to take medians over.")
@kv_bits_option
@threads_option
@json_flag
def bench(
    model: str,
    prompts: tuple[int, ...],
    depths: tuple[int, ...],
    rounds: int,
    kv_bits: str,
    threads: Threads,
    as_json: bool,
) -> None:
    """Measure reading a prompt and decoding, in tokens per second and as shares of this computer's limits.

    The limit of decoding is the memory bandwidth; the limit of reading a prompt is the rate of int8 products. Both limits are
    measured in the same rounds with the same instructions.

    \b
    Example:
      edgemistral bench mistral-q4.safetensors --prompts 128,512 --depths 0,4096
    """
    with StatusLine() as status, compile_notice():
        from edgemistral.measure.benchmark import DECODED, measure
        from edgemistral.runtime.plan import plan
        from edgemistral.runtime.transformer import Transformer

        blob = open_blob(model)
        threads = plan(blob, None, int(kv_bits), threads).threads
        longest = max(depths) + max((*prompts, DECODED))
        if min(prompts) < 1 or longest > blob.config.context:
            raise click.BadParameter(f"these prompts and depths need {longest} positions, MODEL has {blob.config.context}")
        transformer = Transformer(blob, kv_bits=int(kv_bits), threads=threads)
        try:
            rows = measure(
                transformer, prompts, depths, rounds, lambda done, total: status.show(f"measuring: {done} of {total}")
            )
        finally:
            transformer.close()
    if as_json:
        facts = {"model": str(blob.path), "threads": threads, "kv_bits": int(kv_bits), "rows": [row.to_dict() for row in rows]}
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"{'':10}{'tokens':>8}{'depth':>8}{'tokens/s':>12}{'from':>9}{'to':>9}{'':>16}{'of the limit':>14}")
    for row in rows:
        unit = "GB/s" if row.task == "decode" else "GMAC/s"
        click.echo(
            f"{row.task:10}{row.tokens:8}{row.depth:8}{row.tokens_per_second:12.1f}{row.lowest:9.1f}{row.highest:9.1f}"
            f"{row.rate / 1e9:9.1f} {unit:6}{row.share:14.0%}"
        )
