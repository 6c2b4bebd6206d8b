"""The KV cache: one memory-mapped file that grows with the conversation.

The file is a header of one page, then segments of 256 positions; a segment holds, for every layer and KV head, four blocks
of 64 positions one after another, in the order in which attention reads them (`kernels.attention` tells a block's bytes).
So the file is never longer than the conversation (rounded up to a segment), a position's bytes never move, and a file
cut at a segment is a valid shorter one. The system writes it back and drops its pages as memory gets short: 32768 tokens
of a 7B are 2.1 GiB in 8 bits, of which only the pages in use need to be in memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from typing import IO

import numpy as np

from edgemistral.config import ModelConfig
from edgemistral.errors import BadRequest
from edgemistral.files.layout import round_up
from edgemistral.kernels.attention import POSITIONS, Cache, KVLayout
from edgemistral.paths import cache_dir

PAGE = 4096
SEGMENT_BLOCKS = 4
SEGMENT = SEGMENT_BLOCKS * POSITIONS    # positions
KV_BITS = (8, 16)


def block_bytes(head_dim: int, kv_bits: int) -> int:
    """Bytes of one block: 64 positions of keys and values of one head, in 8 bits with a float32 scale for each."""
    codes = 2 * POSITIONS * head_dim * kv_bits // 8
    return codes + (2 * POSITIONS * 4 if kv_bits == 8 else 0)


def kv_file_bytes(config: ModelConfig, positions: int, kv_bits: int) -> int:
    """Bytes of the file once it holds so many positions. The page behind the end lets kernels load whole vectors there."""
    segments = round_up(positions, SEGMENT) // SEGMENT
    return PAGE + segments * config.n_layers * config.n_kv_heads * SEGMENT_BLOCKS * block_bytes(config.head_dim, kv_bits) + PAGE


class KVCache:
    """Keys and values of the positions 0 ... length - 1 of one conversation. Deleted on close, and at a crash."""

    def __init__(self, config: ModelConfig, kv_bits: int = 8) -> None:
        if kv_bits not in KV_BITS:
            raise BadRequest(f"kv_bits is {kv_bits!r}, must be one of {', '.join(map(str, KV_BITS))}", "kv_bits")
        self.config, self.kv_bits = config, kv_bits
        size = block_bytes(config.head_dim, kv_bits)
        self.layout = KVLayout(
            kv_bits, PAGE, SEGMENT_BLOCKS, size, config.n_layers * config.n_kv_heads * SEGMENT_BLOCKS * size
        )
        self.length = 0                # positions that hold keys and values
        self._room = 0                 # positions that the file has room for
        self._file: IO[bytes] | None = None
        self._cache: Cache | None = None

    @property
    def file_bytes(self) -> int:
        """Bytes of the file now."""
        return kv_file_bytes(self.config, self._room, self.kv_bits) if self._room else 0

    def reserve(self, length: int) -> Cache:
        """Make room for `length` positions in all; the returned arrays are valid until the next call that grows the file.

        OSError: the disk is full; the positions that the cache holds are safe.
        """
        if self._cache is None or length > self._room:
            if self._file is None:
                folder = cache_dir() / "kv"
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self._room = round_up(max(length, 1), SEGMENT)
            self._cache = None         # the old mapping goes before the file grows: Windows insists
            size, had = kv_file_bytes(self.config, self._room, self.kv_bits), os.fstat(self._file.fileno()).st_size
            self._file.truncate(size)
            if hasattr(os, "posix_fallocate") and size > had:    # a full disk: an error here, not a SIGBUS in a kernel
                try:
                    os.posix_fallocate(self._file.fileno(), had, size - had)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):      # else the file system cannot do it
                        self._file.truncate(had)
                        raise
            data = np.frombuffer(mmap.mmap(self._file.fileno(), size), np.uint8)
            self._cache = Cache(data, data.view(np.uint16), data.view(np.int32), data.view(np.float32))
        return self._cache

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on; the file keeps its size."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} positions to {length}")
        self.length = length

    def close(self) -> None:
        """Unmap and delete the file."""
        self._cache, self._room, self.length = None, 0, 0
        if self._file is not None:
            self._file.close()
            self._file = None
