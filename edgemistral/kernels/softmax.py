"""One step of the online softmax (Milakov and Gimelshein 2018): the scores of ROWS rows with the 64 positions of a block."""

from __future__ import annotations

import numpy as np

from edgemistral.kernels.jit import inlined
from edgemistral.kernels.kv_layout import DIMS, POSITIONS, ROWS
from edgemistral.kernels.simd import (
    add,
    exp,
    highest,
    lane_numbers_tile,
    load_f32,
    mul,
    round_to_i32,
    row_of,
    splat_f32,
    store_f32,
    store_low_bytes,
    store_tile,
    sub,
    sum_of_vectors,
    tile,
    total,
    total_i32,
    where_between,
    zero_f32,
)
from edgemistral.kernels.unroll import unroll, unrolled

LOWEST = np.float32(-1e30)


@inlined
def values_stride(head_dim):
    """Numbers from one row of the scratch's values to the next: whole registers' worth of dims."""
    return (head_dim + DIMS - 1) // DIMS * DIMS


@inlined
@unrolled(ROWS=ROWS)
def softmax(s, first_seen, last_seen, masked, row, head_dim, scratch):
    """Scores (ROWS x 4) -> weights of the values in `scratch.probabilities`.

    Row `row + r` of the scratch may see the positions first_seen[r] ... last_seen[r] of the block; `masked` is true if these
    are not all.
    """
    for r in unroll(ROWS):
        p = _weigh(row_of(s, r), first_seen[r], last_seen[r], masked, row + r, head_dim, scratch)
        store_tile(store_f32, scratch.probabilities, POSITIONS * r, 0, 16, p)


@inlined
@unrolled(ROWS=ROWS)
def softmax_in_codes(s, first_seen, last_seen, masked, value_scales, row, head_dim, scratch):
    """`softmax` times the values' scales (64 float32 at address `value_scales`), rounded to u8 in `scratch.codes`.

    The codes of a row have a unit, chosen so that they keep their sum: units[r]. units[ROWS + r] is the sum of the codes.
    """
    for r in unroll(ROWS):
        _weigh_in_codes(row_of(s, r), first_seen[r], last_seen[r], masked, value_scales, row + r, head_dim, scratch)


@inlined
def _weigh_in_codes(s, first, last, masked, value_scales, row, head_dim, scratch):
    """`softmax_in_codes` of one row, which is row % ROWS of its tile."""
    r = row % ROWS             # not an argument: numba compiles a function anew for each literal number
    p = mul(_weigh(s, first, last, masked, row, head_dim, scratch), tile(load_f32, value_scales, 0, 1, 4, 0, 64))
    if masked:                 # scales that were never written may not be numbers
        p = _where_seen(first, last, p, zero_f32())
    top = max(highest(p), np.float32(1e-30))
    n = round_to_i32(mul(p, splat_f32(np.float32(255) / top)))
    store_tile(store_low_bytes, scratch.codes, POSITIONS * r, 0, 16, n)
    codes = total_i32(n)
    scratch.units[r] = total(p) / np.float32(max(codes, np.int32(1)))
    scratch.units[ROWS + r] = codes


@inlined
def _weigh(s, first, last, masked, row, head_dim, scratch):
    """e**(score - peak) of one row's positions. If its peak rises, the sums so far are scaled down."""
    if masked:
        s = _where_seen(first, last, s, splat_f32(LOWEST))
    top, peak = highest(s), scratch.peaks[row]
    denominator = load_f32(scratch.sums, 16 * row)
    if top > peak:
        shrink = exp(splat_f32(peak - top))
        at = row * values_stride(head_dim)
        for d in range(at, at + head_dim, 16):
            store_f32(scratch.values, d, mul(load_f32(scratch.values, d), shrink))
        denominator = mul(denominator, shrink)
        peak = top
        scratch.peaks[row] = top
    p = exp(sub(s, splat_f32(peak)))
    if masked:
        p = _where_seen(first, last, p, zero_f32())
    store_f32(scratch.sums, 16 * row, add(denominator, sum_of_vectors(p)))
    return p


@inlined
def _where_seen(first, last, a, b):
    """a at the positions first ... last of a block, b elsewhere."""
    return where_between(lane_numbers_tile(1, 4), np.int32(first), np.int32(last), a, b)
