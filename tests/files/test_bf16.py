"""bfloat16 as bits: exact on the way up, nearest on the way down."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemistral.files.bf16 import to_bf16, widen

F32 = np.float32


def test_every_bfloat16_comes_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = widen(bits)
    np.testing.assert_array_equal(wide.view(np.uint32), bits.astype(np.uint32) << 16)
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(to_bf16(wide)[number], bits[number])
    assert np.isnan(widen(to_bf16(wide[~number]))).all()
    assert to_bf16(bits) is bits


@given(st.floats(width=32, allow_nan=False))
def test_the_nearest_is_taken_and_ties_are_even(x):
    got = widen(to_bf16(np.array([x], F32)))[0]
    bits = np.array([x], F32).view(np.uint32)
    below = (bits >> 16 << 16).view(F32)[0]
    above = ((bits >> 16) + 1 << 16).view(F32)[0]
    if not np.isfinite(above):                       # beyond the largest finite one, or infinite
        assert got in (below, above)
        return
    low, high = abs(np.float64(x) - np.float64(below)), abs(np.float64(above) - np.float64(x))
    assert got == (below if low < high else above if high < low else (below if bits[0] >> 16 & 1 == 0 else above))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_numbers_are_widened_exactly(dtype):
    x = np.random.default_rng(0).standard_normal(1000).astype(dtype)
    assert widen(x).dtype == F32
    np.testing.assert_array_equal(widen(x), x.astype(F32))


def test_a_number_that_is_none_stays_one():
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32)
    assert np.isnan(widen(to_bf16(bits.view(F32)))).all()
