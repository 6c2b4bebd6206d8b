"""Quantizes column by column, and lets later columns compensate each error: GPTQ (arXiv 2210.17323).

For a matrix W whose inputs have the second moments H = E[x x^T], the columns are rounded in order. The error of a column j,
over the diagonal of the factor U (H^-1 = U^T U, U upper), is fed forward: column k loses  error * U[j, k]. The scale of each
group of 32 columns is searched in its turn, on weights that are already corrected, with H's diagonal as the weight of each
column's error. Codes and scales are those of `groups.py`: 4 or 8 bits, whole scales on the row's unit. Then every group is
improved in turn, `SWEEPS` times over all columns: its scale by least squares, and each code while the others are fixed. No step
raises the error  tr((W - Q) H (W - Q)^T).

A matrix is cut into parts of columns; errors stay within a part. Parts of `MOST_COLUMNS["fast"]` cost little more than no
feedback, and have most of its effect. Those of "full" are as large as the memory allows: a factor of all 14,336 columns of a
7B's w2 would not fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.files import layout
from edgemistral.files.layout import BLOCK, CODE_ZERO, GROUP, LEVEL_ZERO, PANEL, round_up
from edgemistral_quantize.column_search import better_group, round_group
from edgemistral_quantize.scale_search import LIMIT_4, LIMIT_8, MAX_SCALE, UNIT_8

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
I8 = NDArray[np.int8]

MOST_COLUMNS = {"fast": 512, "full": 4096}   # of a part
SWEEPS = {"fast": 0, "full": 3}
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)   # share of the mean diagonal, added to it; the next one if Cholesky fails
ROWS = 256                              # of a matrix in one product, for any memory and threads
COPIES = 6                              # most copies of its rows while they are rounded

Map = Callable[..., Iterable[object]]   # Python's `map`, in several threads


def parts(cols: int, method: str) -> list[slice]:
    """The columns of a matrix in equal parts of whole groups, at most `MOST_COLUMNS` each."""
    n = -(-cols // MOST_COLUMNS[method])
    bounds = [cols // GROUP * i // n * GROUP for i in range(n + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


class Moments:
    """Sums of x^T x over the inputs x of one matrix, in its parts; below the diagonal only `whole` fills them in."""

    def __init__(self, cols: int, method: str) -> None:
        self.method, self.parts = method, parts(cols, method)
        self.sums = [np.zeros((part.stop - part.start,) * 2, np.float32) for part in self.parts]

    def add(self, x: F32, map_: Map) -> None:
        """Add one window (tokens, cols). Call it in the order of the windows."""
        def add(piece: tuple[slice, F32, int]) -> None:
            part, total, first = piece
            inputs = x[:, part]
            total[first : first + ROWS, first:] += inputs[:, first : first + ROWS].T @ inputs[:, first:]

        list(map_(add, ((part, total, first) for part, total in zip(self.parts, self.sums, strict=True)
                        for first in range(0, len(total), ROWS))))

    def whole(self) -> list[F32]:
        """The sums, symmetric."""
        for total in self.sums:
            for first in range(0, len(total), ROWS):
                last = first + ROWS
                total[last:, first:last] = total[first:last, last:].T
        return self.sums


@dataclass(frozen=True)
class Factors:
    """The moments in the form that rounding needs: U and damped H of each part, and H's diagonal (cols,)."""

    parts: Sequence[slice]
    upper: Sequence[F32]
    h: Sequence[F32]
    diagonal: F32
    sweeps: int

    @classmethod
    def of(cls, moments: Moments, columns: F32, samples: float, map_: Map = map) -> Factors:
        """For inputs divided by `columns` (cols,), measured on `samples` different ones. Overwrites the moments."""
        def of_part(part: slice, h: F32) -> tuple[F32, F32]:
            h /= columns[part, None]
            h /= columns[part]
            diagonal = np.diagonal(h).astype(np.float32)
            _shrink(h, samples)
            return _factor(h), diagonal

        upper, diagonal = zip(*map_(of_part, moments.parts, moments.whole()), strict=True)
        return cls(moments.parts, upper, moments.sums, np.concatenate(diagonal), SWEEPS[moments.method])


def _shrink(h: F32, samples: float) -> None:
    """Shrink the columns' products, in place, towards 0 by their share of chance.

    The share is that of Ledoit and Wolf ("A well-conditioned estimator for large-dimensional covariance matrices", 2004)
    for normal inputs and the diagonal as the target. Correlated columns of a trained model change little. Columns of random
    weights, which seem correlated on a text with few different tokens, become independent.
    """
    diagonal = np.diagonal(h).astype(np.float64)
    of_all = float(np.einsum("ij,ij->", h, h, dtype=np.float64))
    of_products = of_all - float((diagonal**2).sum())
    if of_products > 0:
        chance = (float(diagonal.sum()) ** 2 + of_all) / samples
        h *= np.float32(max(0.0, 1 - chance / of_products))
        np.fill_diagonal(h, diagonal)


def _factor(h: F32) -> F32:
    """U, upper, with U^T U the inverse of h; h is scaled to a mean diagonal of 1, and damped."""
    mean = np.diagonal(h).mean(dtype=np.float64)
    if not mean >= np.finfo(np.float32).tiny:   # all inputs were 0, or too small for their squares
        h[:] = 0
        np.fill_diagonal(h, 1)
        return np.eye(len(h), dtype=np.float32)
    h /= np.float32(mean)
    turned = h[::-1, ::-1].astype(np.float64)
    diagonal = np.diagonal(turned).copy()
    for damping in DAMPING:
        np.fill_diagonal(turned, diagonal + damping)
        try:   # reversing rows and columns makes the lower factor of h the upper one of its inverse
            upper = np.ascontiguousarray(np.linalg.inv(np.linalg.cholesky(turned))[::-1, ::-1], np.float32)
        except np.linalg.LinAlgError:
            continue
        np.fill_diagonal(h, np.diagonal(h) + np.float32(damping))
        return upper
    h[:] = 0
    np.fill_diagonal(h, 1)
    return np.eye(len(h), dtype=np.float32)


def work_bytes(config: ModelConfig, method: str) -> int:
    """Memory of a layer's moments, of the largest factor while it is made, and of rounding one matrix."""
    widths = (config.dim, config.q_dim, config.dim, config.hidden_dim)
    sizes: list[list[int]] = [[part.stop - part.start for part in parts(cols, method)] for cols in widths]
    largest = max(max(matrix) for matrix in sizes)
    moments, factors = sum(n * n for matrix in sizes for n in matrix), max(sum(n * n for n in matrix) for matrix in sizes)
    return 4 * (moments + factors) + _factor_bytes(largest) + _tile_bytes(max(widths))


def factors_at_once(moments: Moments, threads: int, spare: int) -> int:
    """How many threads may make factors within `work_bytes` plus `spare` bytes."""
    return max(1, min(threads, 1 + spare // _factor_bytes(max(map(len, moments.sums)))))


def _factor_bytes(n: int) -> int:
    return 28 * n * n


def tiles_at_once(cols: int, threads: int, spare: int) -> int:
    """How many threads may round rows of a matrix within `work_bytes` plus `spare` bytes, while the next rows wait."""
    return max(1, min(threads, 1 + (spare - 4 * ROWS * cols) // _tile_bytes(cols)))


def _tile_bytes(cols: int) -> int:
    return 4 * COPIES * ROWS * cols


def quantize_rows(w: F32, levels: U8 | None, factors: Factors) -> tuple[U8, F32]:
    """At most `ROWS` rows of a matrix, float32 (rows, cols), cols a multiple of 32 -> packed bytes and row scales.

    As `groups.quantize_rows` returns them: for 4 bits with `levels`, for 8 bits if they are None.
    """
    rows, cols = w.shape
    padded_rows, padded_cols = round_up(rows, PANEL), round_up(cols, BLOCK)
    stored, zero = (np.arange(256), CODE_ZERO) if levels is None else (levels[:16], LEVEL_ZERO)
    values = stored.astype(np.float32) - np.float32(zero)
    peaks = np.abs(w).max(axis=1)
    exact = w / np.where(peaks > 0, peaks, np.float32(1))[:, None]
    rest = exact.copy()
    weights = _column_weights(factors.diagonal)
    scales = np.zeros((padded_rows, padded_cols // GROUP), np.int8)
    codes = np.full((padded_rows, padded_cols), np.abs(values).argmin(), np.uint8)
    # The largest whole scale puts the row's peak, which is 1 here, at the nearer end of the values.
    wanted, limit = (UNIT_8, LIMIT_8) if levels is None else (1 / min(abs(values[0]), values[-1]) / MAX_SCALE, LIMIT_4)
    with np.errstate(divide="ignore", over="ignore"):
        unit = np.minimum(np.float32(wanted), limit / peaks).astype(np.float32)
    for part, upper in zip(factors.parts, factors.upper, strict=True):
        own = rest[:, part]
        for block in range(0, own.shape[1], BLOCK):
            end = min(block + BLOCK, own.shape[1])
            errors = np.empty((rows, end - block), np.float32)
            for first in range(block, end, GROUP):
                last, column = first + GROUP, part.start + first
                error = errors[:, first - block : last - block]
                codes[:rows, column : column + GROUP], scales[:rows, column // GROUP] = round_group(
                    np.ascontiguousarray(own[:, first:last]), weights[column : column + GROUP], values, unit,
                    np.ascontiguousarray(upper[first:last, first:last]), error,
                )
                own[:, last:end] -= error @ upper[first:last, last:end]
            own[:, end:] -= errors @ upper[block:end, end:]
    for part, h in zip(factors.parts, factors.h, strict=True):
        groups = slice(part.start // GROUP, part.stop // GROUP)
        _better(exact[:, part], codes[:rows, part], scales[:rows, groups], values, unit, h, factors.sweeps)
    row_scales = np.zeros(padded_rows, np.float32)
    row_scales[:rows] = unit * peaks
    return layout.pack(codes, scales, 8 if levels is None else 4), row_scales


def _better(exact: F32, codes: U8, scales: I8, values: F32, unit: F32, h: F32, sweeps: int) -> None:
    """Improve codes and whole scales of one part of the rows, in place."""
    if not sweeps:
        return
    gradient = (exact - values[codes] * (np.repeat(scales.astype(np.float32), GROUP, axis=1) * unit[:, None])) @ h
    for _ in range(sweeps):
        for block in range(0, len(h), BLOCK):
            end = min(block + BLOCK, len(h))
            change = np.empty((len(exact), end - block), np.float32)
            for first in range(block, end, GROUP):
                own, whole = slice(first, first + GROUP), np.ascontiguousarray(scales[:, first // GROUP])
                code = np.ascontiguousarray(codes[:, own])
                near = better_group(code, whole, np.ascontiguousarray(gradient[:, own]),
                                    np.ascontiguousarray(h[own, own]), values, unit)
                codes[:, own], scales[:, first // GROUP], change[:, first - block : first - block + GROUP] = code, whole, near
                gradient[:, block:end] -= near @ h[own, block:end]
            gradient[:, :block] -= change @ h[block:end, :block]
            gradient[:, end:] -= change @ h[block:end, end:]


def _column_weights(diagonal: F32) -> F32:
    """1 on average, at least a millionth."""
    mean = diagonal.mean(dtype=np.float64)
    return np.maximum(diagonal / mean, 1e-6).astype(np.float32) if mean > 0 else np.ones_like(diagonal)
