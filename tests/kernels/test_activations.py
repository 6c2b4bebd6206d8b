"""RMSNorm, SwiGLU and the rounding of activations against their NumPy twins."""

from __future__ import annotations

import numpy as np
import pytest

from edgemistral.files.layout import BLOCK, GROUP, round_up
from edgemistral.kernels.activations import inverse_rms, keep_residue, normalize_block, quantize_block, swiglu
from edgemistral.kernels.jit import entry
from edgemistral.kernels.simd import load_f32, store_f32
from tests import naive
from tests.packed import empty_activations, unpack_activations

F32 = np.float32


def spread(rng, *shape):
    """Random numbers of very different sizes."""
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 4, shape)).astype(F32)


@entry
def quantized(x, zero, activations, tops):
    """x (tokens, whole blocks), every token and block in turn; tops receives the largest magnitudes that are returned."""
    for token in range(x.shape[0]):
        for block in range(x.shape[1] // BLOCK):
            at = token * x.shape[1] + BLOCK * block
            tops[token, block] = quantize_block(x.reshape(-1), at, zero, activations, x.shape[0], token, block)


@entry
def residue(x, top):
    keep_residue(x, top)


def check_quantized(x, zero):
    tokens, cols = x.shape
    activations, tops = empty_activations(tokens, cols), np.zeros((tokens, cols // BLOCK), F32)
    quantized(x, np.int32(zero), activations, tops)
    got_codes, got_sums, got_scales = unpack_activations(activations, tokens, cols)
    codes, scales = naive.quantize_activations(x)
    np.testing.assert_array_equal(got_codes, codes)
    np.testing.assert_array_equal(got_scales, scales)
    np.testing.assert_array_equal(got_sums, -zero * codes.reshape(tokens, -1, GROUP).sum(axis=2, dtype=np.int32))
    np.testing.assert_array_equal(tops / F32(127), scales)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 16, 17, 33])
def test_quantize_block(tokens):
    rng = np.random.default_rng(tokens)
    for cols, zero in ((128, 64), (384, 128)):
        check_quantized(spread(rng, tokens, cols), zero)


def test_keep_residue():
    x = np.random.default_rng(0).standard_normal(BLOCK).astype(F32)
    codes, scale = naive.quantize_int8(x)
    rest = x.copy()
    residue(rest, np.abs(x).max())
    np.testing.assert_array_equal(rest, x - codes * scale)
    assert np.abs(rest).max() <= scale * F32(0.51)


def test_quantize_block_of_extreme_values():
    rng = np.random.default_rng(0)
    ordinary = rng.standard_normal(BLOCK).astype(F32)
    outlier, equal = ordinary.copy(), np.full(BLOCK, -3.7, F32)
    outlier[77] = 1e6
    ties = np.arange(-63.5, 64.5, dtype=F32)
    ties[0] = 127
    huge, tiny, subnormal = ordinary * F32(8e37), ordinary * F32(1e-28), ordinary * F32(1e-41)
    check_quantized(np.stack([np.zeros(BLOCK, F32), outlier, equal, ties, huge, tiny, subnormal, -abs(ordinary)]), 128)


@entry
def normalized(x, dim, weight, eps, out):
    """RMSNorm of x (tokens, dim) -> out (tokens, whole blocks); returns the last token's factor."""
    factor = F32(0)
    for token in range(x.shape[0]):
        factor = inverse_rms(x.reshape(-1), token * dim, dim, eps)
        for block in range(out.shape[1] // BLOCK):
            at = BLOCK * block
            normalize_block(x.reshape(-1), token * dim + at, weight, 4 * at, factor, dim - at, out[token, at:])
    return factor


@pytest.mark.parametrize("dim", [32, 96, 128, 192, 4096])
def test_rms_norm(dim):
    rng = np.random.default_rng(dim)
    x, weight = rng.standard_normal((3, dim)).astype(F32), rng.uniform(0.1, 2, dim).astype(F32)
    x[1], x[2] = 0, x[2] * F32(1e15)
    out = np.full((3, round_up(dim, BLOCK)), np.nan, F32)
    factor = normalized(x, dim, weight.view(np.uint8), 1e-5, out)
    np.testing.assert_allclose(out[:, :dim], naive.rms_norm(x, weight, 1e-5), rtol=2e-6)
    assert not out[:, dim:].any()
    np.testing.assert_allclose(factor, 1 / np.sqrt(np.mean(x[2].astype(float) ** 2)), rtol=1e-6)


@entry
def gated(gate, up, out):
    for i in range(0, gate.size, 16):
        store_f32(out, i, swiglu(load_f32(gate, i), load_f32(up, i)))


def test_swiglu():
    rng = np.random.default_rng(0)
    gate, up = spread(rng, 4096), spread(rng, 4096)
    gate[:8] = [0, -0.0, 1e30, -1e30, 87, -86, 1e-40, -1e-40]
    out = np.zeros(4096, F32)
    gated(gate, up, out)
    expected = gate.astype(float) / (1 + np.exp(-gate.astype(float).clip(-700))) * up
    near = gate > -87
    np.testing.assert_allclose(out[near], expected[near], rtol=2e-6, atol=1e-38)
    assert not out[gate < -87].any()
