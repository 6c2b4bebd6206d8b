"""All benchmarks one after another, then bench/RESULTS.md.

    python -m bench.run_all WORK         # an hour on a quiet machine, 30 GB of disk in WORK
    python -m bench.run_all --report     # only RESULTS.md, from the results of earlier runs
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
from tqdm import tqdm

from bench import report

ROOT = Path(__file__).parents[1]
SCRIPTS = (
    ("startup",),
    ("seven_b", "WORK"),
    ("peers", "WORK"),
    ("batches", "WORK"),
    ("speed", "WORK"),
    ("long_context", "WORK", "--bits", "4"),
    ("long_context", "WORK", "--bits", "8"),
    ("server_overhead", "WORK"),
    ("server_load",),
    ("quality",),
    ("quality_random",),
    ("quantization_error",),
)


@click.command(help=__doc__.split("\n")[0])
@click.argument("work", type=click.Path(path_type=Path, file_okay=False), required=False)
@click.option("--report", "only_report", is_flag=True, help="Measure nothing.")
def main(work: Path | None, only_report: bool) -> None:
    if (work is None) != only_report:
        raise click.UsageError("give either WORK, a folder for large files, or --report")
    failed = []
    for script, *arguments in tqdm(() if work is None else SCRIPTS, disable=None):
        click.echo(f"\n{' '.join([script, *arguments])}\n")
        command = [sys.executable, "-m", f"bench.{script}", *(work if a == "WORK" else a for a in arguments)]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(script)
    report.write()
    click.echo(report.REPORT)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
