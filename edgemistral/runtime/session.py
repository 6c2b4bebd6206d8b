"""The sequence of a session: its segments lie in the session's file, which grows with it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import EdgeMistralError
from edgemistral.files.records import Geometry
from edgemistral.files.session import SessionFile
from edgemistral.kernels.kv_layout import SEGMENT
from edgemistral.runtime.segments import Segment, SegmentPool, Sequence


class SessionFailed(EdgeMistralError):
    """The file cannot be written; what it held before is still valid."""


class FileSequence(Sequence):
    """A sequence whose keys and values stay in a session file. Positions that are cut must not be shared."""

    pinned = True

    def __init__(self, pool: SegmentPool, file: SessionFile) -> None:
        """Begins with what the file holds. SessionFailed: it cannot be mapped."""
        super().__init__(pool)
        self._file = file
        self.notes = self._saved_notes = file.notes          # written at the next `save`
        self.reserve(len(file.ids))
        self.append(file.ids)
        self._saved = True
        if (length := self.continuable(self.length)) < self.length:
            self.cut(length)

    def reserve(self, length: int) -> None:
        """As in `Sequence`, and record the full segments in the file, so that they stay. SessionFailed: the disk is full."""
        try:
            self._seal()
            super().reserve(length)
        except OSError as error:
            raise self._failed(error) from None

    def append(self, ids: NDArray[np.integer]) -> None:
        super().append(ids)
        self._saved = False

    def cut(self, length: int) -> None:
        self._saved = False
        try:
            self._file.forget(length, *self._tail(length))
        except OSError as error:
            raise self._failed(error) from None
        super().cut(length)

    def save(self, notes: str | None = None) -> None:
        """Record all positions and the notes in the file. SessionFailed: they cannot be written."""
        self.notes = self.notes if notes is None else notes
        if self._saved and self.notes == self._saved_notes:
            return
        try:
            self._seal()
            data, ids = self._tail(self.length)
            mapping = self._segments[self.length // SEGMENT].mapping if data is not None else None
            self._file.save(None if mapping is None or data is None else (mapping, data), ids, self.notes)
        except OSError as error:
            raise self._failed(error) from None
        self._saved, self._saved_notes = True, self.notes

    def close(self) -> None:
        """Unlock the file; call `save` first. Its segments must not be shared any more."""
        segments = len(self._segments)
        super().close()
        self._file.close(segments)

    def _seal(self) -> None:
        for number in range(self._file.sealed, self.length // SEGMENT):
            segment, start = self._segments[number], SEGMENT * number
            self._file.seal(number, segment.mapping, segment.data, self.ids[start : start + SEGMENT])

    def _tail(self, length: int) -> tuple[NDArray[np.uint8] | None, NDArray[np.int32]]:
        """Data and ids of the partial segment that a length ends in."""
        ids = self.ids[length - length % SEGMENT : length]
        return (self._segments[length // SEGMENT].data if len(ids) else None), ids

    def _allocate(self, number: int) -> Segment:
        return self.pool.adopt(self._file.map(number))

    def _failed(self, error: OSError) -> SessionFailed:
        return SessionFailed(f"{self._file.path}: cannot be written: {error.strerror or error}; it keeps what it held before")


def geometry_of(pool: SegmentPool) -> Geometry:
    """Where the blocks lie in a pool's segments."""
    layout = pool.layout
    return Geometry(layout.n_layers * layout.n_kv_heads, layout.block_bytes, pool.segment_bytes)
