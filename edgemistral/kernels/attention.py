"""Rotary embedding, the KV cache's blocks, and grouped-query attention over them.

The cache holds 64 positions of one key/value head in one block of bytes, which a kernel reads from front to back:

    8 bits    float32 scales of K (64) and V (64), then int8 codes
              K: 4 panels of 16 positions: head_dim / 4 chunks of [16 positions][4 dims]
              V: 16 groups of 4 positions: [head_dim dims][4 positions]
    16 bits   half floats
              K: 4 panels of 16 positions: [head_dim dims][16 positions]
              V: [64 positions][head_dim dims]

so that scores come from the same dot-product instruction as the weights' products: 16 positions side by side, no horizontal
sums. Attention is one pass over the blocks in order with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022),
in fixed blocks of 64 from position 0: a query meets the same numbers in the same order whether its prompt came at once, in
chunks or token by token. In 8 bits the products of probability and V's scale are rounded to u8 in each block, in a unit
chosen so that they keep their sum. (Summing the denominator from the rounded values does as well on random data, but
divides by V's scales, which trained models make tiny exactly where most of the attention goes.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.kernels.jit import inlined, inner
from edgemistral.kernels.kv_layout import POSITIONS, SEGMENT_BLOCKS
from edgemistral.kernels.simd import (
    absolute,
    add,
    add_i32,
    broadcast4,
    dot4,
    exp,
    flip_top_bits,
    fma,
    highest,
    lane_numbers,
    load_bytes,
    load_f16_as_f32,
    load_f32,
    maximum,
    mul,
    prefetch,
    round_to_i32,
    splat_f32,
    splat_i32,
    spread_bytes,
    spread_f32_as_f16,
    spread_words,
    store_f32,
    store_f32_as_f16,
    store_low_bytes,
    store_scalar_f32,
    sub,
    to_f32,
    total,
    total_i32,
    where_between,
    zero_f32,
    zero_i32,
)
from edgemistral.kernels.unroll import registers, static, unroll, unrolled

ROWS = 4                  # query rows (token x query head of one KV head) that meet a block in registers
SPAN = 32                 # tokens whose rows one thread takes through the cache together, so that a block is read once for all
LOWEST = np.float32(-1e30)


class Rows(NamedTuple):
    """What one step computes: rows of consecutive tokens, each row of another sequence.

    A token's keys and values lie in the segment `segments[first_segment[token] + positions[token] // 256]`. Queries of one row
    and KV head lie side by side in whole tiles of ROWS, so each row begins a tile. A span is up to SPAN tokens of one row.
    """

    ids: NDArray[np.int64]             # (tokens,)
    positions: NDArray[np.int64]       # (tokens,)
    first_segment: NDArray[np.int64]   # (tokens,) where the table of the token's sequence begins in `segments`
    query_rows: NDArray[np.int64]      # (tokens,) the row of the token's first query in `Queries`, within one KV head
    spans: NDArray[np.int64]           # (2 * spans,) first token and last token + 1 of each, the longest work first
    with_logits: NDArray[np.int64]     # (n_logits,) the tokens whose logits are wanted
    segments: NDArray[np.int64]        # addresses
    rows_of_head: int                  # query rows of one KV head, over all tokens


class AttentionScratch(NamedTuple):
    """One thread's workspace; rows = SPAN * group, rounded up to whole tiles of ROWS."""

    values: NDArray[np.float32]        # (rows * head_dim,) unnormalized outputs
    peaks: NDArray[np.float32]         # (rows,) running maximum of the scores
    sums: NDArray[np.float32]          # (rows * 16,) running denominators, in 16 parts
    probabilities: NDArray[np.float32]  # (ROWS * 64,) of one tile and block; its bytes hold the u8 codes in 8 bits
    codes: NDArray[np.uint8]           # the same bytes
    first_seen: NDArray[np.int64]      # (ROWS,) what each row of the tile at hand may see of the block
    last_seen: NDArray[np.int64]       # (ROWS,)


class Queries(NamedTuple):
    """Rotated queries of a step: [KV head][tile of ROWS rows]; a row is `Rows.query_rows` of its token + head in the group."""

    codes: NDArray[np.int8]        # [head][tile][head_dim / 4][ROWS][4]
    words: NDArray[np.int32]       # the same bytes
    sums: NDArray[np.int32]        # [head][tile][ROWS] -128 * sum of the codes
    scales: NDArray[np.float32]    # [head][tile][ROWS] with 1 / sqrt(head_dim)
    floats: NDArray[np.float32]    # [head][tile][ROWS][head_dim], scaled; what 16 bits use


@inlined
def block_at(kv, rows, token, layer, head, block):
    """The address of block number `block` of the token's sequence."""
    segment = rows.segments[rows.first_segment[token] + block // SEGMENT_BLOCKS]
    return segment + ((layer * kv.n_kv_heads + head) * SEGMENT_BLOCKS + block % SEGMENT_BLOCKS) * kv.block_bytes


# ---- on the way in ---------------------------------------------------------------------------------------------------

@inlined
def rotate(x, at, head_dim, cos, sin, angle_at):
    """RoPE (Su et al. 2021) in place on the head at x[at]; pairs are (i, i + head_dim / 2)."""
    half = head_dim // 2
    for i in range(0, half, 16):
        a, b = load_f32(x, at + i), load_f32(x, at + half + i)
        c, s = load_f32(cos, angle_at + i), load_f32(sin, angle_at + i)
        store_f32(x, at + i, fma(a, c, sub(zero_f32(), mul(b, s))))
        store_f32(x, at + half + i, fma(a, s, mul(b, c)))


@inlined
def _peak(x, at, head_dim):
    """The largest magnitude of a head, never zero."""
    peak = zero_f32()
    for i in range(0, head_dim, 16):
        peak = maximum(absolute(load_f32(x, at + i)), peak)
    return max(highest(peak), np.float32(1e-30))


@inlined
def append_key_value(at, bits, position, x, key_at, value_at, head_dim):
    """Write one position's rotated key and its value into the block at address `at`."""
    within = position % POSITIONS
    panel, lane = within // 16, within % 16
    if bits == 8:
        key_peak, value_peak = _peak(x, key_at, head_dim), _peak(x, value_at, head_dim)
        store_scalar_f32(at, 4 * within, key_peak / np.float32(127))
        store_scalar_f32(at, 4 * (POSITIONS + within), value_peak / np.float32(127))
        key_factor, value_factor = splat_f32(np.float32(127) / key_peak), splat_f32(np.float32(127) / value_peak)
        keys = 8 * POSITIONS + panel * head_dim * 16 + 4 * lane
        values = (8 + head_dim) * POSITIONS + within // 4 * head_dim * 4 + within % 4
        for i in range(0, head_dim, 16):
            spread_words(at, keys + 16 * i, 64, round_to_i32(mul(load_f32(x, key_at + i), key_factor)))
            spread_bytes(at, values + 4 * i, 4, round_to_i32(mul(load_f32(x, value_at + i), value_factor)))
    else:
        keys = 2 * (panel * head_dim * 16 + lane)
        values = 2 * (POSITIONS * head_dim + within * head_dim)
        for i in range(0, head_dim, 16):
            spread_f32_as_f16(at, keys + 32 * i, 32, load_f32(x, key_at + i))
            store_f32_as_f16(at, values + 2 * i, load_f32(x, value_at + i))


@inlined
def quantize_query(x, at, head_dim, bits, queries, row_at):
    """The rotated query at x[at] -> row `row_at` of the packed queries (counted over all heads and tiles)."""
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    if bits == 8:
        tile, slot = row_at // ROWS, row_at % ROWS
        top, sums = _peak(x, at, head_dim), zero_i32()
        factor = splat_f32(np.float32(127) / top)
        for i in range(0, head_dim, 16):
            n = round_to_i32(mul(load_f32(x, at + i), factor))
            spread_words(queries.words, (tile * (head_dim // 4) + i // 4) * ROWS + slot, ROWS, n)
            sums = add_i32(sums, n)
        queries.sums[row_at] = np.int32(-128) * total_i32(sums)
        queries.scales[row_at] = top / np.float32(127) * scale
    else:
        for i in range(0, head_dim, 16):
            store_f32(queries.floats, row_at * head_dim + i, mul(load_f32(x, at + i), splat_f32(scale)))


# ---- one tile of rows meets one block ----------------------------------------------------------------------------------

def _make_softmax(BITS):
    @inlined
    @unrolled(BITS=BITS)
    def softmax(s0, s1, s2, s3, first, last, masked, at, row, head_dim, scratch):
        """One step of the online softmax: the scores of a row with the 64 positions of a block -> weights of their values.

        Row `row` of the scratch may see the positions first ... last of the block; `masked` says whether that leaves some
        out. The weights go to row r = row % 4 of the probabilities; in 8 bits as codes, and the value of a code is returned.
        """
        s = registers()
        n = registers()
        s[0], s[1], s[2], s[3] = s0, s1, s2, s3
        r = row % 4    # not an argument: numba compiles a function anew for each literal number
        if masked:
            for p in unroll(4):
                s[p] = _where_seen(p, first, last, s[p], splat_f32(LOWEST))
        top, peak = highest(maximum(maximum(s[0], s[1]), maximum(s[2], s[3]))), scratch.peaks[row]
        denominator = load_f32(scratch.sums, 16 * row)
        if top > peak:
            shrink = exp(splat_f32(peak - top))
            for d in range(row * head_dim, row * head_dim + head_dim, 16):
                store_f32(scratch.values, d, mul(load_f32(scratch.values, d), shrink))
            denominator = mul(denominator, shrink)
            peak = top
            scratch.peaks[row] = top
        for p in unroll(4):
            s[p] = exp(sub(s[p], splat_f32(peak)))
        if masked:
            for p in unroll(4):
                s[p] = _where_seen(p, first, last, s[p], zero_f32())
        store_f32(scratch.sums, 16 * row, add(denominator, add(add(s[0], s[1]), add(s[2], s[3]))))
        if static(BITS == 16):
            for p in unroll(4):
                store_f32(scratch.probabilities, 64 * r + 16 * p, s[p])
            return np.float32(1)
        for p in unroll(4):
            s[p] = mul(s[p], load_f32(at, 256 + 64 * p))
        if masked:                                   # scales that were never written may not be numbers
            for p in unroll(4):
                s[p] = _where_seen(p, first, last, s[p], zero_f32())
        top = max(highest(maximum(maximum(s[0], s[1]), maximum(s[2], s[3]))), np.float32(1e-30))
        factor = splat_f32(np.float32(255) / top)
        for p in unroll(4):
            n[p] = round_to_i32(mul(s[p], factor))
            store_low_bytes(scratch.codes, 64 * r + 16 * p, n[p])
        codes = total_i32(add_i32(add_i32(n[0], n[1]), add_i32(n[2], n[3])))
        weight = total(add(add(s[0], s[1]), add(s[2], s[3])))
        return weight / np.float32(max(codes, np.int32(1)))
    return softmax


@inlined
def _where_seen(panel, first, last, a, b):
    """a at the positions first ... last of a block, b elsewhere, of the 16 positions of one panel."""
    return where_between(lane_numbers(), np.int32(first - 16 * panel), np.int32(last - 16 * panel), a, b)


_softmax_8bit, _softmax_16bit = _make_softmax(8), _make_softmax(16)


def _make_tile(BITS, R):
    @inlined
    @unrolled(BITS=BITS, R=R)
    def tile(at, ahead, queries, tile_at, row, head_dim, first_seen, last_seen, masked, scratch):
        """Attend with rows `row` ... `row + R - 1` of the scratch (tile `tile_at` of the queries) to the block at address `at`.

        first_seen, last_seen: for each of the R rows the positions that it may see, counted from the block's first;
        `masked` says whether that matters in this block. `ahead`: the address of the block to prefetch.
        """
        i = registers()
        s = registers()
        k = registers()
        unit = registers()
        # Scores: 16 positions side by side, four panels, R rows.
        if static(BITS == 8):
            keys, values = 8 * 64, (8 + head_dim) * 64
            for r in unroll(R):
                for p in unroll(4):
                    i[r, p] = splat_i32(queries.sums[tile_at * R + r])
            for c in range(head_dim // 4):
                for p in unroll(4):
                    k[p] = flip_top_bits(load_bytes(at, keys + 16 * head_dim * p + 64 * c))
                    prefetch(ahead, 16 * head_dim * p + 64 * c)
                for r in unroll(R):
                    q = broadcast4(queries.codes, (tile_at * (head_dim // 4) + c) * 4 * R + 4 * r)
                    for p in unroll(4):
                        i[r, p] = dot4(i[r, p], k[p], q)
        else:
            values = 128 * head_dim
            for r in unroll(R):
                for p in unroll(4):
                    s[r, p] = zero_f32()
            for c in range(head_dim):
                for p in unroll(4):
                    k[p] = load_f16_as_f32(at, 32 * head_dim * p + 32 * c)
                for r in unroll(R):
                    q = splat_f32(queries.floats[(tile_at * R + r) * head_dim + c])
                    for p in unroll(4):
                        s[r, p] = fma(k[p], q, s[r, p])
        for r in unroll(R):
            if static(BITS == 8):
                scale = splat_f32(queries.scales[tile_at * R + r])
                for p in unroll(4):
                    s[r, p] = mul(to_f32(i[r, p]), mul(load_f32(at, 64 * p), scale))
                unit[r] = _softmax_8bit(s[r, 0], s[r, 1], s[r, 2], s[r, 3], first_seen[r], last_seen[r], masked, at,
                                        row + r, head_dim, scratch)
            else:
                _softmax_16bit(s[r, 0], s[r, 1], s[r, 2], s[r, 3], first_seen[r], last_seen[r], masked, at,
                               row + r, head_dim, scratch)
        # Values: 64 dims at a time.
        for d in range(0, head_dim, 64):
            if static(BITS == 8):
                for r in unroll(R):
                    for p in unroll(4):
                        i[r, p] = zero_i32()
                for c in range(16):
                    for p in unroll(4):
                        k[p] = load_bytes(at, values + 4 * head_dim * c + 4 * d + 64 * p)
                        prefetch(ahead, 64 * head_dim + 4 * head_dim * c + 4 * d + 64 * p)
                    for r in unroll(R):
                        q = broadcast4(scratch.codes, 64 * r + 4 * c)
                        for p in unroll(4):
                            i[r, p] = dot4(i[r, p], q, k[p])
                for r in unroll(R):
                    for p in unroll(4):
                        if 16 * p < head_dim - d:
                            v = (row + r) * head_dim + d + 16 * p
                            store_f32(scratch.values, v, fma(to_f32(i[r, p]), splat_f32(unit[r]), load_f32(scratch.values, v)))
            else:
                for r in unroll(R):
                    for p in unroll(4):
                        s[r, p] = zero_f32()
                for c in range(64):
                    for p in unroll(4):
                        k[p] = load_f16_as_f32(at, values + 2 * (head_dim * c + d + 16 * p))
                    for r in unroll(R):
                        q = splat_f32(scratch.probabilities[64 * r + c])
                        for p in unroll(4):
                            s[r, p] = fma(k[p], q, s[r, p])
                for r in unroll(R):
                    for p in unroll(4):
                        if 16 * p < head_dim - d:
                            v = (row + r) * head_dim + d + 16 * p
                            store_f32(scratch.values, v, add(s[r, p], load_f32(scratch.values, v)))
    return tile


_tile_8bit, _tile_16bit = _make_tile(8, ROWS), _make_tile(16, ROWS)


@inner
def attend(kv, rows, layer, head, first, last, group, head_dim, window, queries, out, stride, scratch):
    """Query heads of KV head `head` for the tokens first ... last - 1 of one row, over all that they may see.

    The cache already holds these tokens. window: positions a query sees, itself included.
    out[token * stride + query head * head_dim + i] receives the result, float32.
    """
    n, position = (last - first) * group, rows.positions[first]
    for r in range((n + ROWS - 1) // ROWS * ROWS):
        scratch.peaks[r] = LOWEST
        store_f32(scratch.sums, 16 * r, zero_f32())
    for i in range(0, (n + ROWS - 1) // ROWS * ROWS * head_dim, 16):
        store_f32(scratch.values, i, zero_f32())
    first_seen, last_seen = scratch.first_seen, scratch.last_seen
    end = rows.positions[last - 1] // POSITIONS
    for block in range(max(0, position - window + 1) // POSITIONS, end + 1):
        at = block_at(kv, rows, first, layer, head, block)
        ahead = block_at(kv, rows, first, layer, head, min(block + 1, end))
        for row in range(0, n, ROWS):
            masked, seeing = 0, 0    # rows; not flags, which start as a literal: numba compiles a tile for that and for others
            for r in range(ROWS):
                seen = position + min(row + r, n - 1) // group - POSITIONS * block
                first_seen[r], last_seen[r] = max(seen - window + 1, -1), min(seen, POSITIONS)
                masked += seen < POSITIONS - 1 or seen - window + 1 > 0
                seeing += seen >= 0 and seen - window + 1 < POSITIONS
            if seeing == 0:
                continue
            tile_at = (head * rows.rows_of_head + rows.query_rows[first] + row) // ROWS
            if kv.bits == 8:
                _tile_8bit(at, ahead, queries, tile_at, row, head_dim, first_seen, last_seen, masked > 0, scratch)
            else:
                _tile_16bit(at, ahead, queries, tile_at, row, head_dim, first_seen, last_seen, masked > 0, scratch)
    for r in range(n):
        to = (first + r // group) * stride + (head * group + r % group) * head_dim
        factor = splat_f32(np.float32(1) / total(load_f32(scratch.sums, 16 * r)))
        for i in range(0, head_dim, 16):
            store_f32(out, to + i, mul(load_f32(scratch.values, r * head_dim + i), factor))
