"""Writes constraints.txt: the version of every package of the test environment, for each of the Pythons that are given.

    python .ci/constraints.py python3.10 python3.11 python3.12 python3.13

Asks each Python's pip what it would install today (nothing is installed). Where Pythons differ, a line names its Python.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
HEAD = "# The test environment, so that CI today and in a year tests the same packages. Made by .ci/constraints.py.\n"


def would_install(python: str) -> tuple[str, dict[str, str]]:
    """The Python's version as 3.x, and package -> version."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--only-binary=:all:",
             "--report", str(report), f"{HERE.parent}[test]"], check=True)
        found = json.loads(report.read_text())
    packages = (package["metadata"] for package in found["install"])
    versions = {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"] for package in packages}
    del versions["edgemistral"]
    return ".".join(found["environment"]["python_full_version"].split(".")[:2]), versions


def main(pythons: list[str]) -> None:
    found = dict(map(would_install, pythons))
    lines = []
    for name in sorted({name for versions in found.values() for name in versions}):
        pinned = {python: versions[name] for python, versions in found.items() if name in versions}
        if len(pinned) == len(found) and len(set(pinned.values())) == 1:
            lines.append(f"{name}=={next(iter(pinned.values()))}")
        else:
            lines += [f'{name}=={version} ; python_version == "{python}"' for python, version in pinned.items()]
    (HERE / "constraints.txt").write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or [sys.executable])
