"""Quantize column by column, and let the columns to come make up for each one's error: GPTQ (arXiv 2210.17323).

For a matrix W whose inputs have the second moments H = E[x x^T], the columns are rounded in their order. The error of a
column, over the diagonal of the factor U (H^-1 = U^T U, U upper), is fed forward: column k loses  error * U[j, k]. The scale
of each group of 32 columns is searched when its turn comes, on weights that are corrected already, with H's diagonal as the
weight of each column's error. Codes and scales are those of `groups.py`: 4 bits, whole scales on the row's unit.

Matrices wider than `MOST_COLUMNS` are cut in parts, whose errors stay within them: a factor of all the 14,336 columns of a
7B's w2 would not fit the memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.files import layout
from edgemistral.files.layout import BLOCK, GROUP, LEVEL_ZERO, PANEL, round_up
from edgemistral_quantize.scale_search import LIMIT_4, MAX_SCALE, round_group, search_groups

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]

MOST_COLUMNS = 4096
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)   # of the mean diagonal, added to it; the next one where Cholesky fails
ROWS = 256                              # of a matrix in one product, whatever the memory and the threads

Map = Callable[..., Iterable[object]]   # as Python's own, in several threads


def parts(cols: int) -> list[slice]:
    """The columns of a matrix in equal parts of whole groups, at most `MOST_COLUMNS` each."""
    n = -(-cols // MOST_COLUMNS)
    bounds = [cols // GROUP * i // n * GROUP for i in range(n + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


class Moments:
    """Sums of x^T x over the inputs x of one matrix, in its parts."""

    def __init__(self, cols: int) -> None:
        self.parts = parts(cols)
        self.sums = [np.zeros((part.stop - part.start,) * 2, np.float32) for part in self.parts]

    def add(self, x: F32, map_: Map) -> None:
        """Of one window (tokens, cols). Call it in the order of the windows."""
        for part, total in zip(self.parts, self.sums, strict=True):
            inputs = np.ascontiguousarray(x[:, part])

            def add(first: int, inputs: F32 = inputs, total: F32 = total) -> None:
                total[first : first + ROWS] += inputs[:, first : first + ROWS].T @ inputs

            list(map_(add, range(0, len(total), ROWS)))


@dataclass(frozen=True)
class Factors:
    """What rounding a matrix needs of its moments: of each part U, float32; and of each column H's diagonal, (cols,)."""

    parts: Sequence[slice]
    upper: Sequence[F32]
    diagonal: F32

    @classmethod
    def of(cls, moments: Moments, columns: F32) -> Factors:
        """For inputs that are divided by `columns` (cols,)."""
        upper: list[F32] = []
        diagonal: list[F32] = []
        for part, total in zip(moments.parts, moments.sums, strict=True):
            h = total / (columns[part, None] * columns[part])
            diagonal.append(np.diagonal(h).astype(np.float32))
            upper.append(_factor(h))
        return cls(moments.parts, upper, np.concatenate(diagonal))


def _factor(h: F32) -> F32:
    """U, upper, with U^T U the inverse of h, damped."""
    mean = float(np.diagonal(h).mean(dtype=np.float64))
    if not mean > 0:   # nothing ever came in
        return np.eye(len(h), dtype=np.float32)
    turned = h[::-1, ::-1].astype(np.float64) / mean
    diagonal = np.diagonal(turned).copy()
    for damping in DAMPING:
        np.fill_diagonal(turned, diagonal + damping)
        try:   # turning rows and columns round makes the lower factor of h the upper one of its inverse
            return np.ascontiguousarray(np.linalg.inv(np.linalg.cholesky(turned))[::-1, ::-1], np.float32)
        except np.linalg.LinAlgError:
            continue
    return np.eye(len(h), dtype=np.float32)


def work_bytes(config: ModelConfig) -> int:
    """Memory of a layer's moments and of the largest factor while it is made, with what one matrix needs to be rounded."""
    widths = (config.dim, config.q_dim, config.dim, config.hidden_dim)
    sizes: list[list[int]] = [[part.stop - part.start for part in parts(cols)] for cols in widths]
    largest = max(max(matrix) for matrix in sizes)
    moments, factors = sum(n * n for matrix in sizes for n in matrix), max(sum(n * n for n in matrix) for matrix in sizes)
    return 4 * (moments + factors) + 28 * largest * largest


def quantize_rows(w: F32, levels: U8, factors: Factors) -> tuple[U8, F32]:
    """At most `ROWS` rows of a matrix, float32 (rows, cols), cols a multiple of 32 -> packed bytes and row scales.

    As `groups.quantize_rows` returns them for 4 bits.
    """
    rows, cols = w.shape
    padded_rows, padded_cols = round_up(rows, PANEL), round_up(cols, BLOCK)
    values = levels[:16].astype(np.float32) - LEVEL_ZERO
    peaks = np.abs(w).max(axis=1)
    rest = w / np.where(peaks > 0, peaks, np.float32(1))[:, None]
    weights = _column_weights(factors.diagonal)
    scales = np.zeros((padded_rows, padded_cols // GROUP), np.int8)
    codes = np.full((padded_rows, padded_cols), np.abs(values).argmin(), np.uint8)
    top = search_groups(rest, weights, values)
    with np.errstate(divide="ignore", over="ignore"):
        unit = np.minimum(top / np.float32(MAX_SCALE), np.where(peaks > 0, LIMIT_4 / peaks, np.float32(np.inf)))
    unit = unit.astype(np.float32)
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
    row_scales = np.zeros(padded_rows, np.float32)
    row_scales[:rows] = unit * peaks
    return layout.pack(codes, scales, 4), row_scales


def _column_weights(diagonal: F32) -> F32:
    """1 on average, at least a millionth."""
    mean = diagonal.mean(dtype=np.float64)
    return np.maximum(diagonal / mean, 1e-6).astype(np.float32) if mean > 0 else np.ones_like(diagonal)
