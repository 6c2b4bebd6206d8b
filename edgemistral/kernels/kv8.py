"""Keys and values in 8 bits: int8 codes with one scale for every position and head, rotated so that one scale is enough.

Trained models have some dimensions of K that are five times larger than the rest. A Hadamard transform over the head spreads
them (Ashkboos et al. 2024, QuaRot). On a real model it reduces the error of K and Q, which is most of the error, to a quarter.
K and Q are both transformed after RoPE, which changes no score; V is transformed before it is stored, and the output back.
If head_dim is not a power of two, blocks of the largest power of two that divides it are transformed.

    block     float32 scales of K (64) and V (64), then int8 codes
              K: 4 panels of 16 positions: head_dim / 4 chunks of [16 positions][4 dims]
              V: 16 groups of 4 positions: [head_dim dims][4 positions]

Scores come from the same dot-product instruction as the weights' products: 16 positions side by side, no horizontal sums.
V's scales are multiplied into the probabilities, which are then rounded to u8 (see `softmax`).
"""

from __future__ import annotations

import numpy as np

from edgemistral.kernels.jit import inlined
from edgemistral.kernels.kv_layout import POSITIONS, QUERY_SUMS, ROWS
from edgemistral.kernels.rope import hadamard, hadamard_size
from edgemistral.kernels.simd import (
    absolute,
    add_i32,
    broadcast4,
    dot4,
    flip_top_bits,
    fma,
    highest,
    load_bytes,
    load_f32,
    maximum,
    mul,
    prefetch,
    round_to_i32,
    splat_f32,
    splat_i32,
    spread_bytes,
    spread_words,
    store_f32,
    store_scalar_f32,
    to_f32,
    total_i32,
    zero_f32,
    zero_i32,
)
from edgemistral.kernels.softmax import softmax_in_codes
from edgemistral.kernels.unroll import registers, unroll, unrolled


@inlined
def peak_of(x, at, head_dim):
    """The largest magnitude of a head, never zero."""
    peak = zero_f32()
    for i in range(0, head_dim, 16):
        peak = maximum(absolute(load_f32(x, at + i)), peak)
    return max(highest(peak), np.float32(1e-30))


@inlined
def append_8bit(at, within, x, key_at, value_at, head_dim):
    """Write the transformed key and value as position `within` of the block at address `at`."""
    panel, lane = within // 16, within % 16
    key_peak, value_peak = peak_of(x, key_at, head_dim), peak_of(x, value_at, head_dim)
    store_scalar_f32(at, 4 * within, key_peak / np.float32(127))
    store_scalar_f32(at, 4 * (POSITIONS + within), value_peak / np.float32(127))
    key_factor, value_factor = splat_f32(np.float32(127) / key_peak), splat_f32(np.float32(127) / value_peak)
    keys = 8 * POSITIONS + panel * head_dim * 16 + 4 * lane
    values = (8 + head_dim) * POSITIONS + within // 4 * head_dim * 4 + within % 4
    for i in range(0, head_dim, 16):
        spread_words(at, keys + 16 * i, 64, round_to_i32(mul(load_f32(x, key_at + i), key_factor)))
        spread_bytes(at, values + 4 * i, 4, round_to_i32(mul(load_f32(x, value_at + i), value_factor)))


@inlined
def quantize_query_to_codes(x, at, head_dim, queries, row_at):
    """Transform the rotated query at x[at] in place, and pack it into row `row_at` (counted over all heads and tiles).

    Keys' codes are stored with an offset, which a sum of the query's codes takes away: -128 * all of them for keys in 8 bits;
    for those in 4 bits -8 * the first half, met by low nibbles, and -128 * the second half, met by high ones.
    """
    hadamard(x, at, head_dim)
    scale = np.float32(1) / np.sqrt(np.float32(head_dim)) / np.float32(hadamard_size(head_dim))
    tile, slot, half = row_at // ROWS, row_at % ROWS, head_dim // 2
    top, low, high = peak_of(x, at, head_dim), zero_i32(), zero_i32()
    factor = splat_f32(np.float32(127) / top)
    for i in range(0, half, 16):
        n = round_to_i32(mul(load_f32(x, at + i), factor))
        spread_words(queries.words, (tile * (head_dim // 4) + i // 4) * ROWS + slot, ROWS, n)
        low = add_i32(low, n)
        n = round_to_i32(mul(load_f32(x, at + half + i), factor))
        spread_words(queries.words, (tile * (head_dim // 4) + (half + i) // 4) * ROWS + slot, ROWS, n)
        high = add_i32(high, n)
    low_sum, high_sum = total_i32(low), total_i32(high)
    queries.sums[QUERY_SUMS * row_at] = np.int32(-128) * (low_sum + high_sum)
    queries.sums[QUERY_SUMS * row_at + 1] = np.int32(-8) * low_sum
    queries.sums[QUERY_SUMS * row_at + 2] = np.int32(-128) * high_sum
    queries.scales[row_at] = top / np.float32(127) * scale


@inlined
@unrolled(ROWS=ROWS)
def tile_8bit(at, ahead, queries, tile_at, row, head_dim, first_seen, last_seen, masked, scratch):
    """See `kv_formats.attend_to_block`."""
    i = registers()
    s = registers()
    k = registers()
    unit = registers()
    # Scores: 16 positions side by side, four panels, ROWS rows.
    keys, values = 8 * 64, (8 + head_dim) * 64
    for r in unroll(ROWS):
        for p in unroll(4):
            i[r, p] = splat_i32(queries.sums[QUERY_SUMS * (tile_at * ROWS + r)])
    for c in range(head_dim // 4):
        for p in unroll(4):
            k[p] = flip_top_bits(load_bytes(at, keys + 16 * head_dim * p + 64 * c))
            prefetch(ahead, 16 * head_dim * p + 64 * c)
        for r in unroll(ROWS):
            q = broadcast4(queries.codes, (tile_at * (head_dim // 4) + c) * 4 * ROWS + 4 * r)
            for p in unroll(4):
                i[r, p] = dot4(i[r, p], k[p], q)
    for r in unroll(ROWS):
        scale = splat_f32(queries.scales[tile_at * ROWS + r])
        for p in unroll(4):
            s[r, p] = mul(to_f32(i[r, p]), mul(load_f32(at, 64 * p), scale))
        unit[r], _ = softmax_in_codes(s[r, 0], s[r, 1], s[r, 2], s[r, 3], first_seen[r], last_seen[r], masked,
                                      at + 256, row + r, head_dim, scratch)
    # Values: 64 dims at a time.
    for d in range(0, head_dim, 64):
        for r in unroll(ROWS):
            for p in unroll(4):
                i[r, p] = zero_i32()
        for c in range(16):
            for p in unroll(4):
                k[p] = load_bytes(at, values + 4 * head_dim * c + 4 * d + 64 * p)
                prefetch(ahead, 64 * head_dim + 4 * head_dim * c + 4 * d + 64 * p)
            for r in unroll(ROWS):
                q = broadcast4(scratch.codes, 64 * r + 4 * c)
                for p in unroll(4):
                    i[r, p] = dot4(i[r, p], q, k[p])
        for r in unroll(ROWS):
            for p in unroll(4):
                if 16 * p < head_dim - d:
                    v = (row + r) * head_dim + d + 16 * p
                    store_f32(scratch.values, v, fma(to_f32(i[r, p]), splat_f32(unit[r]), load_f32(scratch.values, v)))


@inlined
def transform_back(out, at, head_dim):
    """Transform the output of one query back, in place."""
    hadamard(out, at, head_dim)
    factor = splat_f32(np.float32(1) / np.float32(hadamard_size(head_dim)))
    for i in range(0, head_dim, 16):
        store_f32(out, at + i, mul(load_f32(out, at + i), factor))
