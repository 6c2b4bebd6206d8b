"""The group quantizer against a plain NumPy twin, bit for bit, and against what quantization may cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from edgemistral_quantize.groups import default_levels, quantize_rows, stored_levels
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemistral.files import layout
from tests.naive import q4_0

F32 = np.float32
Array = np.ndarray[Any, Any]


# The twin: groups lie as columns, sums run over their 32 weights in order, everything is float32 ----------------------


def naive_quantize(w: Array, bits: int, levels: Array, importance: Array | None) -> tuple[Array, Array]:
    rows, cols = w.shape
    padded = np.pad(w, ((0, -rows % 16), (0, -cols % 128)))
    n_groups = padded.shape[1] // 32
    weight = np.zeros(padded.shape[1], F32)
    weight[:cols] = 1
    if importance is not None and importance.any():
        weight[:cols] = np.maximum(importance / importance.mean(dtype=np.float64), 1e-6)
    weight = np.tile(weight.reshape(n_groups, 32).T, len(padded))

    with np.errstate(all="ignore"):
        peak = np.abs(padded).max(axis=1)
        x = padded / np.where(peak > 0, peak, F32(1))[:, None]
        x = x.reshape(-1, 32).T                                    # 32 weights x (row, group)
        largest = x[np.abs(x).argmax(axis=0), np.arange(x.shape[1])]
        limit = F32(np.finfo(F32).max / (127 * (65 if bits == 4 else 128)))
        if bits == 4:
            values = levels[:16].astype(F32) - F32(64)
            scale = naive_scales(x, weight, values, largest)
            top = np.abs(scale).reshape(-1, n_groups).max(axis=1) / F32(127)
        else:
            top = np.full(len(padded), F32(1 / 127**2))
        row_unit = np.where(peak > 0, np.minimum(top, limit / peak), top)
        unit = np.repeat(row_unit, n_groups)
        if bits == 4:
            start = np.where(unit > 0, np.rint(scale / unit), 0)
            whole, index = naive_whole_4(x, weight, values, start, unit)
            codes = index
        else:
            start = np.ceil(np.abs(largest) / (F32(127) * unit))
            whole = naive_whole_8(x, weight, start, unit)
            codes = naive_codes(x * naive_inverse(whole, unit)) + 128
    packed = layout.pack(
        codes.T.reshape(padded.shape).astype(np.uint8), whole.reshape(-1, n_groups).astype(np.int8), bits
    )
    return packed, row_unit * peak


def naive_inverse(whole: Array, unit: Array) -> Array:
    return np.where(whole != 0, F32(1) / (whole.astype(F32) * unit), F32(0)).astype(F32)


def naive_nearest(v: Array, values: Array) -> Array:
    middle = (values[1:] + values[:-1]) / F32(2)
    return (v[..., None] > middle).sum(axis=-1)


def in_order(terms: Array) -> Array:
    total = np.zeros(terms.shape[1], F32)
    for term in terms:
        total += term
    return total


def naive_project(x: Array, weight: Array, inverse: Array, values: Array) -> tuple[Array, Array]:
    q = values[naive_nearest(x * inverse, values)]
    return in_order(weight * q * x), in_order(weight * q * q)


def naive_scales(x: Array, weight: Array, values: Array, largest: Array) -> Array:
    scale, explained = np.zeros_like(largest), np.zeros_like(largest)
    for stretch in np.linspace(0.8, 1.15, 8, dtype=F32):
        for end in values[[0, 15]]:
            moment, energy = naive_project(x, weight, stretch * end / largest, values)
            better = moment * moment / energy > explained
            explained = np.where(better, moment * moment / energy, explained)
            scale = np.where(better, moment / energy, scale)
    return scale


def naive_whole_4(x: Array, weight: Array, values: Array, start: Array, unit: Array) -> tuple[Array, Array]:
    whole, least = np.zeros_like(start), np.zeros_like(unit)
    for d in (0, -1, 1, -2, 2):
        tried = np.clip(start + d, -127, 127)
        moment, energy = naive_project(x, weight, naive_inverse(tried, unit), values)
        scale = tried.astype(F32) * unit
        error = scale * (scale * energy - 2 * moment)
        whole, least = np.where(error < least, tried, whole), np.where(error < least, error, least)
    return whole, naive_nearest(x * naive_inverse(whole, unit), values)


def naive_codes(v: Array) -> Array:
    return np.rint(np.clip(v, -127, 127))


def naive_whole_8(x: Array, weight: Array, start: Array, unit: Array) -> Array:
    whole, least = np.zeros_like(start), np.full_like(unit, np.inf)
    for d in range(-2, 17):
        tried = np.where(start > 0, np.clip(start + d, 1, 127), 0)
        rest = x - naive_codes(x * naive_inverse(tried, unit)) * (tried.astype(F32) * unit)
        error = in_order(weight * (rest * rest))
        whole, least = np.where(error < least, tried, whole), np.where(error < least, error, least)
    return whole


# Helpers --------------------------------------------------------------------------------------------------------------


def restore(w: Array, bits: int, levels: Array | None = None, importance: Array | None = None) -> Array:
    """Quantize and take back the weights in w's shape."""
    levels = default_levels() if levels is None and bits == 4 else levels
    packed, row_scales = quantize_rows(w, bits, levels, importance, threads=1)
    return layout.dequantize(packed, row_scales, levels)[: w.shape[0], : w.shape[1]]


def relative_error(w: Array, restored: Array) -> float:
    return float(((restored - w).astype(np.float64) ** 2).sum() / (w.astype(np.float64) ** 2).sum())


def gaussian(rows: int, cols: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, cols), dtype=F32)


def assert_equals_twin(w: Array, bits: int, levels: Array, importance: Array | None = None) -> None:
    packed, row_scales = quantize_rows(w, bits, levels, importance, threads=2)
    expected, expected_scales = naive_quantize(w, bits, levels, importance)
    np.testing.assert_array_equal(row_scales, expected_scales)
    np.testing.assert_array_equal(packed, expected)
    assert packed.dtype == np.uint8 and row_scales.dtype == F32


# Tests ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 32), (16, 128), (17, 129), (40, 192), (5, 448), (33, 70)])
def test_equals_the_twin(shape: tuple[int, int], bits: int) -> None:
    assert_equals_twin(gaussian(*shape), bits, default_levels())


@pytest.mark.parametrize("bits", [4, 8])
def test_equals_the_twin_with_importance(bits: int) -> None:
    importance = np.random.default_rng(1).exponential(size=200).astype(F32) ** 4
    importance[:40] = 0
    assert_equals_twin(gaussian(20, 200), bits, default_levels(), importance)


values = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 1.0, -1.0, 1e-3]),
)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 20), st.integers(1, 150), st.sampled_from([4, 8]))
def test_any_finite_weights(data: st.DataObject, rows: int, cols: int, bits: int) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    picked = np.array(data.draw(st.lists(values, min_size=1, max_size=12)), F32)
    w = np.where(rng.random((rows, cols)) < 0.7, rng.choice(picked, (rows, cols)), gaussian(rows, cols, seed))
    levels = stored_levels(sorted(data.draw(st.lists(st.integers(-64, 63), min_size=16, max_size=16, unique=True))))
    importance = data.draw(st.sampled_from([None, rng.random(cols, F32), np.zeros(cols, F32)]))
    assert_equals_twin(w, bits, levels, importance)
    assert np.isfinite(restore(w, bits, levels if bits == 4 else None, importance)).all()


def test_error_of_gaussian_weights() -> None:
    w = gaussian(128, 4096)
    assert relative_error(w, restore(w, 4)) < 0.0055            # 0.0057 at most was asked for
    assert relative_error(w, restore(w, 4)) < 0.75 * relative_error(w, q4_0(w))
    assert relative_error(w, restore(w, 8)) < 2.5e-5            # absmax: 2.87e-5


def test_bits_per_weight() -> None:
    packed, row_scales = quantize_rows(gaussian(16, 4096), 4)
    assert (packed.nbytes + row_scales.nbytes) * 8 / (16 * 4096) < 4.26


def test_8_bits_lose_at_most_half_a_step() -> None:
    """The search may pick a scale that clips, but never a worse one than the smallest that does not."""
    w = gaussian(32, 256) * np.exp(2 * gaussian(32, 1, seed=1))
    groups, restored = w.reshape(32, -1, 32), restore(w, 8).reshape(32, -1, 32)
    row_unit = np.abs(w).max(axis=1)[:, None] / 127**2
    step = np.ceil(np.abs(groups).max(axis=2) / (127 * row_unit) - 1e-3) * row_unit
    assert (((groups - restored) ** 2).sum(axis=2) <= 32 * (step / 2) ** 2 * 1.001).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_rows_groups_and_padding_have_scale_zero(bits: int) -> None:
    w = gaussian(18, 160)
    w[3] = 0
    w[:, 32:64] = 0
    packed, row_scales = quantize_rows(w, bits)
    _, scales = layout.unpack(packed, bits)
    assert packed.shape == (2, 2, layout.BLOCK_BYTES[bits]) and row_scales.shape == (32,)
    assert not scales[3].any() and not scales[18:].any() and not scales[:, 1].any() and not scales[:, 5:].any()
    assert not row_scales[3] and not row_scales[18:].any()
    assert scales[0, [0, 2, 3, 4]].all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("magnitude", [1e-37, 1e-20, 1e20, 1e37])
def test_magnitude_does_not_matter(bits: int, magnitude: float) -> None:
    w = np.clip(gaussian(16, 256), -3, 3)
    scaled = w * F32(magnitude)
    error = np.abs(restore(scaled, bits).astype(np.float64) / magnitude - restore(w, bits)).max()
    assert error < (1e-2 if magnitude == 1e-37 else 1e-5)    # there row scales are denormal numbers of few bits


@pytest.mark.parametrize("bits", [4, 8])
def test_an_outlier_stays_and_harms_its_row_only(bits: int) -> None:
    w = gaussian(16, 512)
    harmed = w.copy()
    harmed[5, 77] = 1e4
    restored = restore(harmed, bits)
    assert restored[5, 77] == pytest.approx(1e4, rel=0.01)
    others = np.arange(16) != 5
    np.testing.assert_array_equal(restored[others], restore(w, bits)[others])


@pytest.mark.parametrize("bits", [4, 8])
def test_threads_and_strips_do_not_matter(bits: int) -> None:
    w = gaussian(100, 300)
    whole = quantize_rows(w, bits, threads=1)
    for other in (
        quantize_rows(w, bits, threads=3),
        tuple(map(np.concatenate, zip(*(quantize_rows(w[i : i + 48], bits) for i in (0, 48, 96)), strict=True))),
    ):
        np.testing.assert_array_equal(whole[0], other[0])
        np.testing.assert_array_equal(whole[1], other[1])


@pytest.mark.parametrize("bits", [4, 8])
def test_importance_lowers_the_weighted_error(bits: int) -> None:
    w = gaussian(64, 512)
    importance = np.random.default_rng(1).exponential(size=512).astype(F32) ** 3

    def weighted_error(restored: Array) -> float:
        return float((importance * (restored - w) ** 2).sum())

    assert weighted_error(restore(w, bits, importance=importance)) < 0.95 * weighted_error(restore(w, bits))


def test_the_common_factor_of_importance_does_not_matter() -> None:
    w, importance = gaussian(16, 128), np.linspace(1, 2, 128, dtype=F32)
    for factor in (2.0**-100, 2.0**100):
        np.testing.assert_array_equal(
            restore(w, 4, importance=importance), restore(w, 4, importance=importance * F32(factor))
        )


def test_what_is_on_a_level_comes_back() -> None:
    rng = np.random.default_rng(0)
    levels = default_levels()
    packed = layout.pack(
        rng.integers(0, 16, (16, 128), np.uint8) % 15 + (np.arange(128) % 32 == 0),   # the levels' ends in each group
        np.tile(np.int8([127, -127, 127, -127]), (16, 1)),
        4,
    )
    w = layout.dequantize(packed, np.full(16, 2.0**-10, F32), levels)
    np.testing.assert_allclose(restore(w, 4), w, rtol=1e-6)


def test_default_levels_are_a_table_for_one_vector() -> None:
    levels = default_levels()
    assert levels.shape == (64,) and levels.dtype == np.uint8 and levels.max() <= 127
    assert (levels.reshape(4, 16) == levels[:16]).all() and (np.diff(levels[:16].astype(int)) > 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    w = gaussian(20, 64)
    w[18, 3] = value
    with pytest.raises(ValueError, match="row 18"):
        quantize_rows(w, 8)


def test_bad_arguments_are_refused() -> None:
    w = gaussian(16, 64)
    for wrong in (w.astype(np.float64), w[:, ::2], w[0], w[:0]):
        with pytest.raises(ValueError, match="C-contiguous float32 matrix"):
            quantize_rows(wrong, 4)
    with pytest.raises(ValueError, match="bits is 5"):
        quantize_rows(w, 5)
    for levels in (default_levels()[:16], default_levels()[::-1], default_levels() + 128, np.full(64, 64, np.uint8)):
        with pytest.raises(ValueError, match="levels"):
            quantize_rows(w, 4, levels)
    for importance in (np.ones(63, F32), np.full(64, -1, F32), np.full(64, np.nan, F32)):
        with pytest.raises(ValueError, match="importance"):
            quantize_rows(w, 4, None, importance)
