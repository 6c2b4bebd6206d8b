"""How long an application waits for a 7B: from `load` to the first token, in the process, with warm caches.

    python bench/first_token.py WORK/7b-q4.safetensors

Half a minute. Medians over 7 new processes; the file is in the system's cache. `bench/seven_b.py` makes a blob of a 7B's shape.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import click

from bench import harness

REPEATS = 7
CODE = """
import json, sys, time
start = time.perf_counter()
import edgemistral
imported = time.perf_counter()
model = edgemistral.load(sys.argv[1])
loaded = time.perf_counter()
reply = model.chat([{"role": "user", "content": "What should I see in Paris?"}], temperature=0)
next(reply.generation)
answered = time.perf_counter()
print(json.dumps({"import_seconds": imported - start, "load_seconds": loaded - imported,
    "first_token_after_load_seconds": answered - loaded, "total_seconds": answered - start,
    "prompt_tokens": reply.usage.prompt_tokens}))
model.close()
"""


def measure(blob: Path) -> dict[str, Any]:
    """Seconds of each step."""
    command = [sys.executable, "-c", CODE, str(blob)]
    harness.run(command)                                    # fills the caches
    runs = [json.loads(harness.run(command).output) for _ in range(REPEATS)]
    return {"blob_bytes": blob.stat().st_size, **{name: median(run[name] for run in runs) for name in runs[0]}}


def print_table(results: dict[str, Any]) -> None:
    for name, what in (
        ("import_seconds", "import edgemistral"),
        ("load_seconds", "load: numba, the kernels' modules, the blob"),
        ("first_token_after_load_seconds", "the first token: compiled kernels from the cache, the prompt, the weights' pages"),
        ("total_seconds", "all of it"),
    ):
        print(f"{what:88}{results[name]:8.3f} s")


@click.command(help=__doc__.split("\n")[0])
@click.argument("blob", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(blob: Path) -> None:
    results = measure(blob)
    print_table(results)
    harness.save("first_token", "python bench/first_token.py WORK/7b-q4.safetensors", results)


if __name__ == "__main__":
    main()
