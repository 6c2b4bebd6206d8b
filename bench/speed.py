"""Speed over the size of a prompt, the depth of the cache, the threads and the bits of a weight: a table and a plot.

    python bench/speed.py WORK

Four layers of 7B shapes with random weights, so that it takes only ten minutes. Every figure is a share of the machine's limit,
measured in the same rounds. With 32 layers the shares are nearly the same; short prompts have higher ones there, because the
last layer and the head read all their weights for one token. Writes speed.json and .png of this processor.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
from edgemistral_quantize import quantize
from tqdm import tqdm

from bench import harness
from bench.synthetic import V2, write_synthetic
from edgemistral.files.blob import Blob
from edgemistral.measure.benchmark import DECODED, measure
from edgemistral.runtime.threads import performance_cores
from edgemistral.runtime.transformer import Transformer

CONFIG = dataclasses.replace(V2, n_layers=4)
PROMPTS = tuple(2**n for n in range(13))            # 1 to 4096 tokens
DEPTHS = (0, 1024, 4096, 16384, 32000)
ROUNDS = 5
DISK_BYTES = 5 * 10**9
Row = dict[str, Any]


def model(work: Path, bits: int) -> Path:
    """The blob, made if it does not exist."""
    blob = work / f"4-layers-q{bits}.safetensors"
    if not blob.exists():
        harness.prepare(work, DISK_BYTES)
        source = work / "4-layers"
        if not (source / "config.json").exists():
            write_synthetic(source, CONFIG, progress=True)
        quantize(source, blob, bits=bits)
    return blob


def rows(blob: Path, bits: int, threads: int, prompts: tuple[int, ...], depths: tuple[int, ...]) -> list[Row]:
    transformer = Transformer(Blob.open(blob), threads=threads)
    try:
        with tqdm(desc=f"{bits} bits, {threads} threads", leave=False, disable=None) as bar:
            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            measured = measure(transformer, prompts, depths, ROUNDS, progress)
    finally:
        transformer.close()
    return [{"bits": bits, "threads": threads, **row.to_dict()} for row in measured]


def sweep(work: Path) -> list[Row]:
    cores, found = performance_cores(), []
    for bits in (4, 8):
        blob = model(work, bits)
        found += rows(blob, bits, cores, PROMPTS, (0,))
        found += rows(blob, bits, cores, (512,), DEPTHS[1:])
        for threads in range(1, cores):
            found += rows(blob, bits, threads, (512,), (0,))
    return found


def plot(table: list[Row], path: Path) -> None:
    """Prefill over the prompt's size, and both over the depth, as shares of the limits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cores = max(row["threads"] for row in table)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for bits, color in ((4, "tab:blue"), (8, "tab:orange")):
        of = [row for row in table if row["bits"] == bits and row["threads"] == cores]
        sizes = sorted((row["tokens"], row["share"]) for row in of if row["task"] == "prefill" and row["depth"] == 0)
        left.plot(*zip(*sizes, strict=True), "o-", color=color, label=f"{bits}-bit weights")
        for task, tokens, style in (("prefill", 512, "o-"), ("decode", DECODED, "s--")):
            depths = sorted((row["depth"], row["share"]) for row in of if row["task"] == task and row["tokens"] == tokens)
            label = f"{task}, {bits} bits: of the {'int8 peak' if task == 'prefill' else 'bandwidth'}"
            right.plot(*zip(*depths, strict=True), style, color=color, label=label)
    left.set(xscale="log", xlabel="tokens of the prompt", ylabel="share of the machine's limit", ylim=(0, 1.05),
             title="reading a prompt, of the int8 peak")
    left.set_xticks(PROMPTS[::2], [str(size) for size in PROMPTS[::2]], fontsize=8)
    left.minorticks_off()
    right.set(xlabel="positions in the cache before", title=f"by depth ({cores} threads)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
def main(work: Path) -> None:
    table = sweep(work)
    for row in table:
        click.echo(f"{row['bits']} bits, {row['threads']} threads: {row['task']:8}{row['tokens']:6} tokens at "
                   f"{row['depth']:6}: {row['tokens_per_second']:8.1f} tokens/s, {row['share']:.0%} of the limit")
    harness.save("speed", "python bench/speed.py WORK", {"n_layers": CONFIG.n_layers, "rows": table})
    plot(table, harness.OF_MACHINE / "speed.png")


if __name__ == "__main__":
    main()
