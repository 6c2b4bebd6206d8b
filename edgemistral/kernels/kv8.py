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
from edgemistral.kernels.kv_layout import DIMS, POSITIONS, QUERY_SUMS, ROWS
from edgemistral.kernels.rope import hadamard, hadamard_size
from edgemistral.kernels.simd import (
    absolute,
    add_i32,
    broadcast_f32,
    broadcast_i32,
    dot4,
    flip_top_bits,
    fma,
    highest,
    load_bytes,
    load_f32,
    maximum,
    mul,
    prefetch_tile_early,
    round_to_i32,
    splat_f32,
    spread_bytes,
    spread_words,
    store_f32,
    store_scalar_f32,
    store_tile,
    tile,
    to_f32,
    to_rows,
    total_i32,
    words,
    zero_f32,
    zero_i32,
    zero_i32_tile,
)
from edgemistral.kernels.softmax import softmax_in_codes, values_stride


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
def tile_8bit(at, ahead, queries, tile_at, row, head_dim, masked, scratch):
    """See `kv_formats.TILE`."""
    keys, values = 8 * 64, (8 + head_dim) * 64
    # The next block is prefetched evenly over the time of this one: its scales here, 3 lines with each piece of K and of V, and
    # a quarter of the lines in the softmax between.
    prefetch_tile_early(ahead, 0, 8, 1, 64, 0)
    # Scores: 16 positions side by side, four panels, ROWS rows.
    i = tile(broadcast_i32, queries.sums, QUERY_SUMS * ROWS * tile_at, ROWS, 4, QUERY_SUMS, 0)
    for c in range(head_dim // 4):
        k = flip_top_bits(tile(load_bytes, at, keys + 64 * c, 1, 4, 0, 16 * head_dim))
        prefetch_tile_early(ahead, keys + 192 * c, 1, 3, 0, 64)
        q = words(queries.codes, (tile_at * (head_dim // 4) + c) * 4 * ROWS, ROWS, 1, 4, 0)
        i = dot4(i, k, q)
    scale = tile(broadcast_f32, queries.scales, tile_at * ROWS, ROWS, 1, 1, 0)
    s = mul(to_f32(i), mul(tile(load_f32, at, 0, 1, 4, 0, 64), scale))
    units, _ = softmax_in_codes(s, masked, at + 256, ahead + keys + 48 * head_dim, 8 * head_dim, row, head_dim, scratch)
    unit = to_rows(units, ROWS)
    # Values.
    stride = values_stride(head_dim)
    for d in range(0, head_dim, DIMS):
        i = zero_i32_tile(ROWS, 4)
        for c in range(16):
            v = tile(load_bytes, at, values + 4 * head_dim * c + 4 * d, 1, 4, 0, 64)
            prefetch_tile_early(ahead, keys + 80 * head_dim + 192 * c + 48 * d, 1, 3, 0, 64)
            i = dot4(i, words(scratch.codes, 4 * c, ROWS, 1, 64, 0), v)
        to = row * stride + d
        sums = tile(load_f32, scratch.values, to, ROWS, 4, stride, 16)
        store_tile(store_f32, scratch.values, to, stride, 16, fma(to_f32(i), unit, sums))


@inlined
def transform_back(out, at, head_dim):
    """Transform the output of one query back, in place."""
    hadamard(out, at, head_dim)
    factor = splat_f32(np.float32(1) / np.float32(hadamard_size(head_dim)))
    for i in range(0, head_dim, 16):
        store_f32(out, at + i, mul(load_f32(out, at + i), factor))
