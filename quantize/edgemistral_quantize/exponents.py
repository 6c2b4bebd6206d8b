"""Chooses how strongly the inputs of each matrix are equalised in 8 bits (`alpha` of `equalise.py`).

Equalising helps a text whose large inputs are in the columns where the calibration text has them. It harms one that has them
elsewhere. So it is tried: each kind of calibration text is left out in turn, and the factors s come from the other kinds. The
rounding errors of the kind left out are estimated, relative to those without equalisation. The exponent whose geometric
mean over the kinds is least is used. 0, no equalisation, is one of them.

Rounding to multiples of a step makes an error of variance  step^2 / 12.  For outputs of W (rows, cols) it is multiplied:

    inputs     step = max |x / s| of a block of 128, / 127    step^2 times the sum of (s w)^2 over the block
    weights    step = max |s w| of a group of 32, / 127       step^2 times the sum of (x / s)^2 over the group

The factor 1 / (12 * 127^2) is common to both and left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.files.layout import BLOCK, GROUP
from edgemistral_quantize.calibrate import Inputs
from edgemistral_quantize.equalise import factors, of_sources

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def choose(config: ModelConfig, inputs: Inputs, kinds: Sequence[int]) -> dict[str, float]:
    """An exponent for each matrix of a layer. inputs: with samples. kinds: the kind of each window's text."""
    return {name: _exponent(config, name, inputs, np.asarray(kinds)) for name in inputs.mean_squares}


def _exponent(config: ModelConfig, name: str, inputs: Inputs, kinds: NDArray[np.int64]) -> float:
    squares, weights = np.array(inputs.of_windows[name]), inputs.weights[name]
    kinds, logs = kinds[: len(squares)], np.zeros(len(EXPONENTS))
    for kind in np.unique(kinds):
        left_out = kinds == kind
        others = left_out if left_out.all() else ~left_out          # one kind only: it is judged by itself
        known, met = of_sources(config, name, squares[others].mean(axis=0)), squares[left_out].mean(axis=0)
        tokens = np.concatenate([x for x, out in zip(inputs.tokens[name], left_out, strict=True) if out])
        errors = np.array([error(weights, tokens, met, factors(known, alpha)) for alpha in EXPONENTS])
        if errors.min() > 0:
            logs += np.log(errors / errors[0])
    return EXPONENTS[int(logs.argmin())]


def error(weights: F32, tokens: F32, mean_squares: F64, s: F64) -> float:
    """The estimated squared error of a matrix's outputs, summed over rows, for a token on average, times 12 * 127^2.

    weights (rows, cols) and tokens (n, cols) are samples, mean_squares (cols,) those of all inputs, s (cols,) the factors.
    """
    s32 = s.astype(np.float32)
    scaled, inputs = np.abs(weights * s32), np.abs(tokens / s32)
    of_inputs = _cut(inputs, BLOCK).max(axis=2).astype(np.float64) ** 2
    of_weights = _cut(scaled, GROUP).max(axis=2).astype(np.float64) ** 2
    squares = np.square(scaled, dtype=np.float64).sum(axis=0)
    return float(
        (of_inputs.mean(axis=0) * _cut(squares, BLOCK).sum(axis=1)).sum()
        + (of_weights.sum(axis=0) * _cut(mean_squares / s**2, GROUP).sum(axis=1)).sum()
    )


def _cut(values: NDArray[np.floating], size: int) -> NDArray[np.floating]:
    """(..., cols) -> (..., blocks, size), zeros at the end."""
    cols = values.shape[-1]
    padded = np.zeros((*values.shape[:-1], -(-cols // size) * size), values.dtype)
    padded[..., :cols] = values
    return padded.reshape(*values.shape[:-1], -1, size)
