"""A folder of KV segments, found by prefix: one file for each, named by a hash of all ids up to its end.

    DIR/MODEL/CHAIN.kv    MODEL: `records.root_of` the model and its KV format; CHAIN: `records.chain_of` the segment's ids and
                          all ids before. The bytes are those of a segment in a session file: data, and a record at the end

A file is written under another name, synced, renamed, and never written again. It describes itself, so there is no index that
could be lost. Each use sets the modification time of the file and of the segments before it. Over the quota, the file unused
for longest that no other file continues is deleted: the beginning of a prompt outlives its end. A file whose checksum does not
match is deleted when it is found. Nothing else is deleted, except files that a killed process left half written.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import BadInput
from edgemistral.files import lost, records, regular
from edgemistral.files.records import RECORD, SEGMENT, TRAILER, Geometry, Record

NAME = re.compile(r"[0-9a-f]{64}\.kv")
PARTIAL = ".partial"
ABANDONED = 3600.0     # seconds
SPARE = 1 << 28        # bytes of the disk that the store leaves free


@dataclass
class Stored:
    """One file of the store."""

    path: Path
    size: int
    used: int            # nanoseconds: when it was used last
    parent: bytes        # chain of the segment before it; b"" if the file does not say

    @property
    def chain(self) -> bytes:
        return bytes.fromhex(self.path.stem)


class KVStore:
    """The segments of one model in a store, which may hold others, and be used by other processes at the same time."""

    def __init__(self, folder: Path, root: bytes, geometry: Geometry, quota: int) -> None:
        """quota: bytes of all files in the store. BadInput: the folder cannot be used."""
        self.folder, self.root, self.geometry, self.quota = folder, root, geometry, quota
        self._own = folder / root.hex()
        self._parents: dict[Path, bytes] = {}        # a cache: files never change
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._own.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise BadInput(f"{folder}: cannot be the folder of a KV store: {error.strerror}") from None

    def known(self, ids: NDArray[np.int32]) -> int:
        """How many segments of `ids` are stored, judged by file names only."""
        chain, n = self.root, 0
        while SEGMENT * (n + 1) <= len(ids):
            chain = records.chain_of(chain, ids[SEGMENT * n : SEGMENT * (n + 1)])
            if not self._path(chain).exists():
                break
            n += 1
        return n

    def load(self, ids: NDArray[np.int32]) -> list[mmap.mmap]:
        """Read-only mappings of the leading segments of a prompt that are stored and valid; marks them as used now."""
        chain, made = self.root, []
        for number in range(len(ids) // SEGMENT):
            part = ids[SEGMENT * number : SEGMENT * (number + 1)]
            parent, chain = chain, records.chain_of(chain, part)
            path = self._path(chain)
            mapping = self._load(path, Record(number, parent, part, ()))
            if mapping is None:
                break
            made.append(mapping)
            with contextlib.suppress(OSError):
                os.utime(path)
        return made

    def has(self, parent: bytes, ids: NDArray[np.int32]) -> bool:
        """Whether a segment is stored; marks it as used now."""
        try:
            os.utime(self._path(records.chain_of(parent, ids)))
        except OSError:
            return False
        return True

    def put(self, number: int, parent: bytes, ids: NDArray[np.int32], data: NDArray[np.uint8]) -> bool:
        """Store a full segment unless it is there. OSError: it cannot be written.

        False: the quota or the disk has no room, or the segment before it is not stored, so that it would never be found.
        """
        if self.has(parent, ids):
            return True
        if number and not self._path(parent).exists():
            return False
        if not self._make_room(parent):
            return False
        path = self._path(records.chain_of(parent, ids))
        record = Record(number, parent, ids, records.digests_of(data, self.geometry))
        trailer = records.encode(record)
        stride, size = self.geometry.stride, self.geometry.data_bytes
        file, name = tempfile.mkstemp(PARTIAL, f".{os.getpid()}-", self._own)         # 0600
        try:
            with os.fdopen(file, "wb") as out:
                out.write(data[:size].data)
                out.write(bytes(stride - TRAILER - size) + trailer + bytes(TRAILER - RECORD))
                out.flush()
                os.fsync(out.fileno())
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
        return True

    def files(self) -> list[Stored]:
        """All files of the store, of other models too."""
        found = []
        for folder in self.folder.iterdir():
            if not folder.is_dir():
                continue
            for path in folder.iterdir():
                with contextlib.suppress(OSError):      # deleted meanwhile
                    stat = path.stat()
                    if NAME.fullmatch(path.name):
                        found.append(Stored(path, stat.st_size, stat.st_mtime_ns, self._parent(path, stat.st_size)))
                    elif path.name.endswith(PARTIAL) and time.time() - stat.st_mtime > ABANDONED:
                        path.unlink()                   # left by a process that was killed while it wrote
        return found

    def _load(self, path: Path, wanted: Record) -> mmap.mmap | None:
        """Map a file if it is the wanted segment and valid; otherwise delete it."""
        try:
            with regular.reading(path, BadInput) as file:
                if os.fstat(file.fileno()).st_size != self.geometry.stride:
                    raise ValueError
                mapping = mmap.mmap(file.fileno(), self.geometry.stride, access=mmap.ACCESS_READ)
                lost.watch(mapping, path)
        except (BadInput, OSError):      # deleted, or not a file
            return None
        except ValueError:
            self._delete(path)
            return None
        record = records.decode(mapping[self.geometry.stride - TRAILER :][:RECORD])
        if (
            record is None or (record.number, record.parent) != (wanted.number, wanted.parent)
            or not np.array_equal(record.ids, wanted.ids)
            or records.intact(record, np.frombuffer(mapping, np.uint8), self.geometry) < SEGMENT
        ):
            self._delete(path)
            return None
        return mapping

    def _make_room(self, parent: bytes) -> bool:
        """Delete files until one more segment fits, but never those before the new one."""
        stride, files = self.geometry.stride, self.files()
        room = self.quota - sum(file.size for file in files)
        if stride > self.quota or shutil.disk_usage(self._own).free < stride + SPARE:
            return False
        if room >= stride:
            return True
        before = self._ancestors(parent)
        while room < stride:
            continued = {file.parent for file in files}
            ends = [file for file in files if file.chain not in continued and file.path not in before]
            if not ends:
                return False
            oldest = min(ends, key=lambda file: file.used)
            self._delete(oldest.path)
            files.remove(oldest)
            room += oldest.size
        return True

    def _ancestors(self, chain: bytes) -> set[Path]:
        """The files of a segment and of all before it."""
        found: set[Path] = set()
        while chain and (path := self._path(chain)) not in found and path.exists():
            found.add(path)
            chain = self._parent(path, self.geometry.stride)
        return found

    def _parent(self, path: Path, size: int) -> bytes:
        if path not in self._parents:
            parent = b""
            with contextlib.suppress(BadInput, OSError), regular.reading(path, BadInput) as file:
                file.seek(max(0, size - TRAILER))
                record = records.decode(file.read(RECORD))
                parent = b"" if record is None else record.parent
            self._parents[path] = parent
        return self._parents[path]

    def _delete(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
        self._parents.pop(path, None)

    def _path(self, chain: bytes) -> Path:
        return self._own / f"{chain.hex()}.kv"
