"""All benchmarks one after another, then bench/RESULTS.md and bench/results/tables.md.

    python -m bench.run_all WORK --avx2 PYTHON     # two hours on a quiet machine, 40 GB of disk in WORK
    python -m bench.run_all --report               # only the reports, from the results of earlier runs

PYTHON has a llama-cpp-python that was built for AVX2 only; `make bench WORK=folder` makes it and passes it on.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
from tqdm import tqdm

from bench import report

ROOT = Path(__file__).parents[1]
COMMANDS = (     # as named in the sections of bench/report.py
    "python bench/startup.py",
    "python bench/seven_b.py WORK",
    "python bench/seven_b.py WORK --only quantize --bits 8",
    "python bench/first_token.py WORK/7b-q4.safetensors",
    "python bench/peers.py WORK",
    "python bench/peers.py WORK --bits 8",
    "python bench/peers.py WORK --avx2 PYTHON",
    "python bench/batches.py WORK",
    "python bench/batches.py WORK --bits 8",
    "python bench/parallel.py WORK",
    "python bench/against.py WORK --revision c7b2ec9",
    "python bench/speed.py WORK",
    "python bench/long_context.py WORK --bits 4",
    "python bench/long_context.py WORK --bits 8",
    "python bench/long_context.py WORK --n-layers 4",
    "python bench/long_context.py WORK --n-layers 32",
    "python bench/lookup.py WORK",
    "python bench/restart.py WORK --n-layers 4",
    "python bench/small_memory.py WORK",
    "python bench/small_memory.py WORK --kv-bits 4",
    "python bench/written.py WORK",
    "python bench/server_overhead.py WORK",
    "python bench/server_overhead.py WORK --model demo",
    "python bench/server_load.py",
    "python bench/quality.py",
    "python bench/real_model.py WORK",
    "python bench/calibration_cost.py WORK",
    "python bench/full_calibration.py WORK",
    "python bench/kv_accuracy.py WORK --model demo",
    "python bench/kv_accuracy.py WORK --model SmolLM2-135M",
    "python bench/quality_random.py",
    "python bench/quantization_error.py",
    "python bench/server_fuzz.py",
    "python bench/fuzz.py",
    "python bench/crash.py",
    "python bench/soak.py 0.1",
)


def command_line(command: str, work: Path, avx2: str | None) -> list[str]:
    """One of COMMANDS for this interpreter, WORK and PYTHON filled in."""
    words = [word.replace("WORK", str(work)).replace("PYTHON", avx2 or "") for word in command.split()]
    return [sys.executable, "-m", words[1].removesuffix(".py").replace("/", "."), *words[2:]]


@click.command(help=__doc__.split("\n")[0])
@click.argument("work", type=click.Path(path_type=Path, file_okay=False), required=False)
@click.option("--avx2", metavar="PYTHON", help="An interpreter whose llama-cpp-python is built for AVX2 only.")
@click.option("--report", "only_report", is_flag=True, help="Measure nothing.")
def main(work: Path | None, avx2: str | None, only_report: bool) -> None:
    if (work is None) != only_report:
        raise click.UsageError("give either WORK, a folder for large files, or --report")
    failed = []
    for command in tqdm(() if work is None else COMMANDS, disable=None):
        if "PYTHON" in command and avx2 is None:
            click.echo(f"\nskipped, because it needs --avx2: {command}\n", err=True)
            continue
        click.echo(f"\n{command}\n")
        if work is None or subprocess.run(command_line(command, work, avx2), cwd=ROOT).returncode != 0:
            failed.append(command)
    report.write()
    click.echo(report.REPORT)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
