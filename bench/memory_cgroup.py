"""A control group that limits the memory of one process on Linux, to simulate a computer with less memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class NoCgroup(Exception):
    """No group can be made here; the message says why."""


class Group:
    """One group. Its limit includes its processes' anonymous memory and the file pages that they read first."""

    def __init__(self, folder: Path, limit: int, v2: bool) -> None:
        self.folder, self._v2 = folder, v2
        if v2:
            self._write("memory.max", limit)
            self._write("memory.swap.max", 0, must=False)
        else:
            self._write("memory.limit_in_bytes", limit)
            self._write("memory.memsw.limit_in_bytes", limit, must=False)       # no swapping either
            self._write("memory.swappiness", 0, must=False)

    @property
    def peak(self) -> int | None:
        """Most bytes so far, with file pages; None if the kernel does not report it."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / ("memory.peak" if self._v2 else "memory.max_usage_in_bytes")).read_text())
        return None

    @property
    def killed(self) -> int:
        """How many processes the kernel killed because no memory could be freed."""
        with contextlib.suppress(OSError):
            text = (self.folder / ("memory.events" if self._v2 else "memory.oom_control")).read_text()
            return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))
        return 0

    def _write(self, name: str, value: int, must: bool = True) -> None:
        try:
            (self.folder / name).write_text(str(value))
        except OSError as error:
            if must:
                raise NoCgroup(f"{self.folder / name} cannot be written: {error.strerror}") from None


@contextmanager
def limited(limit: int, name: str = "edgemistral-bench") -> Iterator[Group]:
    """A new, empty group; it is removed at the end, when its processes have ended. NoCgroup: it cannot be made."""
    parent, v2 = _parent()
    folder = parent / f"{name}-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NoCgroup(f"{folder} cannot be made: {error.strerror}; run this as root, or in a delegated group") from None
    try:
        yield Group(folder, limit, v2)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def join(folder: Path) -> None:
    """Put this process into a group."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def _parent() -> tuple[Path, bool]:
    """The folder in which a group with a memory limit can be made, and whether it has version 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        raise NoCgroup("this system has no control groups (Linux has)") from None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") and (ROOT / "memory").is_dir():
            return ROOT / "memory" / path.lstrip("/"), False
    for line in lines:
        if line.startswith("0::"):
            here = ROOT / line[3:].lstrip("/")
            for folder in (here, *here.parents):       # a group with processes cannot have limited subgroups: try its parents
                with contextlib.suppress(OSError):
                    if "memory" in (folder / "cgroup.subtree_control").read_text().split():
                        return folder, True
                if folder == ROOT:
                    break
    raise NoCgroup("no control group of this process can limit memory")
