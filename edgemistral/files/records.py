"""Records of session files and of the KV store: they describe a segment so that damaged data is never used.

A record is 1176 bytes, little-endian:

    8     "KVRECORD"
    8     number of the segment in its sequence
    4     positions that it holds, 0 to 256; then 4 zero bytes
    32    `chain` of everything before the segment
    64    `digests`: 16 bytes for each of its four blocks of 64 positions (for a block without positions: zeros)
    1024  the ids of its positions as int32; then zeros
    32    BLAKE2b of all bytes before

It is in the last 2048 bytes of the segment's stride, behind the data that kernels read, and is written when that data is on the
disk. A reader compares the digests with the data, so a torn record, or one with torn data, is ignored. Chains begin with the
`root` of a model and its KV format, so a record of another model never continues one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

POSITIONS, BLOCKS = 64, 4        # of a block; of a segment. As in kernels/, which files/ must not import
SEGMENT = POSITIONS * BLOCKS
TRAILER = 2048                   # bytes at the end of a segment's stride
CHAIN = 32                       # bytes
KV_VERSION = 4                   # counts changes of the meaning of a block's bytes, or of the arithmetic behind them

_MAGIC = b"KVRECORD"
_HEAD = struct.Struct("<8sQI4x32s64s1024s")
RECORD = _HEAD.size + CHAIN
_NOTHING = bytes(16)


class Geometry(NamedTuple):
    """The places of a segment's blocks: for each layer and KV head four, one after another."""

    heads: int           # n_layers * n_kv_heads
    block_bytes: int
    stride: int          # bytes from segment to segment

    @property
    def data_bytes(self) -> int:
        return self.heads * BLOCKS * self.block_bytes


class Record(NamedTuple):
    number: int
    parent: bytes                # chain of all ids before
    ids: NDArray[np.int32]       # (positions,)
    digests: tuple[bytes, ...]   # of the blocks that hold them


def root_of(binding: Mapping[str, Any]) -> bytes:
    """The start of all chains of a model and its KV format."""
    text = repr(sorted((name, str(value)) for name, value in binding.items()))
    return hashlib.blake2b(text.encode(), digest_size=CHAIN).digest()


def chain_of(parent: bytes, ids: NDArray[np.int32]) -> bytes:
    """A hash of all ids up to the end of a segment; `parent` is the hash of those before it."""
    return hashlib.blake2b(parent + ids.astype("<i4").tobytes(), digest_size=CHAIN).digest()


def digests_of(data: NDArray[np.uint8], geometry: Geometry, blocks: int = BLOCKS) -> tuple[bytes, ...]:
    """A checksum of each of a segment's first blocks, at the speed of memory.

    It covers the sum of all words of each head's block, and the sum over the heads of each word: any flipped bit changes
    one of each, and so does any piece that is missing, older, or in another place.
    """
    words = data[: geometry.data_bytes].reshape(geometry.heads, BLOCKS, -1).view("<u8")[:, :blocks]
    of_heads, of_words = words.sum(axis=2), words.sum(axis=0)
    return tuple(
        hashlib.blake2b(of_heads[:, block].tobytes() + of_words[block].tobytes(), digest_size=16).digest()
        for block in range(blocks)
    )


def blocks_of(positions: int) -> int:
    """How many blocks hold this many positions of a segment."""
    return (positions + POSITIONS - 1) // POSITIONS


def encode(record: Record) -> bytes:
    digests = b"".join([*record.digests, *[_NOTHING] * (BLOCKS - len(record.digests))])
    head = _HEAD.pack(
        _MAGIC, record.number, len(record.ids), record.parent, digests,
        record.ids.astype("<i4").tobytes().ljust(4 * SEGMENT, b"\0"),
    )
    return head + hashlib.blake2b(head, digest_size=CHAIN).digest()


def decode(data: bytes) -> Record | None:
    """The record at the start of `data`; None if there is none, or it is damaged."""
    head, digest = data[: _HEAD.size], data[_HEAD.size : RECORD]
    if len(digest) < CHAIN or hashlib.blake2b(head, digest_size=CHAIN).digest() != digest:
        return None
    magic, number, positions, parent, digests, ids = _HEAD.unpack(head)
    if magic != _MAGIC or positions > SEGMENT:
        return None
    return Record(
        number, parent, np.frombuffer(ids, "<i4", positions).astype(np.int32),
        tuple(digests[16 * block : 16 * block + 16] for block in range(blocks_of(positions))),
    )


def intact(record: Record, data: NDArray[np.uint8], geometry: Geometry) -> int:
    """How many of the record's leading positions have undamaged data."""
    found = digests_of(data, geometry, len(record.digests))
    good = next((n for n, pair in enumerate(zip(found, record.digests, strict=True)) if pair[0] != pair[1]), len(found))
    return min(POSITIONS * good, len(record.ids))
