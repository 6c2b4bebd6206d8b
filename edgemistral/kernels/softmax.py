"""One step of the online softmax (Milakov and Gimelshein 2018): the scores of one row with the 64 positions of a block."""

from __future__ import annotations

import numpy as np

from edgemistral.kernels.jit import inlined
from edgemistral.kernels.simd import (
    add,
    add_i32,
    exp,
    highest,
    lane_numbers,
    load_f32,
    maximum,
    mul,
    round_to_i32,
    splat_f32,
    store_f32,
    store_low_bytes,
    sub,
    total,
    total_i32,
    where_between,
    zero_f32,
)
from edgemistral.kernels.unroll import registers, static, unroll, unrolled

LOWEST = np.float32(-1e30)


def _make_softmax(IN_CODES):
    @inlined
    @unrolled(IN_CODES=IN_CODES)
    def softmax(s0, s1, s2, s3, first, last, masked, value_scales, row, head_dim, scratch):
        """Scores -> weights of the values, in row r = row % 4 of the probabilities; returns their unit, and their sum.

        Row `row` of the scratch may see the positions first ... last of the block; `masked` is true if these are not all.
        `softmax_in_codes` multiplies probabilities by the values' scales, 64 float32 at address `value_scales`, and rounds
        the products to u8, in a unit chosen so that they keep their sum.
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
        if static(not IN_CODES):
            for p in unroll(4):
                store_f32(scratch.probabilities, 64 * r + 16 * p, s[p])
            return np.float32(1), np.int32(0)
        for p in unroll(4):
            s[p] = mul(s[p], load_f32(value_scales, 64 * p))
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
        return weight / np.float32(max(codes, np.int32(1))), codes
    return softmax


@inlined
def _where_seen(panel, first, last, a, b):
    """a at the positions first ... last of a block, b elsewhere, of the 16 positions of one panel."""
    return where_between(lane_numbers(), np.int32(first - 16 * panel), np.int32(last - 16 * panel), a, b)


softmax, softmax_in_codes = _make_softmax(0), _make_softmax(1)
