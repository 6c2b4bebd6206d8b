"""Grouped-query attention over the KV cache: one pass over its blocks.

The cache holds 64 positions of one key/value head in one block of bytes, which a kernel reads from front to back. The formats
`kv4`, `kv8` and `kv16` describe a block's bytes. Attention is one pass over the blocks in order with an online softmax (Milakov
and Gimelshein 2018; Dao et al. 2022), in fixed blocks of 64 from position 0: a query sees the same numbers in the same order
whether its prompt came at once, in chunks or token by token. Each SPLIT_BLOCKS blocks, a split, have a softmax of their own;
these are merged in order (FlashDecoding, Dao et al. 2023). So all threads can share the few heads of one token.

In the 4-bit format a query sees its own block, the one that it lies in, as a copy in 8 bits. The latest positions get much of
the attention, so the copy removes most of the error that 4 bits make.

If values are integer codes, the products of probability and V's scale are rounded to u8 in each block, in a unit chosen so that
they keep their sum. (A denominator summed from the rounded values works as well on random data, but it divides by V's scales.
Trained models make these tiny exactly where most of the attention goes.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.kernels.jit import inlined
from edgemistral.kernels.kv_formats import FINISH, TILE
from edgemistral.kernels.kv_layout import KV_FORMATS, OWN_BITS, POSITIONS, ROWS, SEGMENT_BLOCKS, SPLIT_BLOCKS
from edgemistral.kernels.simd import load_f32, mul, splat_f32, store_f32, total, zero_f32
from edgemistral.kernels.softmax import LOWEST, copy_partial, merge_partial, values_stride
from edgemistral.kernels.unroll import static, unrolled

SPAN = 32                 # tokens that one thread takes through the cache together: each block is read once for all of them


class Rows(NamedTuple):
    """The work of one step: rows of consecutive tokens, each row of another sequence.

    A token's keys and values lie in the segment `segments[first_segment[token] + positions[token] // 256]`. Queries of one row
    and KV head lie side by side. A span is up to SPAN tokens of one row, all in the same block of positions; its queries are
    whole tiles of ROWS.
    """

    ids: NDArray[np.int64]             # (tokens,)
    positions: NDArray[np.int64]       # (tokens,)
    first_segment: NDArray[np.int64]   # (tokens,) where the table of the token's sequence begins in `segments`
    query_rows: NDArray[np.int64]      # (tokens,) the row of the token's first query in `Queries`, within one KV head
    spans: NDArray[np.int64]           # (2 * spans,) first token and last token + 1 of each, the longest work first
    with_logits: NDArray[np.int64]     # (n_logits,) the tokens whose logits are wanted
    segments: NDArray[np.int64]        # addresses
    own_blocks: NDArray[np.int64]      # (tokens,) address of the copy of the token's own block; 0 for formats without
    rows_of_head: int                  # query rows of one KV head, over all tokens
    splits: int                        # of the longest sequence, which threads share; 1: one thread takes a span through all


class Partial(NamedTuple):
    """The softmax of query rows over some of the positions, not yet normalized."""

    values: NDArray[np.float32]        # (rows * head_dim in whole DIMS,) outputs
    peaks: NDArray[np.float32]         # (rows / ROWS * 16,) maximum of the scores, in lane row % ROWS of each tile
    sums: NDArray[np.float32]          # (rows * 16,) denominators, in 16 parts


class AttentionScratch(NamedTuple):
    """One thread's workspace; rows = SPAN * group, rounded up to whole tiles of ROWS."""

    values: NDArray[np.float32]        # the `Partial` of the current split
    peaks: NDArray[np.float32]
    sums: NDArray[np.float32]
    earlier: Partial                   # of the splits before it
    probabilities: NDArray[np.float32]  # (ROWS * 64,) of one tile and block
    codes: NDArray[np.uint8]           # the same bytes: u8 codes of the probabilities in 4 and 8 bits
    first_seen: NDArray[np.int32]      # (ROWS,) first and last position of the block that each row of the tile may see
    last_seen: NDArray[np.int32]       # (ROWS,)


class Queries(NamedTuple):
    """Rotated queries of a step: [KV head][tile of ROWS rows]; a row is `Rows.query_rows` of its token + head in the group."""

    codes: NDArray[np.int8]        # [head][tile][head_dim / 4][ROWS][4]
    words: NDArray[np.int32]       # the same bytes
    sums: NDArray[np.int32]        # [head][tile][ROWS][QUERY_SUMS] of the codes, see `kv8.quantize_query_to_codes`
    scales: NDArray[np.float32]    # [head][tile][ROWS] with 1 / sqrt(head_dim)
    floats: NDArray[np.float32]    # [head][tile][ROWS][head_dim], scaled; what 16 bits use


@inlined
def block_at(kv, rows, token, layer, head, block):
    """The address of block number `block` of the token's sequence."""
    segment = rows.segments[rows.first_segment[token] + block // SEGMENT_BLOCKS]
    return segment + ((layer * kv.n_kv_heads + head) * SEGMENT_BLOCKS + block % SEGMENT_BLOCKS) * kv.block_bytes


@inlined
def own_block_at(kv, rows, token, layer, head):
    """The address of the copy of the token's own block."""
    return rows.own_blocks[token] + (layer * kv.n_kv_heads + head) * kv.own_bytes


@inlined
def start(scratch, n, head_dim):
    """The softmax of n rows over no position."""
    values_row = values_stride(head_dim)
    for r in range((n + ROWS - 1) // ROWS * ROWS):
        store_f32(scratch.peaks, r // ROWS * 16, splat_f32(LOWEST))
        store_f32(scratch.sums, 16 * r, zero_f32())
    for i in range(0, (n + ROWS - 1) // ROWS * ROWS * values_row, 16):
        store_f32(scratch.values, i, zero_f32())


@inlined
def partial_at(rows, split, head, first, n_kv_heads):
    """The row of the shared `Partial` where the rows of the span that begins with the token `first` lie."""
    return (split * n_kv_heads + head) * rows.rows_of_head + rows.query_rows[first]


def _make_write(BITS):
    @inlined
    @unrolled(BITS=BITS)
    def write(scratch, head, first, last, group, head_dim, out, stride):
        """out[token * stride + query head * head_dim + i] = the outputs of the tokens first ... last - 1, float32."""
        values_row = values_stride(head_dim)
        for r in range((last - first) * group):
            to = (first + r // group) * stride + (head * group + r % group) * head_dim
            factor = splat_f32(np.float32(1) / total(load_f32(scratch.sums, 16 * r)))
            for i in range(0, head_dim, 16):
                store_f32(out, to + i, mul(load_f32(scratch.values, r * values_row + i), factor))
            FINISH[BITS](out, to, head_dim)

    return write


WRITE = {bits: _make_write(bits) for bits in KV_FORMATS}


def _make_attend(BITS):
    OWN = OWN_BITS.get(BITS, 0)

    @inlined
    @unrolled(BITS=BITS, OWN=OWN)
    def attend(kv, rows, layer, head, first, last, split, group, head_dim, window, queries, partials, out, stride, scratch):
        """Query heads of KV head `head` for the tokens first ... last - 1 of one span, over the positions that they may see.

        The cache already holds these tokens. window: positions a query sees, itself included. If `rows.splits` is 1, over all
        positions: `out` receives the result (see `write`). Otherwise over those of number `split`, for `merge_splits`.
        """
        n, position = (last - first) * group, rows.positions[first]
        first_seen, last_seen = scratch.first_seen, scratch.last_seen
        own = position // POSITIONS         # of all tokens of the span, and the last block that they see
        oldest = max(0, position - window + 1) // POSITIONS
        first_split, last_split = oldest // SPLIT_BLOCKS, own // SPLIT_BLOCKS
        if rows.splits > 1:
            first_split, last_split = max(first_split, split), min(last_split, split)
        for part in range(first_split, last_split + 1):
            start(scratch, n, head_dim)
            for block in range(max(oldest, SPLIT_BLOCKS * part), min(own, SPLIT_BLOCKS * part + SPLIT_BLOCKS - 1) + 1):
                at = block_at(kv, rows, first, layer, head, block)
                ahead = block_at(kv, rows, first, layer, head, min(block + 1, own))
                for row in range(0, n, ROWS):
                    masked, seeing = 0, 0    # counts, no flags: numba would compile the tile again for a literal False
                    for r in range(ROWS):
                        seen = position + min(row + r, n - 1) // group - POSITIONS * block
                        first_seen[r], last_seen[r] = max(seen - window + 1, -1), min(seen, POSITIONS)
                        masked += seen < POSITIONS - 1 or seen - window + 1 > 0
                        seeing += seen >= 0 and seen - window + 1 < POSITIONS
                    if seeing == 0:
                        continue
                    tile_at = (head * rows.rows_of_head + rows.query_rows[first] + row) // ROWS
                    if static(OWN > 0):      # noqa: SIM102, the outer condition must stand alone
                        if block == own:
                            at = own_block_at(kv, rows, first, layer, head)
                            TILE[OWN](at, ahead, queries, tile_at, row, head_dim, masked > 0, scratch)
                            continue
                    TILE[BITS](at, ahead, queries, tile_at, row, head_dim, masked > 0, scratch)
            if rows.splits > 1:
                copy_partial(partials, partial_at(rows, part, head, first, kv.n_kv_heads), scratch, 0, n, head_dim)
                continue
            if part > first_split:
                merge_partial(scratch, scratch.earlier, 0, n, head_dim)
            if part < last_split:
                copy_partial(scratch.earlier, 0, scratch, 0, n, head_dim)
        if rows.splits == 1:
            WRITE[BITS](scratch, head, first, last, group, head_dim, out, stride)

    return attend


ATTEND = {bits: _make_attend(bits) for bits in KV_FORMATS}


def _make_merge_splits(BITS):
    @inlined
    @unrolled(BITS=BITS)
    def merge_splits(kv, rows, head, first, last, group, head_dim, window, partials, out, stride, scratch):
        """`out` receives what `attend` would have written if it had not been shared, bit for bit."""
        n, position = (last - first) * group, rows.positions[first]
        first_split = max(0, position - window + 1) // POSITIONS // SPLIT_BLOCKS
        copy_partial(scratch, 0, partials, partial_at(rows, first_split, head, first, kv.n_kv_heads), n, head_dim)
        for split in range(first_split + 1, position // POSITIONS // SPLIT_BLOCKS + 1):
            merge_partial(scratch, partials, partial_at(rows, split, head, first, kv.n_kv_heads), n, head_dim)
        WRITE[BITS](scratch, head, first, last, group, head_dim, out, stride)

    return merge_splits


MERGE_SPLITS = {bits: _make_merge_splits(bits) for bits in KV_FORMATS}
