"""The jitted half of `gptq.py`: rounds one group of 32 columns, and improves rounded groups.

As in `scale_search.py` a lane holds the group of one row, so plain loops become vector code with one order of every sum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemistral.files.layout import CODE_ZERO, GROUP
from edgemistral.kernels.jit import allocating_entry as entry
from edgemistral.kernels.jit import allocating_inner as inner
from edgemistral.kernels.unroll import registers, unroll, unrolled
from edgemistral_quantize.scale_search import (
    HALF,
    LANES,
    MAX_SCALE,
    ONE,
    TWO,
    ZERO,
    _code,
    _invert,
    _search_scales,
    _search_whole_scales_4,
    _search_whole_scales_8,
    _tile,
)

LEVELS = 16      # of 4 bits; other levels are the codes of 8 bits

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
I8 = NDArray[np.int8]


def round_group(w: F32, weights: F32, levels: F32, unit: F32, upper: F32, errors: F32) -> tuple[U8, I8]:
    """Round one group of all rows, column by column, and feed each error forward: codes (rows, 32), whole scales (rows,).

    levels (16,) ascending, for 4 bits, or -128, -127, ... 127 for 8 bits, the first of which is not used. unit (rows,), > 0,
    of the whole scales. w (rows, 32) is overwritten. upper (32, 32): the group's part of GPTQ's factor. errors (rows, 32)
    receives each error over the factor's diagonal, for the columns after the group.
    """
    codes, whole = np.empty(w.shape, np.uint8), np.empty(len(w), np.int8)
    _round_rows(w, weights, levels, unit, upper, errors, codes, whole)
    return codes, whole


def better_group(codes: U8, whole: I8, gradient: F32, h: F32, levels: F32, unit: F32) -> F32:
    """Change codes (rows, 32) and whole scales (rows,) in place if that lowers the error; returns the change of the weights.

    gradient (rows, 32): the errors w - q of all columns times H, for the group's columns; it is overwritten. h (32, 32): H's
    part for the group. First the best scale for the codes, then each code in turn. No step raises the error.
    """
    change = np.empty(gradient.shape, np.float32)
    _better_rows(codes, whole, gradient, h, levels, unit, change)
    return change


@entry
def _round_rows(w: F32, weights: F32, levels: F32, unit: F32, upper: F32, errors: F32, codes: U8, whole: I8) -> None:
    tile, weight, scale = _tile(np.float32), _tile(np.float32), np.empty(LANES, np.float32)
    units, found, inverse = np.empty(LANES, np.float32), np.empty(LANES, np.int32), np.empty(LANES, np.float32)
    error, wanted, nearest = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    index = np.empty(LANES, np.uint8)
    for first in range(0, w.shape[0], LANES):
        n = min(LANES, w.shape[0] - first)
        _load_rows(w, weights, first, 0, n, tile, weight)
        units[:] = ONE
        for lane in range(n):
            units[lane] = unit[first + lane]
        if len(levels) == LEVELS:
            _search_scales(tile, weight, levels, scale)
            _search_whole_scales_4(tile, weight, levels, scale, units, found)
        else:
            _search_whole_scales_8(tile, weight, units, found)
        _invert(found, units, inverse)
        for lane in range(LANES):
            scale[lane] = np.float32(found[lane]) * units[lane]
        for j in range(GROUP):
            for lane in range(LANES):
                wanted[lane] = tile[j, lane] * inverse[lane]
            _nearest(wanted, levels, nearest, index)
            for lane in range(LANES):
                error[lane] = (tile[j, lane] - nearest[lane] * scale[lane]) / upper[j, j]
            for lane in range(n):
                codes[first + lane, j] = index[lane]
                errors[first + lane, j] = error[lane]
            for k in range(j + 1, GROUP):
                for lane in range(LANES):
                    tile[k, lane] -= error[lane] * upper[j, k]
        for lane in range(n):
            whole[first + lane] = np.int8(found[lane])


@entry
def _better_rows(codes: U8, whole: I8, gradient: F32, h: F32, levels: F32, unit: F32, change: F32) -> None:
    slope, value, push = _tile(np.float32), _tile(np.float32), _tile(np.float32)
    scale, step, inverse = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    index, found = np.empty((GROUP, LANES), np.uint8), np.empty(LANES, np.int32)
    units, wanted, nearest = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for first in range(0, codes.shape[0], LANES):
        n = min(LANES, codes.shape[0] - first)
        units[:] = ZERO
        found[:] = 0
        for lane in range(n):
            units[lane], found[lane] = unit[first + lane], np.int32(whole[first + lane])
        for lane in range(LANES):
            scale[lane] = np.float32(found[lane]) * units[lane]
        for j in range(GROUP):
            for lane in range(LANES):
                slope[j, lane] = gradient[first + lane, j] if lane < n else ZERO
                index[j, lane] = codes[first + lane, j] if lane < n else np.uint8(0)
                value[j, lane] = levels[index[j, lane]]
        _better_scales(slope, value, h, units, found, scale, step, push)
        for j in range(GROUP):
            for lane in range(LANES):
                push[j, lane] = step[lane] * value[j, lane]
        _invert(found, units, inverse)
        for j in range(GROUP):
            for lane in range(LANES):
                wanted[lane] = value[j, lane] + slope[j, lane] / h[j, j] * inverse[lane]
            _nearest(wanted, levels, nearest, index[j])
            for lane in range(LANES):
                step[lane] = scale[lane] * (nearest[lane] - value[j, lane])
                push[j, lane] += step[lane]
            for k in range(GROUP):
                for lane in range(LANES):
                    slope[k, lane] -= step[lane] * h[j, k]
        for lane in range(n):
            whole[first + lane] = np.int8(found[lane])
            for j in range(GROUP):
                codes[first + lane, j] = index[j, lane]
                change[first + lane, j] = push[j, lane]


@inner
def _better_scales(slope, value, h, units, found, scale, step, along):
    """Move each lane's whole scale to the best one for its codes; step: the change of the real scale."""
    moment, energy = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    along[:] = ZERO
    for j in range(GROUP):
        for k in range(GROUP):
            for lane in range(LANES):
                along[k, lane] += value[j, lane] * h[j, k]
    for j in range(GROUP):
        for lane in range(LANES):
            moment[lane] += value[j, lane] * slope[j, lane]
            energy[lane] += value[j, lane] * along[j, lane]
    for lane in range(LANES):
        step[lane] = ZERO
        if units[lane] > ZERO and energy[lane] > ZERO:
            wanted = np.rint((scale[lane] + moment[lane] / energy[lane]) / units[lane])
            wanted = min(max(wanted, np.float32(-MAX_SCALE)), np.float32(MAX_SCALE))
            d = wanted * units[lane] - scale[lane]
            if d * (TWO * moment[lane] - d * energy[lane]) > ZERO:
                step[lane] = d
                found[lane] = np.int32(wanted)
                scale[lane] = wanted * units[lane]
    for j in range(GROUP):
        for lane in range(LANES):
            slope[j, lane] -= step[lane] * along[j, lane]


@inner
def _nearest(wanted, levels, nearest, index):
    """The level nearest to each lane's wanted one, and its index."""
    if len(levels) == LEVELS:
        _nearest_of_16(wanted, levels, nearest, index)
    else:
        for lane in range(LANES):
            nearest[lane] = _code(wanted[lane])
            index[lane] = np.uint8(np.int32(nearest[lane]) + CODE_ZERO)


@inner
@unrolled()
def _nearest_of_16(wanted, levels, nearest, index):
    middle = registers()
    step = registers()
    for k in unroll(15):
        middle[k] = HALF * (levels[k] + levels[k + 1])
        step[k] = levels[k + 1] - levels[k]
    lowest = levels[0]
    for lane in range(LANES):
        v = wanted[lane]
        q = lowest
        i = np.uint8(0)
        for k in unroll(15):
            q += step[k] if v > middle[k] else ZERO
            i += np.uint8(1) if v > middle[k] else np.uint8(0)
        nearest[lane] = q
        index[lane] = i


@inner
def _load_rows(w, weights, first, column, n, tile, weight):
    """A group of `n` rows, a row in each lane, the other lanes 0."""
    for j in range(GROUP):
        for lane in range(LANES):
            tile[j, lane] = w[first + lane, column + j] if lane < n else ZERO
            weight[j, lane] = weights[column + j]
