"""Barriers and shared work for a team of threads that runs one jitted function together.

Each thread counts its phases in `turn[0]`: `take` hands out the work of the current phase and `barrier` ends it. So the kernels
do not count phases and cannot miscount. `sync` is an int64 array of SYNC_SIZE zeros before a run: `sync[0]` counts arrivals at
barriers, `sync[1]` says how far the run is (see `report`), and three tickets, each in a separate cache line, hand out work in
turn. The ticket of the next phase is reset to zero during the current one: all threads have left the phase that used it last,
and none has reached the next.
"""

from __future__ import annotations

import ctypes
import sys
from typing import NamedTuple

import llvmlite.binding
import numpy as np
from numpy.typing import NDArray

from edgemistral.kernels.jit import inner
from edgemistral.kernels.simd import atomic_add, atomic_load, pause, yield_thread

SPINS = 4000    # turns before a waiting thread yields: about 50 us, longer than any wait if every thread has a core
TICKETS = 3
SYNC_SIZE = 8 * (1 + TICKETS)


def _bind_yield() -> None:
    """Give `simd.yield_thread` its meaning on this system. By name, so that cached code finds it in every process."""
    if sys.platform == "win32":
        function = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    llvmlite.binding.add_symbol("edgemistral_yield_thread", ctypes.cast(function, ctypes.c_void_p).value)


_bind_yield()


class Member(NamedTuple):
    """One thread of a team."""

    rank: int
    threads: int
    sync: NDArray[np.int64]    # (SYNC_SIZE,) shared
    turn: NDArray[np.int64]    # (1,) its own: the number of the phase it is in


@inner
def barrier(member):
    """The end of a phase: wait until every thread has come to it."""
    phase = member.turn[0]
    if member.rank == 0:
        member.sync[8 * (1 + (phase + 1) % TICKETS)] = 0
    atomic_add(member.sync, 0, 1)
    spins = 0
    while atomic_load(member.sync, 0) < (phase + 1) * member.threads:
        pause()
        spins += 1
        if spins > SPINS:
            yield_thread()
    member.turn[0] = phase + 1


@inner
def report(member, progress):
    """Tell the threads outside of the team how far the run is, between two phases."""
    if member.rank == 0:
        member.sync[1] = progress


@inner
def take(member, total, least):
    """The next share (first, last) of `total` pieces of this phase's work, or an empty one when nothing is left.

    Shares shrink from total / (2 threads) down to `least`: long runs of memory first, and short waits at the end even if cores
    differ in speed. The result does not depend on which thread takes which share.
    """
    threads = member.threads
    ticket = atomic_add(member.sync, 8 * (1 + member.turn[0] % TICKETS), 1)
    first = 0
    while first < total:
        size = max(least, (total - first) // (2 * threads))
        if ticket < threads:
            first = min(first + ticket * size, total)
            return first, min(first + size, total)
        first += threads * size
        ticket -= threads
    return total, total
