"""Compiles the quantizer's kernels ahead of time."""

from __future__ import annotations

import numpy as np

from edgemistral.files.layout import BLOCK, PANEL
from edgemistral_quantize import gptq, groups


def compile_kernels() -> None:
    """Compile them all, or load them from the cache: they quantize one tiny matrix in every way."""
    w, x = (np.random.default_rng(0).standard_normal((n, BLOCK)).astype(np.float32) for n in (PANEL, 8 * BLOCK))
    for bits in (4, 8):
        groups.quantize_rows(w, bits)
    moments = gptq.Moments(BLOCK, "full")
    moments.add(x, map)
    factors = gptq.Factors.of(moments, np.ones(BLOCK, np.float32), len(x))
    for levels in (groups.default_levels(), None):
        gptq.quantize_rows(w, levels, factors)
