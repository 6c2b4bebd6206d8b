"""Chooses the matrices with 8 bits if the average may be more than 4, by measuring one matrix at a time.

A part of the calibration text passes every layer unchanged, and once for each of its matrices with only that matrix rounded to
4 bits. The change of the states after the layer, relative to their size, is the matrix's sensitivity. The matrices that gain
most for each byte get 8 bits, until the budget is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.errors import BadInput
from edgemistral.files import layout
from edgemistral.files.bf16 import widen
from edgemistral.files.layout import BLOCK, BLOCK_BYTES, PANEL, Matrix, Recipe
from edgemistral_quantize.calibrate import CalibrationPass, Source
from edgemistral_quantize.groups import default_levels, quantize_rows

WINDOWS = 2   # of the calibration text: about a thousand states are compared, which is enough
LEAST, MOST = (8 * BLOCK_BYTES[bits] / (PANEL * BLOCK) for bits in (4, 8))   # bits of a weight with its scales


def check_bits(bits: float) -> None:
    """Raises BadInput if 4 and 8 bits cannot give the average `bits`."""
    if not (isinstance(bits, (int, float)) and math.isfinite(bits) and LEAST < bits < MOST):
        raise BadInput(f"bits is {bits}; supported: 4, 8, and averages between {LEAST} and {MOST}, such as 4.5")


def choose(
    source: Source, windows: list[NDArray[np.int32]], bits: float, output_bits: int, strip_bytes: int,
    progress: Callable[[int], object],
) -> Recipe:
    """The recipe whose layers have at most `bits` bits per weight on average, with scales and without padding."""
    return spend(source.config, sensitivities(source, windows[:WINDOWS], strip_bytes, progress), bits, output_bits)


def sensitivities(
    source: Source, windows: list[NDArray[np.int32]], strip_bytes: int, progress: Callable[[int], object]
) -> dict[str, float]:
    """By the name of each layer's matrices: the mean relative squared change of the states by its 4 bits."""
    run = CalibrationPass(source, windows, len(windows), strip_bytes, progress)
    found: dict[str, float] = {}
    try:
        for layer in range(source.config.n_layers):
            before = [x.copy() for x in run.states]
            met = run.pass_layer(layer).mean_squares
            for matrix in layout.layer_matrices(source.config, layer, Recipe(4)):
                part = matrix.name.rpartition(".")[2]
                rounded = _Rounded(source, matrix, met[part].astype(np.float32))
                trial = CalibrationPass(rounded, [], len(windows), strip_bytes, progress)
                trial.states = [x.copy() for x in before]
                try:
                    trial.pass_layer(layer)
                finally:
                    trial.close()
                changes = (_change(x, y) for x, y in zip(run.states, trial.states, strict=True))
                found[matrix.name] = float(np.concatenate(list(changes)).mean(dtype=np.float64))
    finally:
        run.close()
    return found


def spend(config: ModelConfig, sensitivity: Mapping[str, float], bits: float, output_bits: int) -> Recipe:
    """Give 8 bits to the matrices that gain most for each byte, while the layers' average is at most `bits`."""
    matrices = [m for layer in range(config.n_layers) for m in layout.layer_matrices(config, layer, Recipe(4))]
    sizes = {m.name: m.panels * m.blocks for m in matrices}                 # in blocks
    left = (bits - LEAST) / (MOST - LEAST) * sum(sizes.values()) + 1e-6
    eight: set[str] = set()
    for name in sorted(sizes, key=lambda name: -sensitivity[name] / sizes[name]):
        if sizes[name] <= left:
            left -= sizes[name]
            eight.add(name)
    return Recipe(4, output_bits, tuple(name for name in sizes if name in eight))


class _Rounded:
    """A checkpoint with one matrix rounded to 4 bits."""

    def __init__(self, source: Source, matrix: Matrix, importance: NDArray[np.float32]) -> None:
        self.config, self._source, self._matrix, self._importance = source.config, source, matrix, importance

    def strips(self, name: str, strip_bytes: int) -> Iterator[NDArray[Any]]:
        """As the checkpoint's."""
        for strip in self._source.strips(name, strip_bytes):
            if name != self._matrix.name:
                yield strip
                continue
            rows = np.ascontiguousarray(widen(strip))
            packed, row_scales = quantize_rows(rows, 4, None, self._importance)
            yield layout.dequantize(packed, row_scales, default_levels())[: len(rows), : rows.shape[1]]


def _change(exact: NDArray[np.float32], got: NDArray[np.float32]) -> NDArray[np.float32]:
    """For each token's state (tokens, dim): squared difference over squared size."""
    change: NDArray[np.float32] = np.square(got - exact).sum(axis=1) / (np.square(exact).sum(axis=1) + np.float32(1e-30))
    return change
