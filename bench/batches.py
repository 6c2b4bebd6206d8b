"""The time of a step with one token of each of several sequences, relative to a step of one row, in turns.

    python bench/batches.py WORK [--bits 8]

Every row gets its logits. The blob is the one that seven_b.py leaves in WORK, or --blob.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from bench.harness import save, work_argument
from edgemistral.files.blob import Blob
from edgemistral.measure.benchmark import seconds
from edgemistral.runtime.segments import Row, Sequence
from edgemistral.runtime.threads import performance_cores
from edgemistral.runtime.transformer import Transformer

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def measure(blob: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """For each size the median seconds, and the median over the rounds of its ratio to one token's."""
    transformer = Transformer(Blob.open(blob), context=64, threads=threads)

    sequences = [Sequence(transformer.pool) for _ in range(max(SIZES))]

    def took(size: int) -> float:
        rows = [Row(sequence, np.array([n + 3], np.int32), 1) for n, sequence in enumerate(sequences[:size])]
        taken = seconds(lambda: transformer.step(rows))
        for sequence in sequences[:size]:
            sequence.cut(0)
        return taken

    for size in SIZES:
        took(size)
    # One token is measured before and after each batch, so that changes of the machine's speed affect both.
    samples: dict[int, list[tuple[float, float]]] = {size: [] for size in SIZES}
    for _ in range(rounds):
        before = took(1)
        for size in SIZES:
            batch, after = took(size), took(1)
            samples[size].append((batch, batch / ((before + after) / 2)))
            before = after
    transformer.close()
    return [
        {"tokens": size, "seconds": median(s for s, _ in pairs), "ratio": median(r for _, r in pairs),
         "min": min(r for _, r in pairs), "max": max(r for _, r in pairs)}
        for size, pairs in samples.items()
    ]


@click.command(help=__doc__.split("\n")[0])
@work_argument
@click.option("--blob", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True)
@click.option("--rounds", default=15, show_default=True)
def main(work: Path, blob: Path | None, bits: str, rounds: int) -> None:
    threads = performance_cores()
    rows = measure(blob or work / f"7b-q{bits}.safetensors", threads, rounds)
    print(f"{'tokens':>6}{'ms':>10}{'of one':>10}{'lowest':>10}{'highest':>10}")
    for row in rows:
        print(f"{row['tokens']:6}{1000 * row['seconds']:10.1f}{row['ratio']:10.2f}{row['min']:10.2f}{row['max']:10.2f}")
    results = {"bits": int(bits), "threads": threads, "rows": rows}
    save(f"batches_q{bits}", f"python bench/batches.py WORK --bits {bits}", results)


if __name__ == "__main__":
    main()
