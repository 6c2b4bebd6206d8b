"""Shared by the benchmarks: facts about the machine, commands with time and memory, results as JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import llvmlite.binding

import edgemistral
from edgemistral.kernels.lowering import choose
from edgemistral.runtime.threads import performance_cores

RESULTS = Path(__file__).parent / "results"
OF_MACHINE = RESULTS / llvmlite.binding.get_host_cpu_name()   # results that depend on the processor
EDGEMISTRAL = (sys.executable, "-m", "edgemistral")
SAMPLING_SECONDS = 0.05   # between two samples of a process's memory

work_argument = click.argument("work", type=click.Path(path_type=Path, file_okay=False))


# ---- the machine -----------------------------------------------------------------------------------------------------

def machine() -> dict[str, Any]:
    """The facts that figures depend on, without anything that identifies the machine."""
    return {
        "cpu": f"{_cpu_name()} ({llvmlite.binding.get_host_cpu_name()})",
        "cores": performance_cores(),
        "memory_bytes": _memory_bytes(),
        "os": _os_name(),
        "instructions": type(choose()).__name__,
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "numba": importlib.metadata.version("numba"),
        "edgemistral": edgemistral.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text("utf-8"), re.M):
            return found[1]
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    """None on Windows."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:   # no Linux
        return f"{platform.system()} {platform.release()}"


# ---- files -----------------------------------------------------------------------------------------------------------

def prepare(work: Path, n_bytes: int) -> None:
    """Make the folder; fail if its disk has less than `n_bytes` free."""
    work.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(work).free) < n_bytes:
        raise click.ClickException(f"{work}: needs {n_bytes / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")


def drop_from_cache(paths: Sequence[Path]) -> bool:
    """Drop these files from the system's cache, so that the next read comes from the disk; False: not supported here."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())   # only clean pages can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def save(name: str, command: str, results: Mapping[str, Any], of_machine: bool = True) -> None:
    """Write bench/results/PROCESSOR/NAME.json: the command, the commit, the machine, and the results.

    of_machine False: the figures are the same on every machine, and the file is in bench/results itself.
    """
    folder = OF_MACHINE if of_machine else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "commit": commit(), **({"machine": machine()} if of_machine else {}), **results}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def commit() -> str | None:
    """The measured commit, with a + if its files were changed since; None outside of a git checkout."""
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/edgemistral", ":/quantize", ":/bench/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- processes -------------------------------------------------------------------------------------------------------

class PeakMemory:
    """Watches a process's anonymous memory while the context is open.

    Anonymous memory must stay in memory: mapped files (weights, KV cache, checkpoints) do not count, because the system
    can drop their pages. `bytes` is the largest sample, None on systems without /proc.
    """

    def __init__(self, pid: int) -> None:
        self.bytes: int | None = None
        self._status = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):   # no /proc, or the process has ended
            while not self._stop.is_set():
                if found := re.search(r"^RssAnon:\s*(\d+) kB", self._status.read_text("utf-8"), re.M):
                    self.bytes = max(self.bytes or 0, int(found[1]) * 1024)
                self._stop.wait(SAMPLING_SECONDS)


@dataclass(frozen=True)
class Finished:
    """A command that ran to its end. Times in seconds from its start."""

    output: str
    first_output_seconds: float
    seconds: float
    peak_anonymous_bytes: int | None   # None if unknown


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Finished:
    """Run a command and show its standard error; fails if it fails."""
    start = time.perf_counter()
    with (
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0, env={**os.environ, **(environment or {})}
        ) as process,
        PeakMemory(process.pid) as memory,
    ):
        assert process.stdout is not None
        first = process.stdout.read(1)
        first_seconds = time.perf_counter() - start
        output = first + process.stdout.read()
        code = process.wait()
        seconds = time.perf_counter() - start
    if code != 0:
        raise click.ClickException(f"{' '.join(command)} ended with code {code}")
    return Finished(output.decode("utf-8"), first_seconds, seconds, memory.bytes)


def median_of(times: int, command: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    """Median seconds to the first output of a command, over `times` runs after one that fills the caches."""
    run(command, environment)
    return median(run(command, environment).first_output_seconds for _ in range(times))


# ---- tables ----------------------------------------------------------------------------------------------------------

def in_gb(n_bytes: int | None) -> str:
    """Bytes as a figure of a table."""
    return "not known on this system" if n_bytes is None else f"{n_bytes / 1e9:.2f} GB"
