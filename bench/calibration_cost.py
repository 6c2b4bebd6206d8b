"""The cost of each calibration on true 7B shapes: seconds and memory of 1 and 2 layers, extrapolated to 32.

    python bench/calibration_cost.py WORK [--method none --method fast --method full]

Time grows linearly with the layers, so two depths give the time of a layer and of the rest (embeddings, head, start). The time
of 32 layers is extrapolated, not measured. "full" runs with 1 layer only; its rest is that of "fast".
`python bench/seven_b.py WORK` runs all of a 7B with the default. Results are kept one by one, so methods can be measured in
separate runs. The weights are random.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench import harness
from bench.synthetic import V2, write_synthetic

METHODS = ("none", "fast", "full")


def measure(work: Path, method: str, layers: int) -> dict[str, Any]:
    """Seconds and peak memory of `edgemistral quantize` with so many layers."""
    checkpoint, blob = work / f"7b-{layers}-layers", work / "cost.safetensors"
    if not (checkpoint / "tokenizer.model").exists():   # which is written last
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_synthetic(checkpoint, dataclasses.replace(V2, n_layers=layers))
    command = [*harness.EDGEMISTRAL, "quantize", str(checkpoint), str(blob), "--force", "--calibrate", method]
    done = harness.run(command)
    blob.unlink()
    return {"layers": layers, "seconds": done.seconds, "peak_anonymous_bytes": done.peak_anonymous_bytes}


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), default=METHODS, help="Measure these.")
def main(work: Path, methods: Sequence[str]) -> None:
    harness.prepare(work, 4 << 30)
    path = harness.OF_MACHINE / "calibration_cost.json"
    kept = json.loads(path.read_text("utf-8"))["methods"] if path.exists() else {}
    for method in methods:
        runs = [measure(work, method, layers) for layers in ((1,) if method == "full" else (1, 2))]
        if method == "full" and "fast" not in kept:
            raise click.ClickException("measure fast first: full takes the time of embeddings, head and start from it")
        rest = kept["fast"]["seconds_of_the_rest"] if method == "full" else 2 * runs[0]["seconds"] - runs[1]["seconds"]
        a_layer = runs[0]["seconds"] - rest
        whole = rest + 32 * a_layer
        kept[method] = {"runs": runs, "seconds_of_a_layer": a_layer, "seconds_of_the_rest": rest,
                        "seconds_of_32_layers_extrapolated": whole}
        peak = max(run["peak_anonymous_bytes"] or 0 for run in runs)
        print(f"{method:6}{a_layer:8.1f} s a layer{whole / 60:8.1f} min for 32 layers{harness.in_gb(peak):>12}", flush=True)
        harness.save("calibration_cost", "python bench/calibration_cost.py WORK", {"methods": kept})


if __name__ == "__main__":
    main()
