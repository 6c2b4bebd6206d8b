"""Sizes of the KV cache, for the kernels and the code that allocates it."""

from __future__ import annotations

from typing import NamedTuple

POSITIONS = 64            # of one block
SEGMENT_BLOCKS = 4        # blocks of one head in a segment, one after another
SEGMENT = SEGMENT_BLOCKS * POSITIONS    # positions
ROWS = 4                  # query rows (token x query head of one KV head) that one pass over a block holds in registers
KV_FORMATS = {4: (4, 8), 8: (8, 8), 16: (16, 0)}    # bits -> bits of a code, bytes of one position's scales (of K and V)


def block_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one block: keys and values of 64 positions of one head."""
    code_bits, scale_bytes = KV_FORMATS[bits]
    return POSITIONS * (2 * head_dim * code_bits // 8 + scale_bytes)


class KVLayout(NamedTuple):
    """Where the block of (layer, KV head, number) lies in a segment of 256 positions."""

    bits: int
    block_bytes: int
    n_layers: int
    n_kv_heads: int
