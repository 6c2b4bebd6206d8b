"""How long a user waits: for the import, for the first token, and for the compiler at the first run.

    python bench/startup.py

Takes about three minutes. All times are from the start of a new process, medians over 7; with empty caches, measured once.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click

import edgemistral
from bench import harness

REPEATS = 7
ANSWER = ("Hello", "--max-new-tokens", "4", "--seed", "0")
TIMED_IMPORT = "import time; start = time.perf_counter(); import edgemistral; print(time.perf_counter() - start)"


def measure(folder: Path) -> dict[str, Any]:
    """Seconds of everything; empty caches are made in `folder`."""
    timed_import = [sys.executable, "-c", TIMED_IMPORT]
    harness.run(timed_import)   # writes the compiled Python files
    imports = median(float(harness.run(timed_import).output) for _ in range(REPEATS))
    interpreter = harness.median_of(REPEATS, [sys.executable, "-c", "print()"])
    first_token = harness.median_of(REPEATS, [*harness.EDGEMISTRAL, "run", "demo", *ANSWER])
    blob = shutil.copy(edgemistral.demo_model(), folder / "model.safetensors")

    def first_ever(model: str) -> float:
        empty = tempfile.mkdtemp(dir=folder)
        return harness.run([*harness.EDGEMISTRAL, "run", model, *ANSWER], {"EDGEMISTRAL_CACHE": empty}).first_output_seconds

    def everything() -> float:
        return harness.run([*harness.EDGEMISTRAL, "warmup"], {"EDGEMISTRAL_CACHE": tempfile.mkdtemp(dir=folder)}).seconds

    return {
        "import_seconds": imports,
        "interpreter_seconds": interpreter,
        "first_token_seconds": first_token,
        "first_run_seconds": first_ever(str(blob)),
        "first_demo_seconds": first_ever("demo"),
        "warm_up_seconds": everything(),
    }


def print_table(results: dict[str, Any]) -> None:
    for name, what in (
        ("import_seconds", "import edgemistral"),
        ("interpreter_seconds", "Python itself, from start to output"),
        ("first_token_seconds", "edgemistral run demo, to the first token"),
        ("first_run_seconds", "the first run ever of a blob: kernels are compiled"),
        ("first_demo_seconds", "the first run ever of the demo model, the same"),
        ("warm_up_seconds", "edgemistral warmup with an empty cache: everything is compiled"),
    ):
        print(f"{what:88}{results[name]:8.3f} s")


@click.command(help=__doc__.split("\n")[0])
def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder))
    print_table(results)
    harness.save("startup", "python bench/startup.py", results)


if __name__ == "__main__":
    main()
