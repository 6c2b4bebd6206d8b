"""Reads sequences from a KV store and writes them: while a prompt is read, a thread writes the full segments."""

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
    held: Segment | None           # not changed until it is written


class StoredPrefixes:
    """The store of an engine. The engine holds its lock for every call except `close`."""

    def __init__(self, store: KVStore, release: Callable[[Segment], None]) -> None:
        """release: called with a segment after it was written; it takes the engine's lock."""
        self.store, self._release = store, release
        self._queue: queue.Queue[_Job | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._failed = False

    def known(self, ids: NDArray[np.int32]) -> int:
        """Positions of the longest stored prefix, judged by file names only."""
        return SEGMENT * self.store.known(ids)

    def restore(self, pool: SegmentPool, ids: NDArray[np.int32]) -> Sequence:
        """A sequence of the longest stored and valid prefix; its segments are mapped from the store's files."""
        mappings = self.store.load(ids)
        made = Sequence(pool)
        made.begin_with(mappings, ids[: SEGMENT * len(mappings)])
        return made

    def offer(self, sequence: Sequence) -> None:
        """Store the segments that became full since the last offer; if the thread is busy, at a later offer."""
        while sequence.offered < sequence.length // SEGMENT and not self._failed and not self._queue.full():
            number = sequence.offered
            segment, ids = sequence.segments[number], sequence.ids[: SEGMENT * (number + 1)].copy()
            if segment.pooled:
                segment.users += 1                 # a cut of the sequence then copies it first
                self._queue.put(_Job(number, ids, segment.data, segment))
            else:                                  # a session writes to its file even if the segment has other users
                self._queue.put(_Job(number, ids, segment.data.copy(), None))
            sequence.offered += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="edgemistral-store", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Write the waiting segments, for LAST_WRITES seconds at most."""
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
