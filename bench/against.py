"""Compares this tree with an earlier one on the same machine, in turns: prefill, decode and the first compile.

    python bench/against.py WORK --revision COMMIT [--rounds 9]

Both run the same blob, which the earlier tree makes of the checkpoint that bench/parallel.py leaves in WORK: four layers of 7B
shapes. The last layer computes only keys and values of most of a prompt since 2026-11-28: of four layers that is much, of 32
about 3 %. Only public names are used, so that any tree can be measured. The first compile is that of a first answer with an
empty cache of kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click

from bench.harness import save, work_argument
from edgemistral.runtime.threads import performance_cores

ROOT = Path(__file__).parents[1]
PROMPT, NEW = 512, 48
WORKER = f"""
import sys
import numpy as np
import edgemistral
model = edgemistral.load(sys.argv[1], threads=int(sys.argv[2]), context=1024)
rng = np.random.default_rng(0)

def prefill():
    reply = model.generate(rng.integers(3, 30000, {PROMPT}).tolist(), 1, temperature=0)
    list(reply)
    return {PROMPT} / reply.usage.prefill_seconds

def decode():
    reply = model.generate(rng.integers(3, 30000, 8).tolist(), {NEW}, temperature=0)
    n = len(list(reply))
    return (n - 1) / reply.usage.decode_seconds if n > 1 else None

prefill()
for line in sys.stdin:
    value = {{"prefill": prefill, "decode": decode}}[line.strip()]()
    while value is None:
        value = decode()
    print("RESULT", value, flush=True)
"""
TASKS = ("prefill", "decode")


def environment_of(root: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "quantize")))}


class Tree:
    """A process that runs the blob with the code of one tree."""

    def __init__(self, root: Path, blob: Path, threads: int) -> None:
        self.root = root
        self.environment = environment_of(root)
        self.arguments = [sys.executable, "-c", WORKER, str(blob), str(threads)]
        self.process = subprocess.Popen(
            self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=self.environment, cwd=root)

    def ask(self, task: str) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return float(line.split()[1])
        raise click.ClickException(f"{self.arguments} ended with code {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def first_compile(self) -> float:
        """Seconds of a process that computes a prompt and a token with an empty cache of kernels."""
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            subprocess.run(self.arguments, stdin=subprocess.DEVNULL, check=True,
                           env=self.environment | {"EDGEMISTRAL_CACHE": cache}, cwd=self.root)
            return time.perf_counter() - start


@click.command(help=__doc__.split("\n")[0])
@work_argument
@click.option("--revision", required=True, help="The commit of the earlier tree.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--compiles", default=2, show_default=True)
def main(work: Path, revision: str, rounds: int, compiles: int) -> None:
    blob, threads, old = work / f"4-layers-q4-{revision}.safetensors", performance_cores(), work / f"tree-{revision}"
    if not old.exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(old), revision], cwd=ROOT, check=True)
    if not blob.exists():
        subprocess.run([sys.executable, "-m", "edgemistral", "quantize", str(work / "4-layers"), str(blob), "--bits", "4"],
                       env=environment_of(old), cwd=old, check=True)
    trees = {"now": Tree(ROOT, blob, threads), "before": Tree(old, blob, threads)}
    samples: dict[str, list[dict[str, float]]] = {task: [] for task in TASKS}
    for n in range(rounds):
        for task in TASKS:
            order = list(trees) if n % 2 else list(reversed(trees))
            samples[task].append({name: trees[name].ask(task) for name in order})
    for tree in trees.values():
        tree.close()
    compiled = [{name: tree.first_compile() for name, tree in trees.items()} for _ in range(compiles)]
    rows: dict[str, Any] = {
        task: {**{name: median(one[name] for one in taken) for name in trees},
               "ratio": median(one["now"] / one["before"] for one in taken)}
        for task, taken in {**samples, "first compile": compiled}.items()
    }
    for task, row in rows.items():
        click.echo(f"{task}: now {row['now']:.1f}, before {row['before']:.1f}, ratio {row['ratio']:.3f}")
    save("against", f"python bench/against.py WORK --revision {revision}", {
        "revision": revision, "threads": threads, "rows": rows, "samples": samples, "compiles": compiled,
    })


if __name__ == "__main__":
    main()
