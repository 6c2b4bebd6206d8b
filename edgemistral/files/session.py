"""A session file: the KV cache of one conversation, used by mapping, with the records that make it safe to continue.

    0                 header: "edgemistral session\\n", the format's version and the length of what follows as two uint32,
                      JSON, and the BLAKE2b (32 bytes) of everything before. It names the model, tokenizer, template and KV
                      format of the file, and the places of the rest
    64 KiB            slot 0, then slot 1, each `slot_bytes` long: the state at the end of a turn. "KVSTATE\\n",
                      a counter and the length of the notes as two uint64, the record (`files.records`) of the last, partial
                      segment, the notes (zlib), and the BLAKE2b of everything before. The slots take turns
    start             the segments, `stride` bytes each, in the layout of the KV cache. The record of a full segment stands at
                      its end

All numbers are little-endian. The order of writes guarantees a valid prefix after a crash, a power loss or a full disk:

* A full segment is on the disk before its record is written, the partial one before its slot is.
* Records and slots contain a checksum of themselves, and checksums of the data. A reader takes the segments in turn while all
  of these match, then the newest slot that continues them. If a partial segment grew after its slot was written, its unchanged
  blocks of 64 positions are valid.
* Before recorded positions are overwritten, the slots and records with them are replaced on the disk.

The file is for its owner only (0600) and locked while it is open.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import BadSession
from edgemistral.files import records
from edgemistral.files.disk import Disk, put_in_place
from edgemistral.files.records import RECORD, SEGMENT, TRAILER, Geometry, Record
from edgemistral.files.session_header import (
    DIGEST,
    GRANULE,
    HEAD,
    MAGIC,
    STATE,
    STATE_MAGIC,
    VERSION,
    Header,
    State,
    check,
    digest_of,
    encode_state,
    is_session,
    read_header,
    slot_bytes_of,
)

CHECKERS = 4                  # threads that compare checksums
MAX_NOTES = 1 << 28           # bytes of notes, unpacked


class SessionFile:
    """An open session file with its content, `ids` and `notes`. Not thread-safe.

    cut_back: one line if not everything up to the end of the last turn was valid, or "".
    """

    def __init__(self, disk: Disk, header: Header) -> None:
        """Use `SessionFile.open`."""
        self.disk, self.header = disk, header
        self.path, self.geometry = disk.path, header.geometry
        self.ids: NDArray[np.int32] = np.zeros(0, np.int32)
        self.notes = self.cut_back = ""
        self._chains = [records.root_of(header.binding)]     # before segment 0, 1, ..., for all that have records
        self._counter = 1
        self._saved = 0                                      # positions in slots and records

    @classmethod
    def open(
        cls, path: Path, binding: Mapping[str, Any], geometry: Geometry, context: int, model: str = ""
    ) -> SessionFile:
        """Open a session, or make one if there is no file or an empty one.

        BadSession: it belongs to another model or KV format, has a damaged header, is newer, in use, or cannot be opened.
        """
        path = Path(path)
        header = Header(dict(binding), model, geometry, slot_bytes_of(context))
        disk = Disk.open(path) if path.exists() else None
        if disk is None or not disk.size:
            if disk is not None:
                disk.close()
            disk = put_in_place(path, lambda new: _begin(new, header))
            return cls(disk, header)
        try:
            found = read_header(disk)
            check(path, found, header)
            made = cls(disk, found)
            made._recover()
        except OSError as error:
            disk.close()
            raise BadSession(f"{path}: cannot be read: {error.strerror}") from None
        except BaseException:
            disk.close()
            raise
        return made

    @classmethod
    def inspect(cls, path: Path) -> SessionFile:
        """Open a session of any model and check all of it, without changes. Raises as `open` does."""
        disk = Disk.open(Path(path))
        try:
            made = cls(disk, read_header(disk))
            made._find()
        except OSError as error:
            disk.close()
            raise BadSession(f"{path}: cannot be read: {error.strerror}") from None
        except BaseException:
            disk.close()
            raise
        return made

    @property
    def sealed(self) -> int:
        """How many full segments are recorded."""
        return len(self._chains) - 1

    @property
    def segments(self) -> int:
        """How many segments the file has room for."""
        return max(0, (self.disk.size - self.header.start) // self.geometry.stride)

    def map(self, number: int) -> mmap.mmap:
        """Map a segment; the next one is made. OSError: the disk is full; the file is unchanged."""
        self.disk.grow(self._at(number + 1))
        return self.disk.map(self._at(number), self.geometry.stride)

    def seal(self, number: int, mapping: mmap.mmap, data: NDArray[np.uint8], ids: NDArray[np.int32]) -> None:
        """Record segment `number`, the next after those recorded; ids (256,). The record may reach the disk later."""
        record = Record(number, self._chains[number], ids, records.digests_of(data, self.geometry))
        self.disk.flush(mapping)
        self.disk.sync()
        self._write_trailer(number, records.encode(record))
        self._chains = [*self._chains[: number + 1], records.chain_of(record.parent, ids)]
        self._saved = SEGMENT * (number + 1)

    def save(self, tail: tuple[mmap.mmap, NDArray[np.uint8]] | None, ids: NDArray[np.int32], notes: str) -> None:
        """Record the partial segment's positions, `ids`, and the notes; all full segments must be sealed.

        tail: mapping and data of the segment, None if it has no positions. Notes that do not fit are left out.
        """
        number = self.sealed
        digests: tuple[bytes, ...] = ()
        if tail is not None:
            mapping, data = tail
            digests = records.digests_of(data, self.geometry, records.blocks_of(len(ids)))
            self.disk.flush(mapping)
            self.disk.sync()
        self.notes = notes
        self._write_state(Record(number, self._chains[-1], ids, digests))
        self.disk.sync()
        self._saved = SEGMENT * number + len(ids)

    def forget(self, length: int, tail: NDArray[np.uint8] | None, ids: NDArray[np.int32]) -> None:
        """Record at most `length` positions, on the disk too. ids, tail: of the partial segment that is then the last.

        Call it before any position from `length` on is overwritten.
        """
        if length >= self._saved:
            return
        self._chains = self._chains[: length // SEGMENT + 1]
        self._count(tail, ids)
        self._saved = length

    def close(self, segments: int | None = None) -> None:
        """Unlock the file. segments: how many it keeps room for; the others must not be used any more."""
        if segments is not None:
            self.disk.shrink(self._at(segments))
        self.disk.close()

    # ---- reading ------------------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Find the valid part, and make sure that the rest is never used again."""
        states = self._find()
        if self.cut_back or len(self.ids) != states[0].positions:
            tail = self.ids[SEGMENT * self.sealed :]
            buffer = np.empty(self.geometry.data_bytes, np.uint8)
            self.disk.read_into(self._at(self.sealed), memoryview(buffer.data))
            self._count(buffer if len(tail) else None, tail)

    def _find(self) -> list[State]:
        """Set `ids`, `notes` and `cut_back`; returns the slots that can be read, newest first."""
        slots = [self._state(slot) for slot in (0, 1)]
        states = sorted(filter(None, slots), key=lambda state: -state.counter)
        torn = any(state is None and self._used(slot) for slot, state in enumerate(slots))
        full = self._full()
        goods = self._all_intact(full)
        whole = all(good == SEGMENT for good in goods)
        if not whole:
            bad = next(n for n, good in enumerate(goods) if good < SEGMENT)
            full, goods, self._chains = full[: bad + 1], goods[: bad + 1], self._chains[: bad + 1]
        found = [record.ids[:good] for record, good in zip(full, goods, strict=True)]
        if whole:
            found.append(self._tail(states, self.sealed))
        self.ids = np.concatenate([np.zeros(0, np.int32), *found])
        self._saved = len(self.ids)
        if states:
            self._counter = states[0].counter
            with contextlib.suppress(zlib.error, UnicodeDecodeError):
                self.notes = zlib.decompressobj().decompress(states[0].notes, MAX_NOTES).decode()
        expected = states[0].positions if states else 0
        if len(self.ids) < expected or not whole or not states or torn:
            had = f" of {expected}" if expected > len(self.ids) else ""
            self.cut_back = f"{self.path}: continues from {len(self.ids)}{had} tokens: the rest is damaged or was never written"
        return states

    def _full(self) -> list[Record]:
        """The records of the full segments, as long as each continues the one before; notes their chains."""
        found: list[Record] = []
        for number in range(self.segments):
            record = self._trailer(number)
            if record is None or record.number != number or record.parent != self._chains[-1] or len(record.ids) < SEGMENT:
                break
            found.append(record)
            self._chains.append(records.chain_of(record.parent, record.ids))
        return found

    def _all_intact(self, full: list[Record]) -> list[int]:
        """How many positions of each full segment are undamaged; two gigabytes take a few tenths of a second."""
        workers = min(CHECKERS, os.cpu_count() or 1, len(full)) if self.disk.reads_at_once else 1
        buffers = [np.empty(self.geometry.data_bytes, np.uint8) for _ in range(max(1, workers))]

        def compare(worker: int) -> list[int]:
            return [self._intact(record.number, record, buffers[worker]) for record in full[worker::workers]]

        if workers <= 1:
            return [self._intact(record.number, record, buffers[0]) for record in full]
        goods = [0] * len(full)
        with ThreadPoolExecutor(workers) as threads:
            for worker, found in enumerate(threads.map(compare, range(workers))):
                goods[worker::workers] = found
        return goods

    def _tail(self, states: list[State], number: int) -> NDArray[np.int32]:
        """The longest partial segment with valid data that continues the full ones."""
        best, buffer = np.zeros(0, np.int32), np.empty(self.geometry.data_bytes, np.uint8)
        for state in states:
            record = state.record
            if record.number == number and record.parent == self._chains[-1] and number < self.segments:
                good = self._intact(number, record, buffer)
                if good > len(best):
                    best = record.ids[:good]
        return best

    def _intact(self, number: int, record: Record, buffer: NDArray[np.uint8]) -> int:
        try:
            read = self.disk.read_into(self._at(number), memoryview(buffer.data))
        except OSError:                # a read error of the disk
            read = 0
        return records.intact(record, buffer, self.geometry) if read == len(buffer) else 0

    def _trailer(self, number: int) -> Record | None:
        try:
            return records.decode(self.disk.read(self._at(number + 1) - TRAILER, RECORD))
        except OSError:
            return None

    def _used(self, slot: int) -> bool:
        return any(self.disk.read(self._slot_at(slot), STATE.size))

    def _state(self, slot: int) -> State | None:
        at = self._slot_at(slot)
        head = self.disk.read(at, STATE.size)
        if len(head) < STATE.size:
            return None
        magic, counter, size = STATE.unpack(head)
        if magic != STATE_MAGIC or size > self.header.slot_bytes:
            return None
        rest = self.disk.read(at + STATE.size, RECORD + size + DIGEST)
        body, digest = head + rest[: RECORD + size], rest[RECORD + size :]
        record = records.decode(rest)
        if record is None or digest_of(body) != digest:
            return None
        return State(counter, record, rest[RECORD : RECORD + size])

    # ---- writing ------------------------------------------------------------------------------------------------------

    def _count(self, tail: NDArray[np.uint8] | None, ids: NDArray[np.int32]) -> None:
        """Record exactly the sealed segments and the `ids` after them, whose data is `tail`."""
        digests = () if tail is None else records.digests_of(tail, self.geometry, records.blocks_of(len(ids)))
        self._write_state(Record(self.sealed, self._chains[-1], ids, digests))
        self.disk.sync()                                     # one of the slots is always valid
        self.disk.write(self._slot_at(self._counter + 1), bytes(STATE.size))
        self._forget_trailers(self.sealed)
        self.disk.sync()

    def _write_state(self, record: Record) -> None:
        self._counter += 1
        state = State(self._counter, record, zlib.compress(self.notes.encode(), 6))
        if STATE.size + RECORD + len(state.notes) + DIGEST > self.header.slot_bytes:
            state = state._replace(notes=zlib.compress(b""))
        self.disk.write(self._slot_at(self._counter), encode_state(state))

    def _write_trailer(self, number: int, data: bytes) -> None:
        self.disk.write(self._at(number + 1) - TRAILER, data)

    def _forget_trailers(self, first: int) -> None:
        for number in range(first, self.segments):
            if self._trailer(number) is not None:
                self._write_trailer(number, bytes(RECORD))

    def _slot_at(self, counter: int) -> int:
        return GRANULE + counter % 2 * self.header.slot_bytes

    def _at(self, number: int) -> int:
        return self.header.start + number * self.geometry.stride


def summary(path: Path) -> tuple[Header, int]:
    """The header of a session, and its tokens at the end of its last turn. The file may be in use.

    BadSession: it is not a session, is newer, or has a damaged header.
    """
    disk = Disk.open(path, lock=False)
    try:
        file = SessionFile(disk, read_header(disk))
        return file.header, max((state.positions for state in map(file._state, (0, 1)) if state is not None), default=0)
    except OSError as error:
        raise BadSession(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        disk.close()


def _begin(disk: Disk, header: Header) -> None:
    """Write everything before the first segment of a session."""
    fields = {**header.geometry._asdict(), "binding": header.binding, "model": header.model, "slot_bytes": header.slot_bytes}
    text = json.dumps(fields).encode()
    head = HEAD.pack(MAGIC, VERSION, len(text)) + text
    disk.grow(header.start)
    disk.write(0, head + digest_of(head))
    nothing = State(1, Record(0, records.root_of(header.binding), np.zeros(0, np.int32), ()), zlib.compress(b""))
    disk.write(GRANULE + header.slot_bytes, encode_state(nothing))


def delete(path: Path) -> None:
    """Delete a session that is not open. BadSession: it is not a session, is in use, or cannot be deleted."""
    if not is_session(path):
        raise BadSession(f"{path}: not a session file; it was left as it is")
    disk = Disk.open(path)
    try:
        if os.name == "nt":
            disk.close()
        path.unlink()
    except OSError as error:
        raise BadSession(f"{path}: cannot be deleted: {error.strerror}") from None
    finally:
        disk.close()
