"""Sizes of the KV cache, for the kernels and the code that allocates it."""

from __future__ import annotations

from typing import NamedTuple

POSITIONS = 64            # of one block
SEGMENT_BLOCKS = 4        # blocks of one head in a segment, one after another
SEGMENT = SEGMENT_BLOCKS * POSITIONS    # positions
SPLIT_BLOCKS = 64         # blocks of a split: attention over a longer cache is merged from several of these
ROWS = 4                  # query rows (token x query head of one KV head) that one pass over a block holds in registers
KV_FORMATS = {4: (4, 8), 8: (8, 8), 16: (16, 0)}    # bits -> bits of a code, bytes of one position's scales (of K and V)
OWN_BITS = {4: 8}         # formats whose positions see the block that they lie in, their own block, with more bits
DIMS = 64                 # of values that meet them there; outputs are summed in rows of whole ones
QUERY_SUMS = 4            # sums of a query row's codes that the formats need, one unused


def block_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one block: keys and values of 64 positions of one head."""
    code_bits, scale_bytes = KV_FORMATS[bits]
    return POSITIONS * (2 * head_dim * code_bits // 8 + scale_bytes)


class KVLayout(NamedTuple):
    """Where the block of (layer, KV head, number) lies in a segment of 256 positions, and in the copy of an own block."""

    bits: int
    block_bytes: int
    own_bits: int        # 0: positions see their own block as they see the others
    own_bytes: int       # of one head's own block
    n_layers: int
    n_kv_heads: int


def kv_layout(bits: int, head_dim: int, n_layers: int, n_kv_heads: int) -> KVLayout:
    own = OWN_BITS.get(bits, 0)
    return KVLayout(bits, block_bytes(head_dim, bits), own, block_bytes(head_dim, own) if own else 0, n_layers, n_kv_heads)
