"""Tiles of vectors: one statement on them gives the bits of the same operation on every vector, compiled and interpreted."""

from __future__ import annotations

import os

import numpy as np
import pytest
from numba.core.errors import TypingError

from edgemistral.kernels import simd_llvm, simd_numpy
from edgemistral.kernels.addresses import address_of
from edgemistral.kernels.jit import entry
from edgemistral.kernels.unroll import unrolled

F32 = np.float32
pytestmark = pytest.mark.skipif(os.environ.get("EDGEMISTRAL_SIMD") == "interpret", reason="compares with compiled kernels")


def numbers(n, seed):
    return (np.random.default_rng(seed).standard_normal(n) * 50).astype(F32)


# ---- memory ----------------------------------------------------------------------------------------------------------

@entry
def copied(x, address, out):
    """x lies at the address too."""
    simd_llvm.store_tile(simd_llvm.store_f32, out, 0, 48, 16, simd_llvm.tile(simd_llvm.load_f32, x, 5, 2, 3, 100, 20))
    simd_llvm.store_tile(simd_llvm.store_f32, out, 96, 16, 0, simd_llvm.tile(simd_llvm.load_f32, address, 20, 2, 1, 400, 80))
    simd_llvm.store_tile(simd_llvm.store_f32, out, 128, 0, 32, simd_llvm.tile(simd_llvm.broadcast_f32, x, 7, 1, 2, 0, 3))
    simd_llvm.prefetch_tile(x, 1 << 40, 2, 3, 1 << 30, 64)      # never faults


def test_loads_and_stores_have_strides():
    x, out = numbers(300, 0), np.zeros(192, F32)
    copied(x, address_of(x), out)
    expected = np.zeros(192, F32)
    expected[:96] = [x[5 + 100 * row + 20 * col + lane] for row in range(2) for col in range(3) for lane in range(16)]
    expected[96:128] = [x[5 + 100 * row + lane] for row in range(2) for lane in range(16)]
    expected[128:144], expected[160:176] = x[7], x[10]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("load", [simd_numpy.load_bytes, simd_numpy.broadcast4, simd_numpy.broadcast_i32])
def test_interpreted_tiles_stay_inside(load):
    data = np.zeros(256, np.uint8)
    size = 64 if load is simd_numpy.load_bytes else 4
    assert simd_numpy.tile(load, data, 0, 2, 3, 90, 50)[1, 2].nbytes == 64
    last = 256 - size
    simd_numpy.tile(load, data, last - 90, 2, 1, 90, 0)
    for index, down, right in ((last - 89, 90, 0), (last, 0, 1), (10, -11, 0)):
        with pytest.raises(IndexError):
            simd_numpy.tile(load, data, index, 2, 2, down, right)
    with pytest.raises(IndexError):
        simd_numpy.store_tile(simd_numpy.store_f32, data.view(F32), 0, 49, 1, simd_numpy.zero_f32_tile(2, 1))


# ---- lane by lane ----------------------------------------------------------------------------------------------------

@entry
def floats_compiled(x, four, out):
    a = simd_llvm.tile(simd_llvm.load_f32, x, 0, 3, 1, 16, 0)
    b = simd_llvm.tile(simd_llvm.load_f32, x, 48, 1, 2, 0, 16)
    c = simd_llvm.tile(simd_llvm.load_f32, x, 80, 3, 2, 32, 16)
    v = simd_llvm.load_f32(x, 176)
    results = simd_llvm.fma(a, b, c)
    results = simd_llvm.add(results, simd_llvm.mul(v, b))
    results = simd_llvm.maximum(results, simd_llvm.sub(a, v))
    n = simd_llvm.round_to_i32(results)
    numbered = simd_llvm.add_i32(simd_llvm.lane_numbers_tile(3, 2), simd_llvm.zero_i32_tile(1, 2))
    low, high = simd_llvm.splat_i32(np.int32(9)), simd_llvm.splat_i32(np.int32(70))
    results = simd_llvm.where_between(numbered, low, high, results, simd_llvm.zero_f32_tile(3, 1))
    simd_llvm.store_tile(simd_llvm.store_f32, out, 0, 32, 16, results)
    simd_llvm.store_tile(simd_llvm.store_f32, out, 96, 32, 16, simd_llvm.to_f32(n))
    simd_llvm.store_tile(simd_llvm.store_f32, out, 192, 0, 0, simd_llvm.sum_of_vectors(b))
    out[208], out[209], out[210] = simd_llvm.total(b), simd_llvm.highest(b), simd_llvm.total(v)
    out[211] = simd_llvm.total_i32(simd_llvm.tile(simd_llvm.broadcast_i32, four, 0, 2, 2, 2, 1))


def floats_interpreted(x):
    a, b, c = x[:48].reshape(3, 1, 16), x[48:80].reshape(1, 2, 16), x[80:176].reshape(3, 2, 16)
    v = x[176:192]
    results = simd_numpy.fma(a, b, c)
    results = simd_numpy.add(results, simd_numpy.mul(v, b))
    results = simd_numpy.maximum(results, simd_numpy.sub(a, v))
    n = simd_numpy.round_to_i32(results)
    numbered = simd_numpy.add_i32(simd_numpy.lane_numbers_tile(3, 2), simd_numpy.zero_i32_tile(1, 2))
    low, high = simd_numpy.splat_i32(np.int32(9)), simd_numpy.splat_i32(np.int32(70))
    results = simd_numpy.where_between(numbered, low, high, results, simd_numpy.zero_f32_tile(3, 1))
    folded = [simd_numpy.total(b), simd_numpy.highest(b), simd_numpy.total(v)]
    return np.concatenate([results.reshape(-1), n.reshape(-1), simd_numpy.sum_of_vectors(b).reshape(-1), folded]).astype(F32)


def test_operations_broadcast_as_numpy_does():
    x, out = numbers(192, 1), np.zeros(212, F32)
    floats_compiled(x, np.arange(4, dtype=np.int32), out)
    np.testing.assert_array_equal(out[:211], floats_interpreted(x))
    assert (out[:9] == 0).all() and (out[71:96] == 0).all() and (out[9:71] != 0).all()       # lanes counted through the tile
    np.testing.assert_array_equal(out[192:208], x[48:64] + x[64:80])
    assert out[209] == x[48:80].max()
    assert out[211] == 16 * (0 + 1 + 2 + 3)


@entry
def products_compiled(data, levels, acc, out):
    start = simd_llvm.tile(simd_llvm.broadcast_i32, acc, 0, 3, 2, 2, 1)
    codes = simd_llvm.tile(simd_llvm.load_bytes, data, 0, 1, 2, 0, 64)
    low = simd_llvm.look_up_low(simd_llvm.load_bytes(levels, 0), codes)
    sums = simd_llvm.dot4_7bit(start, low, simd_llvm.words(data, 128, 3, 1, 4, 0))
    sums = simd_llvm.dot4(sums, codes, simd_llvm.tile(simd_llvm.broadcast4, data, 140, 3, 1, 4, 0))
    simd_llvm.store_tile(simd_llvm.store_f32, out, 0, 32, 16, simd_llvm.to_f32(sums))
    simd_llvm.store_tile(simd_llvm.store_bytes, data, 0, 64, 0, simd_llvm.words(data, 150, 2, 1, 1, 0))


def test_products_of_tiles():
    rng = np.random.default_rng(2)
    data, levels = rng.integers(0, 256, 192, dtype=np.uint8), np.tile(rng.integers(0, 128, 16, dtype=np.uint8), 4)
    acc, out = rng.integers(-1000, 1000, 6, dtype=np.int32), np.zeros(96, F32)
    codes = data[:128].reshape(2, 16, 4).astype(int)
    first, second = (data[at : at + 12].view(np.int8).reshape(3, 1, 1, 4).astype(int) for at in (128, 140))
    expected = acc.reshape(3, 2, 1) + (levels[codes & 15] * first).sum(axis=-1) + (codes * second).sum(axis=-1)
    tile = simd_numpy.tile(simd_numpy.load_bytes, data, 0, 1, 2, 0, 64)
    low = simd_numpy.look_up_low(levels, tile)
    sums = simd_numpy.dot4_7bit(simd_numpy.tile(simd_numpy.broadcast_i32, acc, 0, 3, 2, 2, 1), low,
                                simd_numpy.words(data, 128, 3, 1, 4, 0))
    sums = simd_numpy.dot4(sums, tile, simd_numpy.tile(simd_numpy.broadcast4, data, 140, 3, 1, 4, 0))
    np.testing.assert_array_equal(sums, expected)
    words = np.concatenate([np.tile(data[150:154], 16), np.tile(data[151:155], 16)])
    products_compiled(data, levels, acc, out)
    np.testing.assert_array_equal(out.reshape(3, 2, 16), expected)
    np.testing.assert_array_equal(data[:128], words)


# ---- refused ---------------------------------------------------------------------------------------------------------

@entry
def of_two_shapes(out):
    both = simd_llvm.add(simd_llvm.zero_f32_tile(2, 3), simd_llvm.zero_f32_tile(2, 2))
    simd_llvm.store_tile(simd_llvm.store_f32, out, 0, 0, 0, both)


@entry
def of_any_shape(out):
    simd_llvm.store_tile(simd_llvm.store_f32, out, 0, 0, 0, simd_llvm.zero_f32_tile(out.size, 1))


@entry
def of_two_types(out):
    both = simd_llvm.add(simd_llvm.zero_f32_tile(2, 2), simd_llvm.zero_i32_tile(2, 2))
    simd_llvm.store_tile(simd_llvm.store_f32, out, 0, 0, 0, both)


@pytest.mark.parametrize(("function", "message"), [
    (of_two_shapes, "2 and 3"), (of_any_shape, "shape of a tile must be constant"), (of_two_types, "i32x16"),
])
def test_what_does_not_fit_is_no_code(function, message):
    with pytest.raises(TypingError, match=message):
        function(np.zeros(64, F32))


def _make_fold_rows(ROWS, COLS):
    @entry
    @unrolled(ROWS=ROWS, COLS=COLS)
    def fold_rows(x, n, out):
        a = simd_llvm.tile(simd_llvm.load_f32, x, 0, ROWS, COLS, 16 * COLS, 16)
        i = simd_llvm.round_to_i32(simd_llvm.tile(simd_llvm.load_f32, n, 0, ROWS, COLS, 16 * COLS, 16))
        simd_llvm.store_f32(out, 0, simd_llvm.highest_of_rows(a))
        simd_llvm.store_f32(out, 16, simd_llvm.total_of_rows(a))
        simd_llvm.store_f32(out, 32, simd_llvm.to_f32(simd_llvm.total_of_rows_i32(i)))
        spread = simd_llvm.to_rows(simd_llvm.total_of_rows(a), ROWS)
        simd_llvm.store_tile(simd_llvm.store_f32, out, 48, 16, 0, spread)

    return fold_rows


@pytest.mark.parametrize("rows, cols", [(1, 1), (2, 4), (4, 4), (8, 1), (16, 2)])
def test_rows_are_folded_as_each_alone(rows, cols):
    x, out = numbers(16 * rows * cols, 5), np.zeros(48 + 16 * rows, F32)
    n = np.random.default_rng(6).integers(-1000, 1000, x.size).astype(F32)
    _make_fold_rows(rows, cols)(x, n, out)
    a, i = x.reshape(rows, cols, 16), n.reshape(rows, cols, 16)
    want = [[fold(row) for row in tile] for fold, tile in ((simd_numpy.highest, a), (simd_numpy.total, a), (np.sum, i))]
    np.testing.assert_array_equal(out[:48].reshape(3, 16), [np.resize(line, 16) for line in want])
    np.testing.assert_array_equal(out[48:].reshape(rows, 16), np.repeat(want[1], 16).reshape(rows, 16))
    ints = a.astype(np.int32)
    for got, fold, values in ((0, simd_numpy.highest_of_rows, a), (1, simd_numpy.total_of_rows, a)):
        np.testing.assert_array_equal(out[16 * got : 16 * got + 16], fold(values))
    assert simd_numpy.total_of_rows_i32(ints).dtype == np.int32
    np.testing.assert_array_equal(simd_numpy.to_rows(out[16:32], rows).reshape(-1), out[48:])


@entry
def compare(a, b):
    return simd_llvm.any_above(simd_llvm.load_f32(a, 0), simd_llvm.load_f32(b, 0))


def test_any_above():
    a, nan = np.zeros(16, F32), np.full(16, np.nan, F32)
    for lane in range(16):
        b = a.copy()
        b[lane] = -1
        assert compare(a, b) and simd_numpy.any_above(a, b)
        assert not compare(b, a) and not simd_numpy.any_above(b, a)
    assert not compare(a, a) and not compare(nan, a) and not compare(a, nan)
