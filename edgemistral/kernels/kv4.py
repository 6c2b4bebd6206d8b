"""Keys and values in 4 bits, rotated as in 8 bits (see `kv8`): without the rotation 4 bits would not be accurate enough.

    block     bfloat16 scales of K: [2 halves of head_dim][64], float32 scales of V (64), then codes of 4 bits, two a byte
              K: 4 panels of 16 positions: head_dim / 8 chunks of [16 positions][4 dims]; a byte's low nibble is a dim of
                 the first half, its high nibble the same one of the second half
              V: 16 groups of 4 positions: head_dim / 32 pieces of [16 dims][4 positions]; low nibbles are the first 16 of
                 the piece's 32 dims, high nibbles the other 16

A position owns whole bytes, so threads that append neighbours never write to the same byte. Nibbles are never shifted: high
nibbles count 16 times their value. K's are masked in place, and the half of the dims that they hold has a separate scale, which
includes the factor 16. V's bytes are used whole, as 16 * high + low, and the product of the low nibbles is subtracted.

K's codes -8 ... 7 have a signed scale: the element of the largest magnitude, of either sign, is about -8 times the scale. V's
scales go into the probabilities' codes, which are unsigned, so V's codes are -7.5, -6.5, ... 7.5. Both scales are the best of a
few trials by least squares, which removes a quarter of the error of absmax / 7.
"""

from __future__ import annotations

import numpy as np

from edgemistral.kernels.jit import inlined
from edgemistral.kernels.kv_layout import DIMS, POSITIONS, QUERY_SUMS, ROWS
from edgemistral.kernels.simd import (
    add,
    broadcast_f32,
    broadcast_i32,
    dot4,
    dot4_7bit,
    fma,
    highest,
    load_bf16_as_f32,
    load_bytes,
    load_f32,
    low_nibbles,
    maximum,
    minimum,
    mul,
    prefetch_tile_early,
    round_to_i32,
    splat_f32,
    spread_bytes,
    spread_words,
    store_f32,
    store_scalar_bf16,
    store_scalar_f32,
    store_tile,
    sub,
    tile,
    to_f32,
    to_rows,
    total,
    without_low_nibbles,
    words,
    zero_f32,
    zero_i32_tile,
)
from edgemistral.kernels.softmax import softmax_in_codes, values_stride

TRIALS = 7          # scales to try: the largest magnitude becomes 7, 7.5, ... 10 times the scale
KEYS = 512          # byte of a block where K's codes begin


@inlined
def _codes(v, factor, half):
    """16 values in units of their scale, as codes: -8 ... 7, and `half` more."""
    n = to_f32(round_to_i32(sub(mul(v, splat_f32(factor)), splat_f32(half))))
    return add(minimum(maximum(n, splat_f32(np.float32(-8))), splat_f32(np.float32(7))), splat_f32(half))


@inlined
def _fit(x, at, n, half):
    """(factor, scale) of the n values at x[at]: codes = `_codes(x, factor, half)`, and scale * codes is close to x.

    For each trial, the scale that fits its codes best is used; the trial with the least error wins.
    `half` 0: the scale has the sign that gives the largest magnitude a negative code.
    """
    high, low = zero_f32(), zero_f32()
    for i in range(0, n, 16):
        v = load_f32(x, at + i)
        high, low = maximum(v, high), maximum(sub(zero_f32(), v), low)
    top = max(max(highest(high), highest(low)), np.float32(1e-30))
    if half == np.float32(0) and highest(high) >= highest(low):
        top = -top
    most, best_factor, best_scale = np.float32(-1), np.float32(0), np.float32(0)
    for trial in range(TRIALS):
        largest = np.float32(7) + np.float32(0.5) * np.float32(trial)
        factor = largest / top
        both, square = zero_f32(), zero_f32()
        for i in range(0, n, 16):
            v = load_f32(x, at + i)
            codes = _codes(v, factor, half)
            both, square = fma(codes, mul(v, splat_f32(factor)), both), fma(codes, codes, square)
        product, norm = total(both), max(total(square), np.float32(1))
        explained = product / largest * (product / largest) / norm
        if explained > most:
            most, best_factor, best_scale = explained, factor, product / norm / factor
    return best_factor, best_scale


@inlined
def append_4bit(at, within, x, key_at, value_at, head_dim):
    """Write the transformed key and value as position `within` of the block at address `at`."""
    half = head_dim // 2
    low_factor, low_scale = _fit(x, key_at, half, np.float32(0))
    high_factor, high_scale = _fit(x, key_at + half, half, np.float32(0))
    store_scalar_bf16(at, 2 * within, low_scale)
    store_scalar_bf16(at, 2 * (POSITIONS + within), high_scale)
    keys = KEYS + within // 16 * head_dim * 8 + within % 16 * 4
    eight, sixteen = splat_f32(np.float32(8)), splat_f32(np.float32(16))
    for i in range(0, half, 16):
        low = add(_codes(load_f32(x, key_at + i), low_factor, np.float32(0)), eight)
        high = add(_codes(load_f32(x, key_at + half + i), high_factor, np.float32(0)), eight)
        spread_words(at, keys + 16 * i, 64, round_to_i32(fma(high, sixteen, low)))
    factor, scale = _fit(x, value_at, head_dim, np.float32(0.5))
    store_scalar_f32(at, 4 * (POSITIONS + within), scale)
    values = KEYS + POSITIONS * half + within // 4 * half * 4 + within % 4
    for i in range(0, head_dim, 32):
        low = add(_codes(load_f32(x, value_at + i), factor, np.float32(0.5)), splat_f32(np.float32(7.5)))
        high = sub(_codes(load_f32(x, value_at + i + 16), factor, np.float32(0.5)), splat_f32(np.float32(0.5)))
        spread_bytes(at, values + 2 * i, 4, round_to_i32(fma(high, sixteen, low)))


@inlined
def tile_4bit(at, ahead, queries, tile_at, row, head_dim, masked, scratch):
    """See `kv_formats.TILE`."""
    half, sums, codes = head_dim // 2, QUERY_SUMS * ROWS * tile_at, ROWS * head_dim * tile_at
    values = KEYS + 64 * half
    # The next block is prefetched evenly over the time of this one: its scales here, K with K, and V in the softmax and with V.
    prefetch_tile_early(ahead, 0, 8, 1, 64, 0)
    # Scores: first the high nibbles' half of the dims, then that of the low ones.
    i = tile(broadcast_i32, queries.sums, sums + 2, ROWS, 4, QUERY_SUMS, 0)
    for c in range(half // 4):
        k = without_low_nibbles(tile(load_bytes, at, KEYS + 64 * c, 1, 4, 0, 8 * head_dim))
        prefetch_tile_early(ahead, KEYS + 128 * c, 1, 2, 0, 64)
        i = dot4(i, k, words(queries.codes, codes + ROWS * (half + 4 * c), ROWS, 1, 4, 0))
    s = mul(to_f32(i), mul(tile(load_bf16_as_f32, at, 128, 1, 4, 0, 32), splat_f32(np.float32(1 / 16))))
    i = tile(broadcast_i32, queries.sums, sums + 1, ROWS, 4, QUERY_SUMS, 0)
    for c in range(half // 4):
        k = low_nibbles(tile(load_bytes, at, KEYS + 64 * c, 1, 4, 0, 8 * head_dim))
        prefetch_tile_early(ahead, KEYS + 16 * head_dim + 128 * c, 1, 2, 0, 64)
        i = dot4_7bit(i, k, words(queries.codes, codes + ROWS * 4 * c, ROWS, 1, 4, 0))
    s = fma(to_f32(i), tile(load_bf16_as_f32, at, 0, 1, 4, 0, 32), s)
    s = mul(s, tile(broadcast_f32, queries.scales, tile_at * ROWS, ROWS, 1, 1, 0))
    units, totals = softmax_in_codes(s, masked, at + 256, ahead + values, 4 * head_dim, row, head_dim, scratch)
    # Values: two pieces of 32 dims at a time; sums over the low nibbles, and over the whole bytes.
    stride = values_stride(head_dim)
    for d in range(0, head_dim, DIMS):
        i, j = zero_i32_tile(ROWS, 2), zero_i32_tile(ROWS, 2)
        for c in range(16):
            piece = 2 * head_dim * c + 2 * d
            v = tile(load_bytes, at, values + piece, 1, 2, 0, 64)
            prefetch_tile_early(ahead, values + 16 * head_dim + 64 * c + 16 * d, 1, 1, 0, 0)
            p = words(scratch.codes, 4 * c, ROWS, 1, POSITIONS, 0)
            i, j = dot4(i, p, low_nibbles(v)), dot4(j, p, v)
        unit, sum_of_codes, to = to_rows(units, ROWS), to_rows(totals, ROWS), row * stride + d
        low = to_f32(i)
        high = add(sub(to_f32(j), low), mul(sum_of_codes, splat_f32(np.float32(8))))
        low = add(low, mul(sum_of_codes, splat_f32(np.float32(-7.5))))
        low_sums = fma(low, unit, tile(load_f32, scratch.values, to, ROWS, 2, stride, 32))
        unit = mul(unit, splat_f32(np.float32(1 / 16)))
        high_sums = fma(high, unit, tile(load_f32, scratch.values, to + 16, ROWS, 2, stride, 32))
        store_tile(store_f32, scratch.values, to, stride, 32, low_sums)
        store_tile(store_f32, scratch.values, to + 16, stride, 32, high_sums)
