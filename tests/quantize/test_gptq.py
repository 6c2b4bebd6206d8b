"""GPTQ: the error of the outputs, the factor, and inputs that are hard to factorize."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from edgemistral_quantize import equalise, gptq
from edgemistral_quantize.groups import default_levels, quantize_rows

from edgemistral.files import layout

F32 = np.float32


def inputs(n: int, seed: int = 0) -> np.ndarray:
    """Correlated columns, as a trained model's are."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((1000, n)).astype(F32) @ rng.standard_normal((n, n)).astype(F32)


def factors_of(x: np.ndarray, samples: float = 1e12) -> gptq.Factors:
    moments = gptq.Moments(x.shape[1], "full")
    for window in np.split(x, 2):
        moments.add(window, map)
    return gptq.Factors.of(moments, np.ones(x.shape[1], F32), samples)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cols", [32, 192, 448])
def test_gptq_lowers_the_error_of_the_outputs(cols: int, bits: int) -> None:
    x, w = inputs(cols), np.random.default_rng(1).standard_normal((100, cols)).astype(F32)
    factors, levels = factors_of(x), default_levels() if bits == 4 else None

    def error(packed: np.ndarray, row_scales: np.ndarray) -> float:
        return float(((x @ (layout.dequantize(packed, row_scales, levels)[:100, :cols] - w).T) ** 2).sum())

    assert error(*gptq.quantize_rows(w, levels, factors)) < 0.8 * error(*quantize_rows(w, bits, levels, factors.diagonal))


def test_without_correlations_gptq_in_8_bits_is_plain_rounding() -> None:
    w = np.random.default_rng(1).standard_normal((40, 160)).astype(F32)
    w[3], w[5, 32:64] = 0, 0
    factors = factors_of(np.tile(np.eye(160, dtype=F32), (8, 1)))
    rounded = gptq.quantize_rows(w, None, dataclasses.replace(factors, sweeps=0))
    for got, expected in zip(rounded, quantize_rows(w, 8), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_gptq_factor_is_of_the_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "MOST_COLUMNS", {"full": 64})
    x = inputs(160)
    factors = factors_of(x)
    assert [part.stop - part.start for part in factors.parts] == [32, 64, 64]
    for part, upper, damped in zip(factors.parts, factors.upper, factors.h, strict=True):
        h = (x[:, part].T @ x[:, part]).astype(np.float64)
        h = h / np.diagonal(h).mean() + 0.01 * np.eye(len(h))
        np.testing.assert_allclose(damped, h, atol=1e-3)
        np.testing.assert_allclose(upper.T.astype(np.float64) @ upper @ h, np.eye(len(h)), atol=1e-3)
        np.testing.assert_array_equal(upper, np.triu(upper))


def test_what_chance_makes_is_forgotten() -> None:
    """Independent columns come out as independent, columns that belong together as they are."""
    rng = np.random.default_rng(0)
    few = rng.standard_normal((80, 64)).astype(F32)
    (h,), (exact,) = factors_of(few, 80).h, factors_of(few).h
    off = ~np.eye(64, dtype=bool)
    assert np.abs(h[off]).mean() < 0.3 * np.abs(exact[off]).mean()
    (h,), (exact,) = factors_of(inputs(64), 1000).h, factors_of(inputs(64)).h
    np.testing.assert_allclose(h[off], exact[off], rtol=0.1)
    np.testing.assert_array_equal(np.diagonal(h), np.diagonal(exact))
    near = equalise.shrunk((few.astype(np.float64) ** 2).mean(axis=0), 80)
    assert np.log(near).std() < 0.3 * np.log((few.astype(np.float64) ** 2).mean(axis=0)).std()
    trained = rng.exponential(size=64) ** 3
    np.testing.assert_allclose(equalise.shrunk(trained, 1000), trained, rtol=0.05)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cols", [32, 160])
def test_sweeps_never_raise_the_error(cols: int, bits: int) -> None:
    x, w = inputs(cols), np.random.default_rng(1).standard_normal((70, cols)).astype(F32)
    factors, errors, levels = factors_of(x), [], default_levels() if bits == 4 else None
    (h,) = factors.h
    for sweeps in range(4):
        packed, row_scales = gptq.quantize_rows(w, levels, dataclasses.replace(factors, sweeps=sweeps))
        difference = (layout.dequantize(packed, row_scales, levels)[:70, :cols] - w).astype(np.float64)
        errors.append(((difference @ h) * difference).sum(axis=1))     # of each row
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-4)).all()
    assert errors[-1].sum() < 0.97 * errors[0].sum()


@pytest.mark.parametrize("change", [
    lambda x, w: (x * 0, w), lambda x, w: (np.where(np.arange(x.size).reshape(x.shape) == 5, F32(4e-23), F32(0)), w),
    lambda x, w: (x, w * 0), lambda x, w: (x, w * F32(1e36)), lambda x, w: (x, w * F32(1e-38)),
    lambda x, w: (np.repeat(x[:, :1], x.shape[1], axis=1), w),
], ids=["no input", "one tiny input", "no weights", "huge weights", "tiny weights", "one direction"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_bears(change: Callable[..., tuple[np.ndarray, np.ndarray]], bits: int) -> None:
    x, w = change(inputs(128), np.random.default_rng(1).standard_normal((20, 128)).astype(F32))
    levels = default_levels() if bits == 4 else None
    packed, row_scales = gptq.quantize_rows(w, levels, factors_of(x))
    restored = layout.dequantize(packed, row_scales, levels)
    assert np.isfinite(restored).all()
    if w.any():
        assert np.abs(restored[:20] - w).max() < 2 * np.abs(w).max()
    assert not restored[20:].any()
