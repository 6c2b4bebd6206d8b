"""What the threads of a team share while they run one jitted function together: barriers, and who takes which work.

`sync` is an int64 array that is all zeros before a run. A function counts its phases 0, 1, 2, ...; `sync[0]` counts
arrivals at barriers, `sync[8 (1 + phase)]` hands out the work of that phase, each in a cache line of its own.
"""

from __future__ import annotations

from edgemistral.kernels.jit import inner
from edgemistral.kernels.simd import atomic_add, atomic_load, pause, yield_thread

SPINS = 4000    # of waiting before a thread lets others run: some 50 us, longer than any wait with a core for every thread


def sync_size(phases: int) -> int:
    """Elements of `sync` for a function of so many phases."""
    return 8 * (phases + 1)


@inner
def barrier(sync, phase, threads):
    """Wait until every thread has come to the end of this phase."""
    atomic_add(sync, 0, 1)
    spins = 0
    while atomic_load(sync, 0) < (phase + 1) * threads:
        pause()
        spins += 1
        if spins > SPINS:
            yield_thread()


@inner
def take(sync, phase, threads, total, least):
    """The next share (first, last) of `total` pieces of work, or an empty one when nothing is left.

    Shares shrink from total / (2 threads) down to `least`: long runs of memory at first, and a small one to wait for at the
    end, whatever the speed of each core. Who takes which share changes no result.
    """
    ticket = atomic_add(sync, 8 * (phase + 1), 1)
    first = 0
    while first < total:
        size = max(least, (total - first) // (2 * threads))
        if ticket < threads:
            first = min(first + ticket * size, total)
            return first, min(first + size, total)
        first += threads * size
        ticket -= threads
    return total, total
