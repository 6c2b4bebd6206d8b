"""How much memory this machine has."""

from __future__ import annotations

import ctypes
import os
import sys


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
