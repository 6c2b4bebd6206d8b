"""One step of the online softmax (Milakov and Gimelshein 2018): the scores of ROWS rows with the 64 positions of a block.

All rows go through each operation together. One after another they would wait for their maxima and sums, which go across lanes.
"""

from __future__ import annotations

import numpy as np

from edgemistral.kernels.jit import inlined
from edgemistral.kernels.kv_layout import DIMS, POSITIONS, ROWS
from edgemistral.kernels.simd import (
    add,
    any_above,
    broadcast_i32,
    div,
    exp,
    highest_of_rows,
    lane_numbers_tile,
    load_f32,
    maximum,
    mul,
    prefetch_tile_early,
    round_to_i32,
    splat_f32,
    store_f32,
    store_low_bytes,
    store_tile,
    sub,
    sum_of_vectors,
    tile,
    to_f32,
    to_rows,
    total_of_rows,
    total_of_rows_i32,
    where_between,
    zero_f32,
)

LOWEST = np.float32(-1e30)


@inlined
def values_stride(head_dim):
    """Numbers from one row of the scratch's values to the next: whole registers' worth of dims."""
    return (head_dim + DIMS - 1) // DIMS * DIMS


@inlined
def softmax(s, masked, row, head_dim, scratch):
    """Scores (ROWS x 4) -> e**(score - peak), the weights of the values. If a peak rises, the sums so far are scaled down.

    The rows are row ... row + ROWS - 1 of the scratch. Row r may see the positions first_seen[r] ... last_seen[r] of the
    block; `masked` is true if these are not all.
    """
    if masked:
        s = _where_seen(s, splat_f32(LOWEST), scratch)
    peaks_at = row // ROWS * 16
    top, peak = highest_of_rows(s), load_f32(scratch.peaks, peaks_at)
    if any_above(top, peak):
        top = maximum(top, peak)
        store_f32(scratch.peaks, peaks_at, top)
        shrink, stride = to_rows(exp(sub(peak, top)), ROWS), values_stride(head_dim)
        for d in range(row * stride, row * stride + head_dim, 16):
            values = mul(tile(load_f32, scratch.values, d, ROWS, 1, stride, 0), shrink)
            store_tile(store_f32, scratch.values, d, stride, 0, values)
        sums = mul(tile(load_f32, scratch.sums, 16 * row, ROWS, 1, 16, 0), shrink)
        store_tile(store_f32, scratch.sums, 16 * row, 16, 0, sums)
        peak = top
    p = exp(sub(s, to_rows(peak, ROWS)))
    if masked:
        p = _where_seen(p, zero_f32(), scratch)
    sums = add(tile(load_f32, scratch.sums, 16 * row, ROWS, 1, 16, 0), sum_of_vectors(p))
    store_tile(store_f32, scratch.sums, 16 * row, 16, 0, sums)
    return p


@inlined
def merge_partial(into, other, at, n, head_dim):
    """The softmax of n rows over some positions, merged with that over others. Rows start at 0 and at `at`: whole tiles.

    Either may be the first: the result has the same bits.
    """
    stride = values_stride(head_dim)
    for row in range(0, n, ROWS):
        peaks_at = row // ROWS * 16
        a, b = load_f32(into.peaks, peaks_at), load_f32(other.peaks, at // ROWS * 16 + peaks_at)
        peak = maximum(a, b)
        store_f32(into.peaks, peaks_at, peak)
        a, b = to_rows(exp(sub(a, peak)), ROWS), to_rows(exp(sub(b, peak)), ROWS)
        for d in range(row * stride, row * stride + head_dim, 16):
            values = mul(tile(load_f32, into.values, d, ROWS, 1, stride, 0), a)
            values = add(values, mul(tile(load_f32, other.values, at * stride + d, ROWS, 1, stride, 0), b))
            store_tile(store_f32, into.values, d, stride, 0, values)
        sums = mul(tile(load_f32, into.sums, 16 * row, ROWS, 1, 16, 0), a)
        sums = add(sums, mul(tile(load_f32, other.sums, 16 * (at + row), ROWS, 1, 16, 0), b))
        store_tile(store_f32, into.sums, 16 * row, 16, 0, sums)


@inlined
def copy_partial(to, to_row, other, at, n, head_dim):
    """Copy n rows, in whole tiles, from row `at` of `other` to row `to_row` of `to`."""
    stride = values_stride(head_dim)
    for row in range(0, n, ROWS):
        store_f32(to.peaks, (to_row + row) // ROWS * 16, load_f32(other.peaks, (at + row) // ROWS * 16))
        for r in range(row, row + ROWS):
            store_f32(to.sums, 16 * (to_row + r), load_f32(other.sums, 16 * (at + r)))
            for d in range(0, head_dim, 16):
                store_f32(to.values, (to_row + r) * stride + d, load_f32(other.values, (at + r) * stride + d))


@inlined
def softmax_in_codes(s, masked, value_scales, ahead, quarter, row, head_dim, scratch):
    """`softmax` times the values' scales (64 float32 at address `value_scales`), rounded to u8 in `scratch.codes`.

    -> the unit of each row's codes, chosen so that they keep their sum, and the sum of the codes, both in lane r of a vector.
    Meanwhile 4 * `quarter` bytes at address `ahead` are prefetched: without these, memory would be idle.
    """
    _prefetch(ahead, quarter)
    p = mul(softmax(s, masked, row, head_dim, scratch), tile(load_f32, value_scales, 0, 1, 4, 0, 64))
    if masked:                 # scales that were never written may not be numbers
        p = _where_seen(p, zero_f32(), scratch)
    _prefetch(ahead + quarter, quarter)
    top = maximum(highest_of_rows(p), splat_f32(np.float32(1e-30)))
    _prefetch(ahead + 2 * quarter, quarter)
    n = round_to_i32(mul(p, to_rows(div(splat_f32(np.float32(255)), top), ROWS)))
    store_tile(store_low_bytes, scratch.codes, 0, POSITIONS, 16, n)
    _prefetch(ahead + 3 * quarter, quarter)
    codes = to_f32(total_of_rows_i32(n))
    return div(total_of_rows(p), maximum(codes, splat_f32(np.float32(1)))), codes


@inlined
def _prefetch(ahead, size):
    """Ask for `size` bytes at address `ahead`, rounded up to 512."""
    for at in range(0, size, 512):
        prefetch_tile_early(ahead, at, 8, 1, 64, 0)


@inlined
def _where_seen(a, b, scratch):
    """a at the positions of the block that each row may see, b elsewhere."""
    first = tile(broadcast_i32, scratch.first_seen, 0, ROWS, 1, 1, 0)
    last = tile(broadcast_i32, scratch.last_seen, 0, ROWS, 1, 1, 0)
    return where_between(lane_numbers_tile(1, 4), first, last, a, b)
