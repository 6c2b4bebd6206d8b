"""All benchmarks one after another, then bench/RESULTS.md.

    python bench/run_all.py WORK         # an hour on a quiet machine, 30 GB of disk in WORK
    python bench/run_all.py --report     # only RESULTS.md, from the results of earlier runs
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import report
from tqdm import tqdm

SCRIPTS = (
    ("startup.py",),
    ("seven_b.py", "WORK"),
    ("peers.py", "WORK"),
    ("batches.py", "WORK"),
    ("speed.py", "WORK"),
    ("long_context.py", "WORK", "--bits", "4"),
    ("long_context.py", "WORK", "--bits", "8"),
    ("server_overhead.py", "WORK"),
    ("server_load.py",),
    ("quality.py",),
    ("quality_random.py",),
    ("quantization_error.py",),
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
        command = [sys.executable, Path(__file__).with_name(script), *(work if a == "WORK" else a for a in arguments)]
        if subprocess.run(command).returncode != 0:
            failed.append(script)
    report.write()
    click.echo(report.REPORT)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
