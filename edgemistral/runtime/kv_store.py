"""Sequences out of a KV store, and into it: while a prompt is read, a thread writes what is full."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.files import records
from edgemistral.files.kv_store import KVStore
from edgemistral.kernels.kv_layout import SEGMENT
from edgemistral.runtime.segments import Segment, SegmentPool, Sequence

logger = logging.getLogger(__name__)

MOST_WAITING = 16        # segments that are full and not written yet
LAST_WRITES = 10.0       # seconds that `close` waits for them


class _Job(NamedTuple):
    number: int
    ids: NDArray[np.int32]         # up to the segment's end
    data: NDArray[np.uint8]
    held: Segment | None           # nobody writes to it meanwhile


class StoredPrefixes:
    """The store of an engine, which holds its lock for every call but `close`."""

    def __init__(self, store: KVStore, release: Callable[[Segment], None]) -> None:
        """release: gives a segment back that was held while it was written; it takes the engine's lock."""
        self.store, self._release = store, release
        self._queue: queue.Queue[_Job | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._failed = False

    def known(self, ids: NDArray[np.int32]) -> int:
        """Positions of the longest stored prefix, as far as names tell."""
        return SEGMENT * self.store.known(ids)

    def restore(self, pool: SegmentPool, ids: NDArray[np.int32]) -> Sequence:
        """A sequence of as many of the leading ids as are stored and whole: its segments are mapped where they lie."""
        mappings = self.store.load(ids)
        made = Sequence(pool)
        made.begin_with(mappings, ids[: SEGMENT * len(mappings)])
        return made

    def offer(self, sequence: Sequence) -> None:
        """Store what has become full of a sequence since it was offered last; what the thread has no time for now, later."""
        while sequence.offered < sequence.length // SEGMENT and not self._failed and not self._queue.full():
            number = sequence.offered
            segment, ids = sequence.segments[number], sequence.ids[: SEGMENT * (number + 1)].copy()
            if segment.pooled:
                segment.users += 1                 # whoever cuts the sequence then copies it first
                self._queue.put(_Job(number, ids, segment.data, segment))
            else:                                  # a session's: its file is written to whoever uses it
                self._queue.put(_Job(number, ids, segment.data.copy(), None))
            sequence.offered += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="edgemistral-store", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Write what waits, for a while."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(LAST_WRITES)

    def _write(self) -> None:
        while (job := self._queue.get()) is not None:
            parent = self.store.root
            for number in range(job.number):
                parent = records.chain_of(parent, job.ids[SEGMENT * number : SEGMENT * (number + 1)])
            try:
                if not self._failed:
                    self.store.put(job.number, parent, job.ids[SEGMENT * job.number :], job.data)
            except OSError as error:
                self._failed = True
                logger.warning("%s: nothing more is stored: %s", self.store.folder, error.strerror)
            finally:
                if job.held is not None:
                    self._release(job.held)
