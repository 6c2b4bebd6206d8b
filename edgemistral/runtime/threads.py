"""How many threads to compute with: the number of physical performance cores that this process may use.

A second thread on a core shares its ports and caches, and all threads wait at every barrier for a slower core: usually both
cost more than they gain. `measured_threads` measures the best number for machines where this is not true.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgemistral.paths import cache_dir

if TYPE_CHECKING:
    from edgemistral.files.blob import Blob

AS_GOOD = 1.03      # fewer threads are chosen if a token takes at most this factor longer: other programs get the cores
MEASURED = 0.2      # seconds of decoding for each number of threads


def performance_cores() -> int:
    """Physical cores of the fastest kind that this process may use, within the quota of its container; at least 1."""
    cores = 0
    with contextlib.suppress(OSError, ValueError):
        if sys.platform == "linux":
            cores = min(_linux_cores(Path("/sys"), os.sched_getaffinity(0)), _linux_quota(Path("/sys"), Path("/proc")))
        elif sys.platform == "darwin":
            cores = _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")
        elif sys.platform == "win32":
            cores = _windows_cores(*_windows_processors())
    return cores or os.cpu_count() or 1


# ---- Linux -----------------------------------------------------------------------------------------------------------

def _linux_cores(sys_: Path, allowed: set[int]) -> int:
    """Performance cores among the logical CPUs `allowed`; without a topology every CPU is a core."""
    cpus = sys_ / "devices/system/cpu"
    fast = allowed & _fast_cpus(sys_, allowed) or allowed
    return len({_text(cpus / f"cpu{n}/topology/thread_siblings_list") or str(n) for n in fast})


def _fast_cpus(sys_: Path, allowed: set[int]) -> set[int]:
    if listed := _text(sys_ / "devices/cpu_core/cpus"):      # Intel with two kinds of cores
        return _cpu_list(listed)
    capacity = {n: int(_text(sys_ / f"devices/system/cpu/cpu{n}/cpu_capacity") or 1) for n in allowed}      # ARM
    return {n for n in allowed if 2 * capacity[n] >= max(capacity.values())}


def _cpu_list(text: str) -> set[int]:
    """ "0-3,8" as numbers."""
    ranges = [[int(n) for n in part.split("-")] for part in text.split(",")]
    return {n for first, *last in ranges for n in range(first, (*last, first)[0] + 1)}


def _linux_quota(sys_: Path, proc: Path) -> int:
    """Whole cores within the quotas of this process's control groups; a part of a core gets no thread."""
    shares = [quota / period for quota, period in _quotas(sys_ / "fs/cgroup", _text(proc / "self/cgroup")) if quota > 0]
    return max(1, int(min(shares, default=sys.maxsize)))


def _quotas(mounted: Path, groups: str) -> Iterator[tuple[int, int]]:
    """(quota, period) of this process's group and all groups around it, version 1 or 2."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mounted / "cpu" if controllers else mounted
        group = top / path.lstrip("/")      # in a container this may be the host's path, which does not exist here
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            v1, v2 = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.max").split()
            if v1:
                yield int(v1), int(_text(folder / "cpu.cfs_period_us"))
            elif v2 and v2[0] != "max":
                yield int(v2[0]), int(v2[1])


def _text(path: Path) -> str:
    """A file's text, or "" if there is no file."""
    try:
        return path.read_text("ascii").strip()
    except OSError:
        return ""


# ---- macOS and Windows -----------------------------------------------------------------------------------------------

def _sysctl(name: str) -> int:
    """A number from the system, 0 if it does not know the name."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(4)
    ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return value.value


def _windows_processors() -> tuple[bytes, int]:
    """GetLogicalProcessorInformationEx's records of cores, and the mask of CPUs that this process may use (0: no limit)."""
    if sys.platform != "win32":
        raise OSError("not Windows")
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    size = ctypes.c_uint32(0)
    kernel32.GetLogicalProcessorInformationEx(0, None, ctypes.byref(size))
    records = ctypes.create_string_buffer(size.value)
    if not kernel32.GetLogicalProcessorInformationEx(0, records, ctypes.byref(size)):
        raise ctypes.WinError(ctypes.get_last_error())
    allowed, system = ctypes.c_size_t(0), ctypes.c_size_t(0)
    process = ctypes.c_void_p(kernel32.GetCurrentProcess())
    kernel32.GetProcessAffinityMask(process, ctypes.byref(allowed), ctypes.byref(system))
    return records.raw[: size.value], allowed.value


def _windows_cores(records: bytes, allowed: int) -> int:
    """Cores of the highest efficiency class among the records, each (relationship, size, flags, class, ..., masks)."""
    classes, at = [], 0
    while at < len(records):
        _, size, _, efficiency, groups = struct.unpack_from("<IIBB20xH", records, at)
        masks = [struct.unpack_from("<QH6x", records, at + 32 + 16 * n) for n in range(groups)]
        if not allowed or any(group > 0 or mask & allowed for mask, group in masks):
            classes.append(efficiency)
        at += size
    return classes.count(max(classes, default=0))


# ---- measured --------------------------------------------------------------------------------------------------------

def measured_threads(blob: Blob) -> int:
    """The number of threads that decodes this model fastest, measured once (about a second) and remembered.

    Remembered in the cache folder, for this processor and all models of this shape.
    """
    import llvmlite.binding

    cores, logical = performance_cores(), os.cpu_count() or 1
    facts = llvmlite.binding.get_host_cpu_name(), cores, logical, blob.config, blob.recipe
    remembered = cache_dir() / "threads" / hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    with contextlib.suppress(ValueError):
        return int(_text(remembered))
    seconds = {n: _seconds_of_a_token(blob.path, n) for n in candidates(cores, logical)}
    best = next(n for n in seconds if seconds[n] <= AS_GOOD * min(seconds.values()))
    with contextlib.suppress(OSError):      # if nothing can be written, the next start measures again
        remembered.parent.mkdir(parents=True, exist_ok=True)
        partial = remembered.with_suffix(f".{os.getpid()}")
        partial.write_text(str(best), encoding="ascii")
        partial.replace(remembered)
    return best


def candidates(cores: int, logical: int) -> list[int]:
    """Numbers of threads to measure: fewer than all cores may saturate the memory, and second threads may help."""
    return sorted({max(1, n) for n in (cores // 2, 3 * cores // 4, cores, (cores + logical) // 2, logical)})


def _seconds_of_a_token(path: Path, threads: int) -> float:
    """The shortest time to decode one token, measured for about `MEASURED` seconds."""
    import numpy as np

    from edgemistral.files.blob import Blob
    from edgemistral.runtime.segments import Row, Sequence
    from edgemistral.runtime.transformer import Transformer

    times: list[float] = []
    transformer = Transformer(Blob.open(path), context=1, threads=threads)
    try:
        end = time.perf_counter() + MEASURED
        while len(times) < 3 or time.perf_counter() < end:      # the first one may read the file
            sequence = Sequence(transformer.pool)
            start = time.perf_counter()
            transformer.step([Row(sequence, np.ones(1, np.int32), 1)])
            sequence.close()
            times.append(time.perf_counter() - start)
    finally:
        transformer.close()
    return min(times)
