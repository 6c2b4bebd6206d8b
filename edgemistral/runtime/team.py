"""A team of threads that runs one jitted function together: one launch for each step, with any number of phases inside.

Measured: a phase of a team costs 0.25 us; a `prange` region for each phase costs 2.5 us under omp and 125 us under workqueue
(the only choice on macOS and Windows). Also, the team needs no threading layer, may be called from any thread, and lets
functions compile and cache without `parallel=True`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from edgemistral.kernels.lowering import INTERPRET
from edgemistral.kernels.sync import SYNC_SIZE, Member


class Team:
    """`threads` threads that stay parked between runs. Not reentrant: the caller holds a lock around `run`."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._inboxes: list[SimpleQueue[_Call | None]] = []
        self._process = 0
        self._calls: list[_Call] = []      # of the current run, one for each thread
        self._sync = np.zeros(SYNC_SIZE, np.int64)
        self._members = [Member(rank, threads, self._sync, np.zeros(1, np.int64)) for rank in range(threads)]

    def run(self, function: Any, common: Sequence[Any], own: Sequence[Any]) -> None:
        """Call function(member, *common, own[rank]) on every thread and wait for all of them.

        The function must have code for these types already (see `compile_for`): a thread that cannot start would leave the
        others at their barrier. When an exception (Ctrl-C) ends the wait, the threads go on to the end of the function, and
        the next `run` or `wait` waits for them first.
        """
        self.wait()
        self._sync[:] = 0
        for member in self._members:
            member.turn[0] = 0
        if self.threads == 1:
            function(self._members[0], *common, own[0])
            return
        if self._process != os.getpid():      # threads do not survive a fork
            inboxes: list[SimpleQueue[_Call | None]] = [SimpleQueue() for _ in range(self.threads)]
            for rank, inbox in enumerate(inboxes):
                threading.Thread(target=_work, args=(inbox,), name=f"edgemistral-{rank}", daemon=True).start()
            self._inboxes, self._process = inboxes, os.getpid()
        self._calls = [_Call(function, (member, *common, own[member.rank])) for member in self._members]
        self.wait()

    @property
    def progress(self) -> int:
        """How far the current or last run is: what its function reported last, 0 before."""
        return int(self._sync[1])

    def wait(self) -> None:
        """Wait until no thread runs.

        An exception may end this anywhere, even after calls were posted to only some of the threads, which then wait at a
        barrier for the others. So a new call starts from the beginning, and threads skip calls that they have done.
        """
        if self._process == os.getpid():
            for inbox, call in zip(self._inboxes, self._calls, strict=False):
                inbox.put(call)
            for call in self._calls:
                call.done.wait()
        self._calls = []

    def close(self) -> None:
        """End the threads."""
        self.wait()
        for inbox in self._inboxes:
            inbox.put(None)
        self._inboxes, self._process = [], 0


class _Call:
    """The work of one thread in one run."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments, self.done = function, arguments, threading.Event()


def _work(inbox: SimpleQueue[_Call | None]) -> None:
    """The main function of a thread."""
    while (call := inbox.get()) is not None:
        if not call.done.is_set():
            try:
                call.function(*call.arguments)
            finally:
                call.arguments = ()      # a parked thread keeps no mapping alive
                call.done.set()


def compile_for(function: Any, common: Sequence[Any], own: Any) -> None:
    """Load from the cache, or compile, the code that `Team.run` needs for these arguments, without running it."""
    if INTERPRET:
        return
    from numba import typeof

    arguments = (Member(0, 1, np.zeros(SYNC_SIZE, np.int64), np.zeros(1, np.int64)), *common, own)
    function.compile(tuple(typeof(argument) for argument in arguments))  # type: ignore[no-untyped-call]
