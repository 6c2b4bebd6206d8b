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
from edgemistral.kernels.kv_layout import POSITIONS, QUERY_SUMS, ROWS
from edgemistral.kernels.simd import (
    add,
    broadcast4,
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
    prefetch,
    round_to_i32,
    splat_f32,
    splat_i32,
    spread_bytes,
    spread_words,
    store_f32,
    store_scalar_bf16,
    store_scalar_f32,
    sub,
    to_f32,
    total,
    without_low_nibbles,
    zero_f32,
    zero_i32,
)
from edgemistral.kernels.softmax import softmax_in_codes
from edgemistral.kernels.unroll import registers, unroll, unrolled

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
@unrolled(ROWS=ROWS)
def tile_4bit(at, ahead, queries, tile_at, row, head_dim, first_seen, last_seen, masked, scratch):
    """See `kv_formats.attend_to_block`."""
    i = registers()
    s = registers()
    k = registers()
    unit = registers()
    codes = registers()
    half = head_dim // 2
    values = KEYS + 64 * half
    # Scores: first the high nibbles' half of the dims, then that of the low ones.
    for r in unroll(ROWS):
        for p in unroll(4):
            i[r, p] = splat_i32(queries.sums[QUERY_SUMS * (tile_at * ROWS + r) + 2])
    for c in range(half // 4):
        for p in unroll(4):
            k[p] = without_low_nibbles(load_bytes(at, KEYS + 8 * head_dim * p + 64 * c))
        prefetch(ahead, 128 * c)
        prefetch(ahead, 128 * c + 64)
        for r in unroll(ROWS):
            q = broadcast4(queries.codes, (tile_at * (head_dim // 4) + half // 4 + c) * 4 * ROWS + 4 * r)
            for p in unroll(4):
                i[r, p] = dot4(i[r, p], k[p], q)
    for p in unroll(4):
        scale = mul(load_bf16_as_f32(at, 128 + 32 * p), splat_f32(np.float32(1 / 16)))
        for r in unroll(ROWS):
            s[r, p] = mul(to_f32(i[r, p]), scale)
    for r in unroll(ROWS):
        for p in unroll(4):
            i[r, p] = splat_i32(queries.sums[QUERY_SUMS * (tile_at * ROWS + r) + 1])
    for c in range(half // 4):
        for p in unroll(4):
            k[p] = low_nibbles(load_bytes(at, KEYS + 8 * head_dim * p + 64 * c))
        prefetch(ahead, 16 * head_dim + 128 * c)
        prefetch(ahead, 16 * head_dim + 128 * c + 64)
        for r in unroll(ROWS):
            q = broadcast4(queries.codes, (tile_at * (head_dim // 4) + c) * 4 * ROWS + 4 * r)
            for p in unroll(4):
                i[r, p] = dot4_7bit(i[r, p], k[p], q)
    for p in unroll(4):
        scale = load_bf16_as_f32(at, 32 * p)
        for r in unroll(ROWS):
            s[r, p] = fma(to_f32(i[r, p]), scale, s[r, p])
    for r in unroll(ROWS):
        scale = splat_f32(queries.scales[tile_at * ROWS + r])
        for p in unroll(4):
            s[r, p] = mul(s[r, p], scale)
        unit[r], codes[r] = softmax_in_codes(s[r, 0], s[r, 1], s[r, 2], s[r, 3], first_seen[r], last_seen[r], masked,
                                             at + 256, row + r, head_dim, scratch)
    # Values: two pieces of 32 dims at a time; sums over the low nibbles, and over the whole bytes.
    for d in range(0, head_dim, 64):
        for r in unroll(ROWS):
            for p in unroll(4):
                i[r, p] = zero_i32()
        for c in range(16):
            for p in unroll(2):
                k[2 * p + 1] = load_bytes(at, values + 2 * head_dim * c + 2 * d + 64 * p)
                k[2 * p] = low_nibbles(k[2 * p + 1])
                prefetch(ahead, 32 * head_dim + 2 * head_dim * c + 2 * d + 64 * p)
            for r in unroll(ROWS):
                q = broadcast4(scratch.codes, 64 * r + 4 * c)
                for p in unroll(4):
                    i[r, p] = dot4(i[r, p], q, k[p])
        for r in unroll(ROWS):
            sum_of_codes = np.float32(codes[r])
            low_offset, high_offset = splat_f32(np.float32(-7.5) * sum_of_codes), splat_f32(np.float32(8) * sum_of_codes)
            low_unit, high_unit = splat_f32(unit[r]), splat_f32(unit[r] * np.float32(1 / 16))
            for p in unroll(2):
                if 32 * p < head_dim - d:
                    v = (row + r) * head_dim + d + 32 * p
                    low = to_f32(i[r, 2 * p])
                    high = add(sub(to_f32(i[r, 2 * p + 1]), low), high_offset)
                    store_f32(scratch.values, v, fma(add(low, low_offset), low_unit, load_f32(scratch.values, v)))
                    store_f32(scratch.values, v + 16, fma(high, high_unit, load_f32(scratch.values, v + 16)))
