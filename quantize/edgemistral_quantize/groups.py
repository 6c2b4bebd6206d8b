"""Group quantization: from float32 rows to the packed panels of `edgemistral.files.layout`.

A weight becomes  row_scale * group_scale * value : a float32 for the row, a signed byte for each group of 32 columns,
and a value that is one of 16 levels (4 bits) or a code in -127..127 (8 bits). A search (`scale_search.py`) minimises the
squared error, weighted by the columns' importance if it is known:

    4 bits  The 16 levels are not symmetric, so a group's scale may be negative. Its largest weight is placed at 8
            positions around either end of the levels. For each position all weights go to their nearest level, and least
            squares gives the best scale: sum(w q) / sum(q q). The largest scale of a row becomes 127, and each group takes
            the best of the five whole numbers around its own scale.
    8 bits  The largest weight of a row becomes 127 * 127, and each group takes the best of 19 whole numbers from
            just below the smallest one that clips none of its weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgemistral.files.layout import BLOCK, BLOCK_BYTES, LEVEL_ZERO, PANEL, round_up
from edgemistral_quantize.scale_search import find_peaks, quantize_panels_4, quantize_panels_8

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# Fitted to Gaussian and slightly heavier-tailed groups, as in trained weights: `python bench/quantization_error.py --fit`.
DEFAULT_LEVELS = (-62, -49, -38, -30, -23, -17, -11, -6, -1, 4, 9, 14, 20, 27, 35, 47)


def default_levels() -> U8:
    """The 16 levels as a blob stores them: uint8 (64,), 64 added to each, repeated four times."""
    return stored_levels(DEFAULT_LEVELS)


def stored_levels(levels: Sequence[int]) -> U8:
    """16 ascending whole numbers in -64..63 -> uint8 (64,) as a blob stores them."""
    return np.tile((np.array(levels) + LEVEL_ZERO).astype(np.uint8), 4)


def quantize_rows(
    w: F32, bits: int, levels: U8 | None = None, importance: F32 | None = None, threads: int | None = None
) -> tuple[U8, F32]:
    """Quantize a strip of a matrix; strips of whole panels (16 rows) give the same bytes as the matrix at once.

    w           float32 (rows, cols), C-contiguous, finite
    bits        4 or 8
    levels      uint8 (64,) as a blob stores them, for 4 bits only; None stands for `default_levels()`
    importance  float32 (cols,), finite, >= 0: the weight of each column's squared error; None: equal weights
    threads     None: one for every CPU

    Returns packed uint8 (panels, blocks, bytes of a block) and row scales float32 (panels * 16,), for rows padded to a
    panel and columns to a block. Padded rows and wholly padded groups have scale 0. Raises ValueError for arguments of
    another type, shape or range.
    """
    if bits not in BLOCK_BYTES:
        raise ValueError(f"bits is {bits}; supported: {' and '.join(map(str, BLOCK_BYTES))}")
    if bits == 8:
        return quantize_to_levels(w, None, importance, threads)
    stored = default_levels() if levels is None else levels
    values = stored[:16].astype(np.float32) - LEVEL_ZERO
    if stored.shape != (64,) or stored.max() > 127 or (np.diff(values) < 0).any() or not values.any():
        raise ValueError("levels must be 16 ascending bytes in 0..127, four times over")
    return quantize_to_levels(w, values, importance, threads)


def quantize_to_levels(
    w: F32, levels: F32 | None, importance: F32 | None = None, threads: int | None = None
) -> tuple[U8, F32]:
    """`quantize_rows` for levels that are float32 (16,), also with fractions; None means 8 bits."""
    if w.ndim != 2 or w.dtype != np.float32 or not w.flags.c_contiguous or w.size == 0:
        raise ValueError("the weights must be a C-contiguous float32 matrix")
    rows, cols = w.shape
    weights = _column_weights(importance, cols)
    w = w.view()
    w.flags.writeable = False    # numba would compile again for writable arrays

    panels, blocks = round_up(rows, PANEL) // PANEL, round_up(cols, BLOCK) // BLOCK
    packed = np.empty((panels, blocks, BLOCK_BYTES[8 if levels is None else 4]), np.uint8)
    peaks, row_scales = np.zeros(panels * PANEL, np.float32), np.empty(panels * PANEL, np.float32)
    threads = min(threads or os.cpu_count() or 1, panels)
    bounds = [panels * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:

        def share(kernel: Callable[..., None], *args: object) -> None:
            list(pool.map(partial(kernel, *args), bounds, bounds[1:]))

        share(find_peaks, w.view(np.uint32), peaks.view(np.uint32))
        if not np.isfinite(peaks).all():
            raise ValueError(f"row {np.argmin(np.isfinite(peaks))} of the weights holds a NaN or an infinity")
        if levels is None:
            share(quantize_panels_8, w, peaks, weights, packed, row_scales)
        else:
            share(quantize_panels_4, w, peaks, weights, levels, packed, row_scales)
    return packed, row_scales


def _column_weights(importance: F32 | None, cols: int) -> F32:
    """Weights of the columns' errors, 1 on average, 0 for padded columns: float32 (cols rounded up to a block,).

    A real column has a weight of at least a millionth, so that each group has a scale.
    """
    weights = np.zeros(round_up(cols, BLOCK), np.float32)
    if importance is None:
        weights[:cols] = 1
        return weights
    if importance.shape != (cols,) or not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise ValueError(f"importance must be {cols} finite numbers >= 0")
    mean = importance.mean(dtype=np.float64)
    weights[:cols] = np.maximum(importance / mean, 1e-6) if mean > 0 else 1
    return weights
