"""How much memory this machine has, and how much of it files can fill."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
LARGE, M_MMAP_THRESHOLD = 1 << 16, -3      # bytes; an option of mallopt(3)


def physical_memory() -> int:
    """Bytes of memory in this machine."""
    if sys.platform == "win32":
        class Status(ctypes.Structure):     # MEMORYSTATUSEX
            _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong), ("total", ctypes.c_ulonglong),
                        ("others", ctypes.c_ulonglong * 6)]

        status = Status(length=ctypes.sizeof(Status))
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status.total)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def return_large_blocks() -> None:
    """From now on, the C library's allocator gives blocks of LARGE bytes back to the system as soon as they are freed.

    By default it keeps them for later. Small blocks that live longer settle there, and a process under load grows for hours.
    Only glibc has this option.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def memory_for_files(root: Path = Path("/")) -> int | None:
    """Bytes of files that fit into memory, including those already there; None if unknown.

    On Linux: what is available on the machine, or to the control groups of this process if that is less.
    """
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text(), re.M)
        if found is None:
            return None
        room = 1024 * int(found[1])
        for folder, limit, usage in _groups(root):
            with contextlib.suppress(OSError, ValueError):           # no limit, or a group that cannot be read
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                kinds = ("total_active_file", "total_inactive_file")
                kinds = kinds if kinds[0] in stat else ("active_file", "inactive_file")
                room = min(room, most - used + sum(int(stat.get(kind, 0)) for kind in kinds))
        return max(0, room)
    except OSError:
        return None


def _groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """The control groups that limit this process's memory: folder, and the names of its files for limit and use."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, names = root / CGROUPS.relative_to("/") / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif number == "0":
            top, names = root / CGROUPS.relative_to("/"), ("memory.max", "memory.current")
        else:
            continue
        folder = top / path.lstrip("/")
        while folder.is_relative_to(top):
            yield folder, *names
            folder = folder.parent
