"""A team of threads that runs one jitted function together: one launch a step, whatever the number of phases inside.

Measured against one `prange` region a phase: a phase of a team costs 0.25 us, a region 2.5 us under omp and 125 us under
workqueue (all that macOS and Windows have), and the team needs no threading layer, survives being called from any thread,
and lets functions compile and cache without `parallel=True`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
import numpy as np

from edgemistral.kernels.team import sync_size


def _bind_yield() -> None:
    """Give `simd.yield_thread` its meaning on this system. By name, so that cached code finds it in every process."""
    if sys.platform == "win32":
        function = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    llvmlite.binding.add_symbol("edgemistral_yield_thread", ctypes.cast(function, ctypes.c_void_p).value)


_bind_yield()


class Team:
    """`threads` threads that stay parked between runs. Not reentrant: the caller holds a lock around `run`."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._workers: list[_Worker] = []
        self._process = 0
        self._running = False
        self._sync = np.zeros(0, np.int64)

    def run(self, function: Any, phases: int, common: Sequence[Any], own: Sequence[Any]) -> None:
        """Call function(rank, threads, sync, *common, own[rank]) on every thread and wait for all of them.

        The function must have code for these types already (see `compile_for`): a thread that cannot start would leave the
        others at their barrier. When an exception (Ctrl-C) ends the wait, the threads go on to the end of the function, and
        the next `run` or `wait` waits for them first.
        """
        self.wait()
        if self._sync.size != sync_size(phases):
            self._sync = np.zeros(sync_size(phases), np.int64)
        self._sync[:] = 0
        if self.threads == 1:
            function(0, 1, self._sync, *common, own[0])
            return
        if self._process != os.getpid():      # threads do not survive a fork
            self._process, self._workers = os.getpid(), [_Worker(rank) for rank in range(self.threads)]
        self._running = True
        for rank, worker in enumerate(self._workers):
            worker.start(function, (rank, self.threads, self._sync, *common, own[rank]))
        self.wait()

    def wait(self) -> None:
        """Until no thread runs any more."""
        if self._running and self._process == os.getpid():
            for worker in self._workers:
                worker.wait()
        self._running = False

    def close(self) -> None:
        """End the threads."""
        self.wait()
        for worker in self._workers:
            worker.start(None, ())
        self._workers = []
        self._process = 0


class _Worker:
    """A daemon thread with a slot for one call."""

    def __init__(self, rank: int) -> None:
        self._call: tuple[Callable[..., Any] | None, tuple[Any, ...]] = (None, ())
        self._go, self._idle = threading.Lock(), threading.Event()
        self._go.acquire()
        self._idle.set()
        threading.Thread(target=self._loop, name=f"edgemistral-{rank}", daemon=True).start()

    def start(self, function: Callable[..., Any] | None, arguments: tuple[Any, ...]) -> None:
        self._call = function, arguments
        self._idle.clear()
        self._go.release()

    def wait(self) -> None:
        self._idle.wait()

    def _loop(self) -> None:
        while True:
            self._go.acquire()
            function, arguments = self._call
            if function is None:
                return
            try:
                function(*arguments)
            finally:
                self._call = (None, ())
                del function, arguments      # a parked thread keeps no mapping alive
                self._idle.set()


def compile_for(function: Any, arguments: Sequence[Any]) -> None:
    """Load from the cache, or compile, the code for these arguments, without running it."""
    from numba import typeof

    function.compile(tuple(typeof(argument) for argument in arguments))  # type: ignore[no-untyped-call]
