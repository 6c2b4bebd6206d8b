"""The KV cache: segments of 256 positions, each in a separate mapping, and the sequences made of them.

A segment holds the keys and values of 256 positions for all layers and KV heads: for each of them four blocks of 64
positions, in the order in which attention reads them (`kernels.attention` describes a block's bytes). Each segment lies in a
temporary file without a name, which is mapped when it is made and never moves. If memory is short, the system writes pages
back and drops them: 32768 tokens of a 7B are 2.1 GiB in 8 bits, and only the pages in use need to be in memory.

A `Sequence` is token ids and segments. Sequences with a common prefix share its full segments; the last, partial one is copied.
With a 4-bit cache it also has, in ordinary memory, an 8-bit copy of the block of 64 positions that it ends in (see
`kernels.attention`). Without that copy it can only continue from the beginning of the block.
The segments of a session lie in the session's file (`runtime.session`).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.errors import BadRequest
from edgemistral.files.layout import round_up
from edgemistral.kernels.addresses import address_of
from edgemistral.kernels.kv_layout import KV_FORMATS, OWN_BITS, POSITIONS, SEGMENT, SEGMENT_BLOCKS, block_bytes, kv_layout
from edgemistral.paths import cache_dir
from edgemistral.runtime.memory import physical_memory

GRANULE = 1 << 16      # offsets of mappings are multiples of this: the allocation granularity of Windows
PADDING = 4096         # behind a segment: kernels load whole vectors at its end
SPARE = 1 << 28        # bytes of unused segments that are kept for new ones; the rest is given back to the disk
KV_BITS = tuple(KV_FORMATS)


def segment_bytes(config: ModelConfig, kv_bits: int) -> int:
    """Bytes that one segment takes in the file."""
    blocks = config.n_layers * config.n_kv_heads * SEGMENT_BLOCKS
    return round_up(blocks * block_bytes(config.head_dim, kv_bits) + PADDING, GRANULE)


def own_block_bytes(config: ModelConfig, kv_bits: int) -> int:
    """Bytes of the copy of one block for all layers and heads; 0 for formats without."""
    own = OWN_BITS.get(kv_bits, 0)
    return config.n_layers * config.n_kv_heads * block_bytes(config.head_dim, own) + PADDING if own else 0


def segments_of(positions: int) -> int:
    """How many segments hold this many positions."""
    return (positions + SEGMENT - 1) // SEGMENT


def default_kv_budget() -> int:
    """Bytes for the sequences that are kept: a quarter of the memory, and at most half of the free disk."""
    folder = _folder()
    while not folder.exists():
        folder = folder.parent
    return min(physical_memory() // 4, shutil.disk_usage(folder).free // 2)


def _folder() -> Path:
    return cache_dir() / "kv"


class Segment:
    """One mapping. `users`: how many sequences use it. `frozen`: it is never written to. `pooled`: it may be used again for
    another sequence; False for a mapping of a session's or the store's file."""

    def __init__(self, mapping: mmap.mmap, pooled: bool = False, frozen: bool = False) -> None:
        self.mapping, self.pooled, self.frozen = mapping, pooled, frozen
        _prefer_large_pages(mapping)
        self.data: NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
        self.address = address_of(self.data)
        self.users = 1


class SegmentPool:
    """All segments of one model. Nothing of them stays behind, even at a crash. Not thread-safe: the caller holds a lock."""

    def __init__(self, config: ModelConfig, kv_bits: int = 8, budget: int | None = None) -> None:
        """budget: bytes, for `capacity`; None means `default_kv_budget()`."""
        if kv_bits not in KV_FORMATS:
            raise BadRequest(f"kv_bits is {kv_bits!r}, must be one of {', '.join(map(str, KV_BITS))}", "kv_bits")
        self.layout = kv_layout(kv_bits, config.head_dim, config.n_layers, config.n_kv_heads)
        self.own_block_bytes = own_block_bytes(config, kv_bits)
        self.segment_bytes = segment_bytes(config, kv_bits)
        self.budget = default_kv_budget() if budget is None else budget
        # In segments. The caller checks it before `allocate`.
        self.capacity = max(1, min(self.budget // self.segment_bytes, most_mappings()))
        self.used = 0
        self._made = 0                       # segments in use or free, but for those of other files
        self._free: list[Segment] = []
        self._spare = max(1, SPARE // self.segment_bytes)

    @property
    def file_bytes(self) -> int:
        """Bytes that the temporary files take on the disk now."""
        return self._made * self.segment_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the segments in use."""
        return self.used * self.segment_bytes

    def allocate(self) -> Segment:
        """A segment with one user. Its bytes are zeros, or left from earlier use.

        OSError: the disk is full; nothing else changed.
        """
        segment = self._free.pop() if self._free else self._make()
        segment.users = 1
        self.used += 1
        return segment

    def adopt(self, mapping: mmap.mmap, frozen: bool = False) -> Segment:
        """A segment with one user in a mapping of another file. It counts as used, and is never allocated again."""
        self.used += 1
        return Segment(mapping, frozen=frozen)

    def release(self, segment: Segment) -> None:
        """Remove one user. Without users the segment may be allocated again, or is unmapped: no step may work on it."""
        segment.users -= 1
        if segment.users == 0:
            self.used -= 1
            if segment.pooled:
                self._free.append(segment)
                if len(self._free) > self._spare:
                    del self._free[0]      # the one that was free for longest
                    self._made -= 1

    def copy(self, segment: Segment, positions: int) -> Segment:
        """A new segment with the first `positions` positions of another."""
        made = self.allocate()
        self.copy_into(made, segment, positions)
        return made

    def copy_into(self, to: Segment, segment: Segment, positions: int) -> None:
        """Copy the first `positions` positions of a segment, in whole blocks."""
        layout = self.layout
        shape = (layout.n_layers * layout.n_kv_heads, SEGMENT_BLOCKS, layout.block_bytes)
        size, blocks = int(np.prod(shape)), (positions + POSITIONS - 1) // POSITIONS
        to.data[:size].reshape(shape)[:, :blocks] = segment.data[:size].reshape(shape)[:, :blocks]

    def close(self) -> None:
        """Unmap the unused segments."""
        self._free, self._made = [], 0

    def _make(self) -> Segment:
        """A segment in a file of its own. In a common file, one large page can hold a segment's end and the next one's begin:
        while one is in use, the room of the other could not be given back for good."""
        folder = _folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:      # the mapping keeps it
                os.truncate(file.fileno(), self.segment_bytes)
                _take_room(file.fileno(), self.segment_bytes)
                mapping = mmap.mmap(file.fileno(), self.segment_bytes)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from None
        self._made += 1
        return Segment(mapping, pooled=True)


def _take_room(file: int, size: int) -> None:
    """Allocate the disk space of a file now: a full disk is then an error here instead of a SIGBUS in a kernel."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):      # otherwise the file system does not support it
                raise


def most_mappings() -> int:
    """How many segments may be mapped: Python keeps a file open for each mapping, and the number of open files is limited."""
    try:
        import resource
    except ImportError:      # Windows: millions
        return 1 << 20
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(64, soft // 2)


def _prefer_large_pages(mapping: mmap.mmap) -> None:
    """Ask for pages of 2 MB: attention over a long cache takes 5 % less time. Linux gives them if the file system can."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)


class Row(NamedTuple):
    """One sequence's part of a step: the ids that follow it, and how many of them, at the end, need logits.

    A prompt's chunk is a row of many ids, decoding a row of one, a draft to verify a row of 1 + k ids with 1 + k logits.
    """

    sequence: Sequence
    ids: NDArray[np.integer]
    n_logits: int


class Sequence:
    """Token ids whose keys and values are in the cache: `ids` (length,) and the segments that hold them."""

    pinned = False    # if True, never evicted, and only tasks that name it write to it

    def __init__(self, pool: SegmentPool) -> None:
        self.pool, self.length = pool, 0
        self.offered = 0                      # how many full segments were offered to the store
        self.addresses: NDArray[np.int64] = np.zeros(0, np.int64)   # of the segments
        self._segments: list[Segment] = []
        self._ids = np.zeros(SEGMENT, np.int32)
        self._own_blocks: dict[int, NDArray[np.uint8]] = {}         # copies, by the block's number

    @property
    def ids(self) -> NDArray[np.int32]:
        """The ids of the positions 0 ... length - 1; a view."""
        return self._ids[: self.length]

    @property
    def room(self) -> int:
        """How many positions its segments have room for."""
        return SEGMENT * len(self._segments)

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in all. OSError: the disk is full; the sequence is unchanged."""
        made: list[Segment] = []
        try:
            while self.room + SEGMENT * len(made) < length:
                made.append(self._allocate(len(self._segments) + len(made)))
        except BaseException:
            for segment in made:
                self.pool.release(segment)
            raise
        if made:
            self._own([*self._segments, *made])
        if len(self._ids) < length:
            grown = np.zeros(round_up(2 * length, SEGMENT), np.int32)
            grown[: self.length] = self.ids
            self._ids = grown

    def own_blocks(self, n: int) -> NDArray[np.int64]:
        """Addresses (n,) of the copies of the blocks that the next n positions lie in; zeros for formats without."""
        if not (size := self.pool.own_block_bytes):
            return np.zeros(n, np.int64)
        numbers = np.arange(self.length, self.length + n) // POSITIONS
        if self.continuable(self.length) < self.length:
            raise ValueError(f"position {self.length} lies in a block whose copy is gone")
        old = {number: self._own_blocks.get(number) for number in range(numbers[0], numbers[-1] + 1)}
        self._own_blocks = {number: np.zeros(size, np.uint8) if had is None else had for number, had in old.items()}
        return np.array([address_of(self._own_blocks[int(number)]) for number in numbers], np.int64)

    def continuable(self, length: int) -> int:
        """The most of its first `length` positions that it, or a fork, can go on from."""
        if not self.pool.own_block_bytes or not length % POSITIONS or length // POSITIONS in self._own_blocks:
            return length
        return length - length % POSITIONS

    def drop_own_blocks(self) -> None:
        """Give back the memory of the copies."""
        self._own_blocks = {}

    def append(self, ids: NDArray[np.integer]) -> None:
        """Add ids whose keys and values are already in the segments; there must be room."""
        end = self.length + len(ids)
        self._ids[self.length : end] = ids
        self.length = end

    def cut(self, length: int) -> None:
        """Remove the positions from `length` on. ValueError: it could not continue from there (see `continuable`)."""
        if not 0 <= length <= self.length or length > self.continuable(length):
            raise ValueError(f"cannot cut {self.length} positions to {length}")
        self._own_blocks = {number: copy for number, copy in self._own_blocks.items() if POSITIONS * number < length}
        kept = segments_of(length)
        for segment in self._segments[kept:]:
            self.pool.release(segment)
        self._own(self._segments[:kept])
        if length % SEGMENT and (self._segments[-1].users > 1 or self._segments[-1].frozen):
            shared = self._segments[-1]
            self._own([*self._segments[:-1], self.pool.copy(shared, length % SEGMENT)])
            self.pool.release(shared)         # it was full when it was shared: others still use it
        self.length = length
        self.offered = min(self.offered, length // SEGMENT)

    def fork(self, length: int) -> Sequence:
        """A new sequence of the first `length` positions, which must be continuable: full segments are shared, the last,
        partial one is copied."""
        made, full = Sequence(self.pool), length // SEGMENT
        tail = [self.pool.copy(self._segments[full], length % SEGMENT)] if length % SEGMENT else []
        for segment in self._segments[:full]:
            segment.users += 1
        made._own([*self._segments[:full], *tail])
        made.reserve(length)
        made.append(self.ids[:length])
        made.offered = min(self.offered, full)
        made._copy_own_block(self)
        return made

    def begin_with(self, mappings: list[mmap.mmap], ids: NDArray[np.int32]) -> None:
        """Fill an empty sequence with these ids and their full segments, which are read-only mappings."""
        self._own([self.pool.adopt(mapping, frozen=True) for mapping in mappings])
        self.reserve(len(ids))
        self.append(ids)
        self.offered = len(mappings)

    def adopt(self, other: Sequence, length: int) -> None:
        """Copy the first `length` positions of another sequence, which begins with all of this one."""
        first, ids = self.length // SEGMENT, other.ids[self.length : length]
        self.reserve(length)
        for number in range(first, segments_of(length)):
            self.pool.copy_into(self._segments[number], other.segments[number], min(SEGMENT, length - SEGMENT * number))
        self.append(ids)
        self._copy_own_block(other)

    def save(self, notes: str | None = None) -> None:
        """Write everything to the disk; only for a sequence that outlives the process."""

    def shares(self, number: int, segment: Segment) -> bool:
        """Whether its segment with this number is `segment`."""
        return number < len(self._segments) and self._segments[number] is segment

    def replace(self, number: int, segment: Segment) -> None:
        """Use another segment with the same content, and add a user to it."""
        old, segment.users = self._segments[number], segment.users + 1
        self._own([*self._segments[:number], segment, *self._segments[number + 1 :]])
        self.pool.release(old)

    def close(self) -> None:
        """Release its segments."""
        for segment in self._segments:
            self.pool.release(segment)
        self._own([])
        self.length, self._own_blocks = 0, {}

    @property
    def segments(self) -> list[Segment]:
        return self._segments

    def _copy_own_block(self, other: Sequence) -> None:
        """After copying positions of another sequence: its copy of the last block takes the place of all own ones."""
        number = self.length // POSITIONS
        held = self.length % POSITIONS and number in other._own_blocks
        self._own_blocks = {number: other._own_blocks[number].copy()} if held else {}

    def _allocate(self, number: int) -> Segment:
        """A segment to hold its positions from 256 * number on."""
        return self.pool.allocate()

    def _own(self, segments: list[Segment]) -> None:
        self._segments = segments
        self.addresses = np.array([segment.address for segment in segments], np.int64)
