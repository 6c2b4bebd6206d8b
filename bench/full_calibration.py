"""`quantize --calibrate full` of a whole 7B, killed in the middle and resumed: time and memory.

    python bench/full_calibration.py WORK   # two hours, 20 GB of disk in WORK

The first run is killed (SIGKILL) in the middle of a layer, and a second one continues with --resume. It computes the
calibration of the finished layers again, without quantizing them. Their bytes must be those of the first run. The weights are
random, which takes the same time as trained ones. The checkpoint is made if it does not exist.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench import harness
from bench.seven_b import BLOB_BYTES, CHECKPOINT_BYTES
from bench.synthetic import V2, write_synthetic
from edgemistral.files.blob import NO_DIGEST
from edgemistral.files.safetensors import METADATA

LAYERS_BEFORE_THE_KILL = 8
POLL_SECONDS = 1


def finished_tensors(partial: Path) -> dict[str, str]:
    """The checksums of the finished tensors of a blob that may be unfinished, by name."""
    with partial.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")) or "{}")   # empty when it was just made
    checksums = ((key.removeprefix("sha256:"), value) for key, value in header.get(METADATA, {}).items()
                 if key.startswith("sha256:"))
    return {name: value for name, value in checksums if value != NO_DIGEST}


def finished_layers(partial: Path) -> int:
    """Layers whose last tensor is finished; 0 if there is no such file."""
    with contextlib.suppress(FileNotFoundError):   # renamed at the end, at any moment
        return sum(name.endswith(".w2.levels") for name in finished_tensors(partial))
    return 0


def quantize(checkpoint: Path, blob: Path, options: Sequence[str], kill_after: int | None = None) -> dict[str, Any]:
    """One run, with the seconds at which it had 1, 2, ... layers more. Killed half a layer after so many layers, if given."""
    partial = Path(f"{blob}.partial")
    before = finished_layers(partial)
    command = [*harness.EDGEMISTRAL, "quantize", str(checkpoint), str(blob), "--calibrate", "full", *options]
    start, course = time.perf_counter(), list[float]()
    with (
        subprocess.Popen(command) as process,
        harness.PeakMemory(process.pid) as memory,
    ):
        while process.poll() is None:
            if (more := finished_layers(partial) - before) > len(course):
                course += [time.perf_counter() - start] * (more - len(course))
                print(f"layer {before + len(course)}: {course[-1]:.0f} s", file=sys.stderr, flush=True)
            if kill_after is not None and len(course) >= kill_after:
                time.sleep(course[-1] / len(course) / 2)
                process.kill()
                process.wait()
            time.sleep(POLL_SECONDS)
        code = process.wait()
    if code != (0 if kill_after is None else -9):
        raise click.ClickException(f"edgemistral quantize ended with code {code}")
    return {"seconds": time.perf_counter() - start, "layers_at": course, "peak_anonymous_bytes": memory.bytes}


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
def main(work: Path) -> None:
    checkpoint, blob = work / "7b", work / "7b-full.safetensors"
    partial = Path(f"{blob}.partial")
    written = (checkpoint / "tokenizer.model").exists()   # which is written last
    harness.prepare(work, BLOB_BYTES + (0 if written else CHECKPOINT_BYTES))
    if not written:
        write_synthetic(checkpoint, progress=True)
    blob.unlink(missing_ok=True)
    killed = quantize(checkpoint, blob, ["--force"], LAYERS_BEFORE_THE_KILL)
    kept = finished_tensors(partial)
    resumed = quantize(checkpoint, blob, ["--resume"])
    whole = finished_tensors(blob)
    if changed := [name for name in kept if whole[name] != kept[name]]:
        raise click.ClickException(f"{changed[0]}: other bytes after the kill")
    harness.run([*harness.EDGEMISTRAL, "inspect", str(blob)])
    results = {
        "layers": V2.n_layers, "layers_before_the_kill": len(killed["layers_at"]), "killed": killed, "resumed": resumed,
        "seconds": killed["seconds"] + resumed["seconds"], "tensors_kept": len(kept), "blob_bytes": blob.stat().st_size,
    }
    again = resumed["layers_at"][0]
    print(f"killed after {killed['seconds'] / 60:.1f} min, next layer {again / 60:.1f} min after the restart, "
          f"whole {results['seconds'] / 60:.1f} min")
    harness.save("full_calibration", "python bench/full_calibration.py WORK", results)


if __name__ == "__main__":
    main()
