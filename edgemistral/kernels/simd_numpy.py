"""The vector vocabulary as ordinary Python over NumPy: the twin of `simd_llvm`, to step through a kernel and to find bad reads.

EDGEMISTRAL_SIMD=interpret makes the kernels use it. A vector is a NumPy array that is never modified: 64 x uint8, 16 x int32 or
16 x float32. A tile has two more axes in front, rows and columns. Every operation gives the bits of the compiled one. Behaviour
that is undefined in compiled code is an error here:

    * a load or store that is not wholly inside its array, or inside the memory behind its address (IndexError)
    * a negative index (IndexError)
    * a byte above 127 in `dot4_7bit`, a float that no int32 holds in `round_to_i32` (ValueError)

Over 400 lines: one short function for each word of the vocabulary.
"""

from __future__ import annotations

import time
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.files.bf16 import to_bf16
from edgemistral.kernels.addresses import memory_at
from edgemistral.kernels.lowering import Plain

Vector = NDArray[Any]

LOWERING = Plain()
F32, I32 = np.float32, np.int32
LANES = np.arange(16, dtype=I32)

__all__ = [
    "LOWERING", "absolute", "add", "add_i32", "any_above", "atomic_add", "atomic_load", "broadcast4", "broadcast_f32",
    "broadcast_i32", "div", "dot4", "dot4_7bit", "exp", "flip_top_bits", "fma", "highest", "highest_of_rows",
    "lane_numbers", "lane_numbers_tile", "load_bf16_as_f32", "load_bytes", "load_f16_as_f32", "load_f32", "load_i8_as_f32",
    "look_up_high", "look_up_low", "low_nibbles", "maximum", "minimum", "mul", "pause", "prefetch_tile",
    "prefetch_tile_early", "round_to_i32", "splat_f32", "splat_i32", "spread_bytes", "spread_f32_as_f16", "spread_words",
    "store_bytes", "store_f32", "store_f32_as_f16", "store_low_bytes", "store_scalar_bf16", "store_scalar_f32",
    "store_tile", "sub", "sum_of_vectors", "tile", "to_f32", "to_rows", "total", "total_i32", "total_of_rows",
    "total_of_rows_i32", "walsh_hadamard", "where_between", "where_negative", "without_low_nibbles", "words",
    "yield_thread", "zero_f32", "zero_f32_tile", "zero_i32", "zero_i32_tile",
]


# ---- memory ----------------------------------------------------------------------------------------------------------

def _bytes(base: Any, index: int, size: int) -> NDArray[np.uint8]:
    """`size` bytes at base[index], an array's element, or at `index` bytes behind the address `base`; a view."""
    if isinstance(base, np.ndarray):
        array, first = base, int(index) * base.itemsize
    else:
        array, start = memory_at(int(base))
        first = start + int(index)
    if first < 0 or first + size > array.nbytes:
        raise IndexError(f"{size} bytes at byte {first} of an array of {array.nbytes} bytes (index {index})")
    return np.frombuffer(array, np.uint8, size, first)


def load_bytes(base, index):
    return _bytes(base, index, 64).copy()


def load_f32(base, index):
    return _bytes(base, index, 64).view(F32).copy()


def load_i8_as_f32(base, index):
    return _bytes(base, index, 16).view(np.int8).astype(F32)


def load_bf16_as_f32(base, index):
    return (_bytes(base, index, 32).view(np.uint16).astype(np.uint32) << 16).view(F32)


def load_f16_as_f32(base, index):
    """Exact for every finite half, as `simd_llvm` does it: a multiplication with 2**112 moves the exponent."""
    wide = _bytes(base, index, 32).view(np.uint16).astype(np.uint32)
    scaled = ((wide & 0x7FFF) << 13).view(F32) * F32(2.0**112)
    return (scaled.view(np.uint32) | (wide & 0x8000) << 16).view(F32)


def broadcast4(base, index):
    return np.tile(_bytes(base, index, 4), 16)


def broadcast_f32(base, index):
    return np.tile(_bytes(base, index, 4).view(F32), 16)


def broadcast_i32(base, index):
    return np.tile(_bytes(base, index, 4).view(I32), 16)


def store_bytes(base, index, value):
    _bytes(base, index, 64)[:] = _typed(value, np.uint8)


def store_scalar_f32(base, index, value):
    _bytes(base, index, 4).view(F32)[0] = value


def store_f32(base, index, value):
    _bytes(base, index, 64).view(F32)[:] = _typed(value, F32)


def store_scalar_bf16(base, index, value):
    _bytes(base, index, 2).view(np.uint16)[0] = to_bf16(np.array([value], F32))[0]


def store_low_bytes(base, index, value):
    _bytes(base, index, 16)[:] = _low_bytes(value)


def store_f32_as_f16(base, index, value):
    _bytes(base, index, 32).view(np.uint16)[:] = _f32_to_f16(value)


def spread_words(base, index, stride, value):
    _spread(base, index, stride, _low_bytes(value).reshape(4, 4))


def spread_bytes(base, index, stride, value):
    _spread(base, index, stride, _low_bytes(value).reshape(16, 1))


def spread_f32_as_f16(base, index, stride, value):
    _spread(base, index, stride, _f32_to_f16(value).view(np.uint8).reshape(16, 2))


def _spread(base, index, stride, pieces):
    for n, piece in enumerate(pieces):
        _bytes(base, index + stride * n, len(piece))[:] = piece


def _typed(value: Vector, dtype: Any) -> Vector:
    """The vector, if it has this type, else TypeError: another one would not compile."""
    if value.dtype != dtype or value.shape[-1] * value.itemsize != 64:
        raise TypeError(f"a vector of {value.shape[-1]} x {value.dtype} where 64 bytes of {np.dtype(dtype)} belong")
    return value


def _low_bytes(value: Vector) -> Vector:
    low: Vector = _typed(value, I32).astype(np.uint8)
    return low


def _f32_to_f16(value: Vector) -> Vector:
    """The sequence of `simd_llvm`, which says why."""
    bits = _typed(value, F32).view(np.uint32)
    magnitude = (bits & 0x7FFFFFFF).view(F32)
    magnitude = np.where(magnitude < F32(65504), magnitude, F32(65504))
    scaled = magnitude.view(np.uint32) - np.uint32(112 << 23)
    normal = scaled + np.uint32(0xFFF) + (scaled >> 13 & 1) >> 13
    subnormal = (magnitude + F32(0.5)).view(np.uint32) - F32(0.5).view(np.uint32)
    half: Vector = (np.where(magnitude < F32(2.0**-14), subnormal, normal) | bits >> 16 & 0x8000).astype(np.uint16)
    return half


def tile(load, base, index, rows, cols, down, right):
    return np.array([[load(base, index + down * row + right * col) for col in range(cols)] for row in range(rows)])


def words(base, index, rows, cols, down, right):
    return tile(broadcast4, base, index, rows, cols, down, right)


def store_tile(store, base, index, down, right, value):
    for row, vectors in enumerate(value):
        for col, vector in enumerate(vectors):
            store(base, index + down * row + right * col, vector)


def prefetch_tile(base, index, rows, cols, down, right):
    """Nothing: a prefetch may name any address, even one that does not exist."""


prefetch_tile_early = prefetch_tile


# ---- lane by lane ----------------------------------------------------------------------------------------------------

def splat_f32(scalar):
    return np.full(16, scalar, F32)


def splat_i32(scalar):
    return np.full(16, scalar, I32)


def zero_f32():
    return np.zeros(16, F32)


def zero_i32():
    return np.zeros(16, I32)


def lane_numbers():
    return LANES


def zero_f32_tile(rows, cols):
    return np.zeros((rows, cols, 16), F32)


def zero_i32_tile(rows, cols):
    return np.zeros((rows, cols, 16), I32)


def lane_numbers_tile(rows, cols):
    return np.arange(rows * cols * 16, dtype=I32).reshape(rows, cols, 16)


def add(a, b):
    return a + b


def sub(a, b):
    return a - b


def mul(a, b):
    return a * b


def div(a, b):
    return a / b


def fma(a, b, c):
    """a * b + c, rounded once.

    The product of two float32 is exact in float64. The sum there is rounded to odd: when it is inexact, its last bit is made
    1, so that the second rounding, to float32, never sees a tie that is none (Boldo and Melquiond 2008).
    """
    product, wide = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    whole = product + wide
    back = whole - product
    rest = product - (whole - back) + (wide - back)            # what rounding took away, exactly (Knuth's TwoSum)
    odd = whole.view(np.int64) & 1 == 1
    toward = np.where(rest > 0, np.inf, -np.inf)
    whole = np.where(odd | (rest == 0) | ~np.isfinite(whole), whole, np.nextafter(whole, toward))
    return whole.astype(F32)


def maximum(a, b):
    return np.where(a > b, a, b)


def minimum(a, b):
    return np.where(a < b, a, b)


def absolute(a):
    return (a.view(np.uint32) & 0x7FFFFFFF).view(F32)


def add_i32(a, b):
    return a + b


def to_f32(a):
    return _typed(a, I32).astype(F32)


def round_to_i32(a):
    if not (abs(a) < 2.0**31).all():
        raise ValueError(f"round_to_i32 of numbers that no int32 holds: {a}")
    return np.rint(a).astype(I32)


def where_between(lanes, low, high, a, b):
    return np.where((lanes >= low) & (lanes <= high), a, b)


def where_negative(x, a, b):
    return np.where(x < 0, a, b)


def low_nibbles(a):
    return a & np.uint8(15)


def without_low_nibbles(a):
    return a & np.uint8(0xF0)


def flip_top_bits(a):
    return a ^ np.uint8(128)


def exp(a):
    """The sequence of `simd_llvm`."""
    x = np.where(a > F32(-87), a, F32(-87))
    n = np.rint(x * F32(1.44269504))
    r = fma(n, splat_f32(-0.693145752), x)
    r = fma(n, splat_f32(-1.42860677e-6), r)
    p = splat_f32(1.3981999e-3)
    for coefficient in (8.3334519e-3, 4.1665795e-2, 1.6666665e-1, 0.5, 1.0, 1.0):
        p = fma(p, r, splat_f32(coefficient))
    result = (p.view(I32) + (n.astype(I32) << 23)).view(F32)
    return np.where(a < F32(-87), F32(0), result)


# ---- across lanes ----------------------------------------------------------------------------------------------------

def walsh_hadamard(a):
    for n in (1, 2, 4, 8):
        other = a[..., LANES ^ n]
        a = np.where(LANES & n, other - a, a + other)
    return a


def highest(a):
    return _fold(a, maximum)


def total(a):
    return _fold(a, np.add)


def total_i32(a):
    return _fold(a, np.add)


def highest_of_rows(tile):
    return _fold_rows(tile, maximum)


def total_of_rows(tile):
    return _fold_rows(tile, np.add)


def total_of_rows_i32(tile):
    return _fold_rows(tile, np.add)


def sum_of_vectors(tile):
    return np.array([[_pairs(row, np.add)] for row in tile])


def any_above(a, b):
    return bool((a > b).any())


def to_rows(vector, rows):
    return np.broadcast_to(vector[:rows, None, None], (rows, 1, 16))


def _pairs(tile, combine):
    """Combine the vectors of a tile in one fixed tree; a vector stays as it is."""
    vectors = list(tile.reshape(-1, 16))
    while len(vectors) > 1:
        vectors = [combine(*pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def _fold(tile, combine):
    """Combine vectors, then the 16 lanes, in one fixed tree."""
    value = _pairs(tile, combine)
    for n in (8, 4, 2, 1):
        value = combine(value[:n], value[n : 2 * n])
    return value[0]


def _fold_rows(tile, combine):
    """`_fold` of each row: lane i is that of row i % rows."""
    return np.resize(np.array([_fold(row, combine) for row in tile]), 16)


# ---- the operations that instruction sets do differently -----------------------------------------------------------------

def dot4(acc, u, s):
    products = u.astype(I32) * s.view(np.int8)
    return _typed(acc, I32) + products.reshape(*products.shape[:-1], 16, 4).sum(axis=-1, dtype=I32)


def dot4_7bit(acc, u, s):
    if u.max() > 127:
        raise ValueError(f"dot4_7bit of the byte {u.max()}: it takes 0 to 127")
    return dot4(acc, u, s)


def look_up_low(table, codes):
    return table[codes & np.uint8(15)]


def look_up_high(table, codes):
    return table[codes >> np.uint8(4)]


# ---- between threads -------------------------------------------------------------------------------------------------

_atomic = Lock()


def atomic_add(array, index, value):
    with _atomic:
        before = array[index]
        array[index] = before + value
        return before


def atomic_load(array, index):
    with _atomic:
        return array[index]


def pause():
    """Let another thread run: it holds what this one waits for."""
    time.sleep(0)


def yield_thread():
    time.sleep(0)
