"""Uses the statistics of a layer: equalises the inputs of a matrix, offline, and weights its columns' errors.

A few inputs of a trained model are much larger than the others, and the kernels give 128 inputs one 8-bit scale. So input
j is divided by  s[j] = rms(x[j]) ** alpha  (over its geometric mean), and column j of the matrix multiplied by it. This is
the idea of SmoothQuant (arXiv 2211.10438). The division costs nothing at run time, because it is merged into the source of the
input:

    wqkv, w13, output   the norm's weight
    wo                  the rows of wv: one s for all the query heads that share a value head
    w2                  the rows of w3
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.files.layout import PANEL

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

# Chosen by hand on SmolLM2-135M-Instruct and on the demo model: docs/decisions/2026-11-26-calibration.md has what was tried.
ALPHA = 0.25            # of the layers' matrices in 4 bits; in 8 bits `exponents.py` chooses for each matrix
ALPHA_OF_OUTPUT = {4: 0.25, 8: 0.0}     # the head gets its inputs with twice as many digits: outliers do no harm there
FLOOR = 1e-3                # of the mean square: an input that is small in the calibration text may be larger in another


@dataclass(frozen=True)
class Change:
    """Changes to one matrix before it is quantized, and weights of its columns' errors; None: no change, equal weights."""

    columns: F32 | None = None      # (cols,), factors
    rows: F32 | None = None         # (rows,), factors, in the order of the blob
    importance: F32 | None = None   # (cols,), of the changed matrix

    def apply(self, strip: F32, first: int) -> F32:
        """Rows `first`... of the matrix, changed."""
        if self.columns is not None:
            strip = strip * self.columns
        if self.rows is not None:
            strip = strip * self.rows[first : first + len(strip), None]
        return strip


@dataclass(frozen=True)
class Changes:
    """The changes of matrices and the factors (dim,) of norms, by name."""

    matrices: Mapping[str, Change]
    norms: Mapping[str, F32]


def layer_changes(
    config: ModelConfig, measured: Mapping[str, F64], samples: float, alpha: Mapping[str, float] | None = None
) -> Changes:
    """The changes of one layer, from the mean squares (cols,) of `samples` different inputs of wqkv, wo, w13 and w2.

    alpha: for each of them; ALPHA if None.
    """
    c = config
    mean_squares = {name: shrunk(values, samples) for name, values in measured.items()}
    s = {
        name: factors(of_sources(c, name, values), ALPHA if alpha is None else alpha[name])
        for name, values in mean_squares.items()
    }
    value = s["wo"].reshape(c.n_kv_heads, c.group, c.head_dim)[:, 0].reshape(-1)
    rows = {
        "wqkv": np.concatenate([np.ones(c.q_dim + c.kv_dim), 1 / value]),
        "w13": np.stack([np.ones((c.hidden_dim // PANEL, PANEL)), 1 / s["w2"].reshape(-1, PANEL)], axis=1).reshape(-1),
    }
    matrices = {
        name: Change(
            s[name].astype(np.float32),
            rows[name].astype(np.float32) if name in rows else None,
            (values / s[name] ** 2).astype(np.float32),
        )
        for name, values in mean_squares.items()
    }
    norms = {"attention_norm": 1 / s["wqkv"], "ffn_norm": 1 / s["w13"]}
    return Changes(matrices, {name: values.astype(np.float32) for name, values in norms.items()})


def of_sources(config: ModelConfig, name: str, mean_squares: F64) -> F64:
    """Mean squares (cols,) of a matrix's inputs, averaged over those that get one factor: heads that share a value head."""
    if name != "wo":
        return mean_squares
    by_head = mean_squares.reshape(config.n_kv_heads, config.group, config.head_dim)
    return np.repeat(by_head.mean(axis=1, keepdims=True), config.group, axis=1).reshape(-1)


def output_changes(measured: F64, bits: int, samples: float) -> Changes:
    """The same for the output head and the norm before it."""
    mean_squares = shrunk(measured, samples)
    s = factors(mean_squares, ALPHA_OF_OUTPUT[bits])
    head = Change(s.astype(np.float32), None, (mean_squares / s**2).astype(np.float32))
    return Changes({"output": head}, {"norm": (1 / s).astype(np.float32)})


def shrunk(mean_squares: F64, samples: float) -> F64:
    """The same, moved towards each other by the share of their differences that is chance.

    The logarithm of a mean square of n normal numbers has the variance 2 / n. Any larger variance comes from the model: it
    is hundreds of times larger for trained models, and little larger for random weights.
    """
    logs = np.log(np.maximum(mean_squares, FLOOR**2 * mean_squares.mean() + np.finfo(np.float64).tiny))
    spread = logs.var()
    real = max(0.0, 1 - 2 / samples / spread) if spread > 0 else 0.0
    near: F64 = np.exp(logs.mean() + real * (logs - logs.mean()))
    return near


def factors(mean_squares: F64, alpha: float) -> F64:
    """s (cols,): positive, with geometric mean 1; all 1 if nothing was measured."""
    mean = mean_squares.mean()
    if not mean > 0 or alpha == 0:
        return np.ones_like(mean_squares)
    logs = np.log(np.maximum(mean_squares, FLOOR * mean)) * (alpha / 2)
    s: F64 = np.exp(logs - logs.mean())
    return s
