"""A model of the true shapes of Mistral-7B-Instruct-v0.2: how long it takes to quantize, to load and to run.

    python bench/seven_b.py WORK            # all of it: half an hour, 20 GB of disk in WORK
    python bench/seven_b.py WORK --clean    # the same, and the 14.5 GB checkpoint deleted at the end
    python bench/seven_b.py WORK --only run # the speed of the blob that an earlier run left there
    python bench/seven_b.py WORK --only quantize --bits 8

The weights are random, which takes the same time as trained ones. The checkpoint is made if it does not exist. It is read from
the disk, not from the system's cache, if the system can drop it from there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import click

import edgemistral
from bench import harness
from bench.synthetic import write_synthetic
from edgemistral.files.blob import Blob
from edgemistral.measure.benchmark import seconds

CHECKPOINT_BYTES = 15 * 10**9
BLOB_BYTES = {"4": 5 * 10**9, "8": 9 * 10**9}
PROMPT = "What should I see in Paris?"
REPEATS = 7
READ_BYTES = 1 << 24


def measure_quantize(checkpoint: Path, blob: Path, bits: str) -> dict[str, Any]:
    """Time, memory and size of `edgemistral quantize`, and the time of only reading the checkpoint."""
    shards = sorted(checkpoint.glob("*.safetensors"))
    cold = harness.drop_from_cache(shards)
    read_seconds = seconds(lambda: [read(shard) for shard in shards])
    harness.drop_from_cache(shards)
    done = harness.run([*harness.EDGEMISTRAL, "quantize", str(checkpoint), str(blob), "--force", "--bits", bits])
    facts = json.loads(harness.run([*harness.EDGEMISTRAL, "inspect", str(blob), "--json"]).output)
    return {
        "checkpoint_bytes": sum(shard.stat().st_size for shard in shards),
        "checkpoint_from_disk": cold,
        "read_seconds": read_seconds,
        "seconds": done.seconds,
        "peak_anonymous_bytes": done.peak_anonymous_bytes,
        "blob_bytes": blob.stat().st_size,
        "bits_per_weight": facts["bits_per_weight"],
    }


def measure_run(blob: Path) -> dict[str, Any]:
    """Time to open, to load, to the first token; then decode and prefill as shares of the machine's limits."""
    run_once = [*harness.EDGEMISTRAL, "run", str(blob), PROMPT, "--max-new-tokens", "1", "--greedy"]
    warm = harness.median_of(REPEATS, run_once)
    cold = harness.run(run_once).first_output_seconds if harness.drop_from_cache([blob]) else None
    harness.run(run_once)   # the whole blob is in memory again
    bench = harness.run([*harness.EDGEMISTRAL, "bench", str(blob), "--prompts", "512", "--depths", "0,4096", "--json"])
    return {
        "open_seconds": median(seconds(lambda: Blob.open(blob).close()) for _ in range(REPEATS)),
        "load_seconds": median(seconds(lambda: edgemistral.load(blob).close()) for _ in range(REPEATS)),
        "first_token_seconds": warm,
        "first_token_from_disk_seconds": cold,
        "peak_anonymous_bytes": bench.peak_anonymous_bytes,
        "bench": {name: value for name, value in json.loads(bench.output).items() if name != "model"},
    }


def read(path: Path) -> None:
    buffer = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def print_quantize(results: dict[str, Any]) -> None:
    bits, n_bytes = results["bits_per_weight"], results["checkpoint_bytes"]
    source = "disk" if results["checkpoint_from_disk"] else "disk or memory"
    print(f"\n{harness.in_gb(n_bytes)} from {source}")
    for what, took in (("quantize", results["seconds"]), ("only read", results["read_seconds"])):
        print(f"  {what:12}{took:6.0f} s{n_bytes / took / 1e6:8.0f} MB/s")
    print(f"peak anonymous memory {harness.in_gb(results['peak_anonymous_bytes'])}")
    print(f"blob {harness.in_gb(results['blob_bytes'])}")
    print(f"bits per weight {bits['layers']:.3f} in the layers, {bits['file']:.3f} in the whole file")


def print_run(results: dict[str, Any]) -> None:
    cold = results["first_token_from_disk_seconds"]
    print(f"\nopen {1000 * results['open_seconds']:.1f} ms, load {1000 * results['load_seconds']:.0f} ms")
    print(f"first token after {results['first_token_seconds']:.2f} s", "" if cold is None else f"({cold:.2f} s from the disk)")
    print(f"peak anonymous memory: {harness.in_gb(results['peak_anonymous_bytes'])}")
    print(f"{'':10}{'tokens':>8}{'depth':>8}{'tokens/s':>12}{'of the limit':>14}")
    for row in results["bench"]["rows"]:
        print(f"{row['task']:10}{row['tokens']:8}{row['depth']:8}{row['tokens_per_second']:12.2f}{row['share']:14.0%}")


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
@click.option("--only", type=click.Choice(["quantize", "run"]), help="Measure only this half.")
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", help="Of the layers.")
@click.option("--clean", is_flag=True, help="Delete the checkpoint at the end. The blob stays.")
def main(work: Path, only: str | None, bits: str, clean: bool) -> None:
    checkpoint, blob = work / "7b", work / f"7b-q{bits}.safetensors"
    of_bits, option = ("", "") if bits == "4" else ("_q8", " --bits 8")
    if only != "run":
        written = (checkpoint / "tokenizer.model").exists()   # which is written last
        harness.prepare(work, BLOB_BYTES[bits] + (0 if written else CHECKPOINT_BYTES))
        if not written:
            write_synthetic(checkpoint, progress=True)
        results = measure_quantize(checkpoint, blob, bits)
        print_quantize(results)
        harness.save(f"seven_b_quantize{of_bits}", f"python bench/seven_b.py WORK --only quantize{option}", results)
        if clean:
            shutil.rmtree(checkpoint)
    if only != "quantize":
        results = measure_run(blob)
        print_run(results)
        harness.save(f"seven_b_run{of_bits}", f"python bench/seven_b.py WORK --only run{option}", results)


if __name__ == "__main__":
    main()
