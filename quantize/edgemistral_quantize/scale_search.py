"""The jitted half of group quantization: finds each group's scale, writes codes and scales in the order of the layout.

It works in **lanes**: the 64 groups of one block (16 rows x 4 groups) lie side by side, lane 16 * group + row, which is also
the order of a block's scale bytes. So the compiler makes vector code of plain loops, every group's sums have one fixed order,
and the result does not depend on threads, strips or the width of vectors. A **tile** holds the 32 weights of each lane,
divided by their row's peak (its largest magnitude), so that nothing can overflow. A scale is  whole * unit:  a number in
-127..127 and a unit that the lanes of a row share.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemistral.files.layout import BLOCK, CODE_ZERO, GROUP, GROUPS, PANEL, SCALE_BYTES
from edgemistral.kernels.jit import allocating_entry as entry
from edgemistral.kernels.jit import allocating_inner as inner
from edgemistral.kernels.unroll import registers, unroll, unrolled

STRETCH = np.linspace(0.8, 1.15, 8, dtype=np.float32)   # places of the largest weight, as shares of the levels' ends
NEIGHBOURS_4 = np.array([0, -1, 1, -2, 2], np.int32)    # whole scales tried around the best real one,
NEIGHBOURS_8 = np.arange(-2, 17, dtype=np.int32)        # and around the smallest one that clips nothing

LANES = PANEL * GROUPS
MAX_SCALE = 127
MAX_CODE = np.float32(127)
UNIT_8 = np.float32(1 / 127**2)                         # 8 bits: a row's peak is code 127 with scale 127
LIMIT_4 = np.float32(np.finfo(np.float32).max / (MAX_SCALE * 65))    # of row scales: all restored weights are finite
LIMIT_8 = np.float32(np.finfo(np.float32).max / (MAX_SCALE * 128))
ZERO, ONE, TWO, HALF = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
MAGNITUDE = np.uint32(0x7FFFFFFF)                       # the bits of a float32 without its sign
ROUND = np.float32(1.5 * 2**23)                         # x + ROUND - ROUND is x rounded to even, for |x| < 2**22

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@entry
def find_peaks(bits: NDArray[np.uint32], peak_bits: NDArray[np.uint32], first: int, last: int) -> None:
    """The largest magnitude of every row of panels first..last: float32 as bits, which compare like the numbers."""
    for row in range(first * PANEL, min(last * PANEL, bits.shape[0])):
        peak = np.uint32(0)
        for c in range(bits.shape[1]):
            magnitude = np.uint32(bits[row, c] & MAGNITUDE)   # numba widens to 64 bits
            if magnitude > peak:
                peak = magnitude
        peak_bits[row] = peak


@entry
def quantize_panels_4(
    w: F32, peaks: F32, weights: F32, levels: F32, packed: U8, row_scales: F32, first: int, last: int
) -> None:
    """Panels first..last of w (rows, cols) -> the same panels of packed and row_scales.

    peaks (panels * 16,), weights of the columns' errors (blocks * 128,), levels (16,) ascending.
    """
    blocks = packed.shape[1]
    tile, weight, codes = _tile(np.float32), _tile(np.float32), _tile(np.uint8)
    scales, unit = np.empty((blocks, LANES), np.float32), np.empty(LANES, np.float32)
    whole, inverse = np.empty(LANES, np.int32), np.empty(LANES, np.float32)
    for panel in range(first, last):
        for block in range(blocks):
            _load(w, peaks, weights, panel, block, tile, weight)
            _search_scales(tile, weight, levels, scales[block])
        for r in range(PANEL):
            top = ZERO
            for block in range(blocks):
                for g in range(GROUPS):
                    top = max(top, abs(scales[block, PANEL * g + r]))
            _set_unit(r, top / np.float32(MAX_SCALE), LIMIT_4, peaks, panel, unit, row_scales)
        for block in range(blocks):
            _load(w, peaks, weights, panel, block, tile, weight)
            _search_whole_scales_4(tile, weight, levels, scales[block], unit, whole)
            _invert(whole, unit, inverse)
            _nearest_levels(tile, inverse, levels, codes)
            _store_scales(whole, packed[panel, block])
            _store_nibbles(codes, packed[panel, block])


@entry
def quantize_panels_8(w: F32, peaks: F32, weights: F32, packed: U8, row_scales: F32, first: int, last: int) -> None:
    """As `quantize_panels_4`, for codes of 8 bits."""
    tile, weight, codes = _tile(np.float32), _tile(np.float32), _tile(np.uint8)
    unit = np.empty(LANES, np.float32)
    whole, inverse = np.empty(LANES, np.int32), np.empty(LANES, np.float32)
    for panel in range(first, last):
        for r in range(PANEL):
            _set_unit(r, UNIT_8, LIMIT_8, peaks, panel, unit, row_scales)
        for block in range(packed.shape[1]):
            _load(w, peaks, weights, panel, block, tile, weight)
            _search_whole_scales_8(tile, weight, unit, whole)
            _invert(whole, unit, inverse)
            _nearest_codes(tile, inverse, codes)
            _store_scales(whole, packed[panel, block])
            _store_bytes(codes, packed[panel, block])


@inner
def _tile(dtype):
    return np.empty((GROUP, LANES), dtype)


@inner
def _load(w, peaks, weights, panel, block, tile, weight):
    """Weights of one block divided by their rows' peaks, 0 beyond w; and the weight of each one's squared error."""
    rows, cols = w.shape
    divisor = np.empty(LANES, np.float32)
    for r in range(PANEL):
        row = PANEL * panel + r
        for g in range(GROUPS):
            lane, first = PANEL * g + r, BLOCK * block + GROUP * g
            divisor[lane] = peaks[row] if peaks[row] > ZERO else ONE
            n = min(max(cols - first, 0), GROUP) if row < rows else 0
            for j in range(n):
                tile[j, lane] = w[row, first + j]
            for j in range(n, GROUP):
                tile[j, lane] = ZERO
    for j in range(GROUP):
        for lane in range(LANES):
            tile[j, lane] /= divisor[lane]
        for g in range(GROUPS):
            column_weight = weights[BLOCK * block + GROUP * g + j]
            for r in range(PANEL):
                weight[j, PANEL * g + r] = column_weight


@inner
def _set_unit(r, wanted, limit, peaks, panel, unit, row_scales):
    """Set the unit of row r's scales in all its lanes, and the row scale."""
    peak = peaks[PANEL * panel + r]
    if peak > ZERO:
        wanted = min(wanted, limit / peak)
    for g in range(GROUPS):
        unit[PANEL * g + r] = wanted
    row_scales[PANEL * panel + r] = wanted * peak


@inner
def _largest(tile, largest):
    """The weight of largest magnitude in each lane, with its sign."""
    largest[:] = ZERO
    for j in range(GROUP):
        for lane in range(LANES):
            if abs(tile[j, lane]) > abs(largest[lane]):
                largest[lane] = tile[j, lane]


@inner
def _search_scales(tile, weight, levels, scale):
    """The real scale of each lane with the least error; 0 if all weights are 0."""
    largest, inverse = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    moment, energy, explained = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    _largest(tile, largest)
    scale[:] = ZERO
    explained[:] = ZERO
    for stretch in STRETCH:
        for end in (levels[0], levels[15]):
            for lane in range(LANES):
                inverse[lane] = stretch * end / largest[lane]
            _project(tile, weight, inverse, levels, moment, energy)
            for lane in range(LANES):   # with the scale moment / energy the error is sum(weight * tile**2) less this:
                better = moment[lane] * moment[lane] / energy[lane]
                if better > explained[lane]:
                    explained[lane] = better
                    scale[lane] = moment[lane] / energy[lane]


@inner
@unrolled()
def _project(tile, weight, inverse, levels, moment, energy):
    """Each lane's sum(weight * tile * q) and sum(weight * q * q), where q is the level nearest to tile * inverse."""
    middle = registers()
    step = registers()
    for k in unroll(15):
        middle[k] = HALF * (levels[k] + levels[k + 1])
        step[k] = levels[k + 1] - levels[k]
    lowest = levels[0]
    moment[:] = ZERO
    energy[:] = ZERO
    for j in range(GROUP):
        for lane in range(LANES):
            x = tile[j, lane]
            v = x * inverse[lane]
            q = lowest
            for k in unroll(15):
                q += step[k] if v > middle[k] else ZERO
            weighted = weight[j, lane] * q
            moment[lane] += weighted * x
            energy[lane] += weighted * q


@inner
@unrolled()
def _nearest_levels(tile, inverse, levels, codes):
    """Index of the level nearest to tile * inverse."""
    middle = registers()
    for k in unroll(15):
        middle[k] = HALF * (levels[k] + levels[k + 1])
    for j in range(GROUP):
        for lane in range(LANES):
            v = tile[j, lane] * inverse[lane]
            index = np.uint8(0)
            for k in unroll(15):
                index += np.uint8(1) if v > middle[k] else np.uint8(0)
            codes[j, lane] = index


@inner
def _search_whole_scales_4(tile, weight, levels, scale, unit, whole):
    """The whole number of units near each lane's real scale with the least error."""
    start, tried = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    inverse, moment, energy = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    error = np.zeros(LANES, np.float32)   # less sum(weight * tile**2), which is that of scale 0
    whole[:] = 0
    for lane in range(LANES):
        start[lane] = np.int32(np.rint(scale[lane] / unit[lane])) if unit[lane] > ZERO else 0
    for d in NEIGHBOURS_4:
        for lane in range(LANES):
            tried[lane] = min(max(start[lane] + d, -MAX_SCALE), MAX_SCALE)
        _invert(tried, unit, inverse)
        _project(tile, weight, inverse, levels, moment, energy)
        for lane in range(LANES):
            s = np.float32(tried[lane]) * unit[lane]
            e = s * (s * energy[lane] - TWO * moment[lane])
            if e < error[lane]:
                error[lane] = e
                whole[lane] = tried[lane]


@inner
def _search_whole_scales_8(tile, weight, unit, whole):
    """The whole number of units with the least error, near the smallest one that clips no weight of the lane."""
    largest, inverse = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    start, tried = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    error, least = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    _largest(tile, largest)
    least[:] = np.float32(np.inf)
    whole[:] = 0
    for lane in range(LANES):
        start[lane] = np.int32(np.ceil(abs(largest[lane]) / (MAX_CODE * unit[lane])))
    for d in NEIGHBOURS_8:
        for lane in range(LANES):
            tried[lane] = min(max(start[lane] + d, 1), MAX_SCALE) if start[lane] > 0 else 0
        _invert(tried, unit, inverse)
        error[:] = ZERO
        for j in range(GROUP):
            for lane in range(LANES):
                x = tile[j, lane]
                rest = x - _code(x * inverse[lane]) * (np.float32(tried[lane]) * unit[lane])
                error[lane] += weight[j, lane] * (rest * rest)
        for lane in range(LANES):
            if error[lane] < least[lane]:
                least[lane] = error[lane]
                whole[lane] = tried[lane]


@inner
def _code(v):
    """v rounded to a whole number in -127..127."""
    return min(max(v, -MAX_CODE), MAX_CODE) + ROUND - ROUND


@inner
def _nearest_codes(tile, inverse, codes):
    """Stored 8-bit codes of tile * inverse."""
    for j in range(GROUP):
        for lane in range(LANES):
            codes[j, lane] = np.uint8(np.int32(_code(tile[j, lane] * inverse[lane])) + CODE_ZERO)


@inner
def _invert(whole, unit, inverse):
    """1 / (whole * unit); 0 if the scale is 0: all weights then get the level nearest to 0."""
    for lane in range(LANES):
        s = np.float32(whole[lane]) * unit[lane]
        inverse[lane] = ONE / s if s != ZERO else ZERO


@inner
def _store_scales(whole, stored):
    for lane in range(LANES):
        stored[lane] = np.uint8(whole[lane])


@inner
def _store_nibbles(codes, stored):
    for g in range(GROUPS):
        for chunk in range(GROUP // 8):
            start = SCALE_BYTES + 4 * PANEL * (GROUP // 8 * g + chunk)
            for r in range(PANEL):
                for k in range(4):
                    low, high = codes[8 * chunk + k, PANEL * g + r], codes[8 * chunk + 4 + k, PANEL * g + r]
                    stored[start + 4 * r + k] = low | high << np.uint8(4)


@inner
def _store_bytes(codes, stored):
    for g in range(GROUPS):
        for chunk in range(GROUP // 4):
            start = SCALE_BYTES + 4 * PANEL * (GROUP // 4 * g + chunk)
            for r in range(PANEL):
                for k in range(4):
                    stored[start + 4 * r + k] = codes[4 * chunk + k, PANEL * g + r]
