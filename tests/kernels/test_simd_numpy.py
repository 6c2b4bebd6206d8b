"""The interpreted vocabulary: the bits of the compiled one, checked bounds, and a whole model that runs in it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from edgemistral_quantize import quantize

import edgemistral
from edgemistral.kernels import simd_llvm, simd_numpy
from edgemistral.kernels.addresses import address_of
from edgemistral.kernels.jit import entry
from tests.checkpoints import write_hf
from tests.golden.models import MODELS

F32 = np.float32
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.environ.get("EDGEMISTRAL_SIMD") == "interpret", reason="compares with compiled kernels")


def test_both_have_the_same_operations():
    assert simd_numpy.__all__ == simd_llvm.__all__ == sorted(simd_numpy.__all__)
    for name in simd_numpy.__all__:
        assert getattr(simd_numpy, name) is not None and getattr(simd_llvm, name) is not None


# ---- the same bits ---------------------------------------------------------------------------------------------------

@entry
def compiled(a, b, c, out, halves, scalars):
    for i in range(0, a.size, 16):
        x, y, z = simd_llvm.load_f32(a, i), simd_llvm.load_f32(b, i), simd_llvm.load_f32(c, i)
        simd_llvm.store_f32(out[0], i, simd_llvm.fma(x, y, z))
        simd_llvm.store_f32(out[1], i, simd_llvm.div(x, y))
        simd_llvm.store_f32(out[2], i, simd_llvm.exp(x))
        simd_llvm.store_f32(out[3], i, simd_llvm.splat_f32(simd_llvm.total(x)))
        simd_llvm.store_f32(out[4], i, simd_llvm.splat_f32(simd_llvm.highest(x)))
        simd_llvm.store_f32(out[5], i, simd_llvm.maximum(x, y))
        simd_llvm.store_f32(out[6], i, simd_llvm.where_negative(x, y, z))
        simd_llvm.store_f32(out[7], i, simd_llvm.minimum(x, y))
        simd_llvm.store_f32(out[8], i, simd_llvm.walsh_hadamard(x))
        simd_llvm.store_scalar_bf16(scalars, i, a[i])
        simd_llvm.store_f32_as_f16(halves, i, x)


def interpreted(a, b, c, out, halves, scalars):
    for i in range(0, a.size, 16):
        x, y, z = a[i : i + 16], b[i : i + 16], c[i : i + 16]
        out[0, i : i + 16] = simd_numpy.fma(x, y, z)
        out[1, i : i + 16] = simd_numpy.div(x, y)
        out[2, i : i + 16] = simd_numpy.exp(x)
        out[3, i : i + 16] = simd_numpy.total(x)
        out[4, i : i + 16] = simd_numpy.highest(x)
        out[5, i : i + 16] = simd_numpy.maximum(x, y)
        out[6, i : i + 16] = simd_numpy.where_negative(x, y, z)
        out[7, i : i + 16] = simd_numpy.minimum(x, y)
        out[8, i : i + 16] = simd_numpy.walsh_hadamard(x)
        if not np.isnan(a[i]):
            simd_numpy.store_scalar_bf16(scalars, i, a[i])
        simd_numpy.store_f32_as_f16(halves, i, x)


def hard_numbers(rng, n):
    """Any bits: numbers of all sizes, subnormal ones, both zeros, infinities, not-a-numbers."""
    x = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    x[::7] &= 0x80FFFFFF                    # tiny, or zero with a few bits
    x[::11] &= 0xFF800000                   # powers of two
    x[::31] = rng.choice([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x7F7FFFFF, 0x00800000], len(x[::31]))
    return x.view(F32)


def products_near_ties(rng, n):
    """a * b + c just beside the middle between two float32: what rounding to float64 first gets wrong."""
    a = (1 + rng.integers(0, 1 << 23, n) * 2.0**-23).astype(F32)
    b = (1 + rng.integers(0, 1 << 23, n) * 2.0**-23).astype(F32)
    exact = a.astype(np.float64) * b                                 # 48 bits
    c = (np.ldexp(rng.choice([-1.0, 1.0], n), rng.integers(20, 56, n)) + rng.integers(-3, 4, n)).astype(F32)
    c[::3] = -(exact[::3].astype(F32)) + c[::3] * F32(2.0**-40)
    tiny = np.ldexp(exact[1::3] - exact[1::3].astype(F32), 0).astype(F32)
    c[1::3] = tiny * F32(2.0**-12)
    return a, b, c


@pytest.mark.parametrize("numbers", ["any bits", "near ties", "halfway and a little"])
def test_the_same_bits_as_compiled(numbers):
    rng, n = np.random.default_rng(0), 16 * 1024
    if numbers == "any bits":
        a, b, c = (hard_numbers(rng, n) for _ in range(3))
    elif numbers == "near ties":
        a, b, c = products_near_ties(rng, n)
    else:      # c is halfway between two float32 of the sum's size; the product decides, and float64 drops it
        a = np.ldexp(F32(1) + rng.integers(0, 4, n) * F32(2**-23), rng.integers(-60, -30, n)).astype(F32)
        b = np.ldexp(rng.choice([-1, 1], n).astype(F32), rng.integers(-40, 30, n)).astype(F32)
        c = np.ldexp(F32(1) + rng.integers(0, 1 << 23, n) * F32(2**-23), rng.integers(-40, 40, n)).astype(F32)
    wanted, got = np.zeros((9, n), F32), np.zeros((9, n), F32)
    halves, got_halves, scalars, got_scalars = (np.zeros(n, np.uint16) for _ in range(4))
    compiled(a, b, c, wanted, halves, scalars)
    with np.errstate(all="ignore"):
        interpreted(a, b, c, got, got_halves, got_scalars)
    number = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(got), ~number)            # whose bits say nothing
    np.testing.assert_array_equal(got.view(np.uint32)[number], wanted.view(np.uint32)[number])
    np.testing.assert_array_equal(got_halves, halves)
    np.testing.assert_array_equal(got_scalars[~np.isnan(a)], scalars[~np.isnan(a)])


def test_fma_where_rounding_twice_is_wrong():
    """1 + 2**-24 is halfway to the next float32; a product of 2**-70 decides, and float64 cannot hold the sum."""
    one = np.ones(16, F32)
    for sign, expected in ((1, 1 + 2.0**-23), (-1, 1.0)):
        a, b = one * F32(sign * 2.0**-35), one * F32(2.0**-35)
        halfway = simd_numpy.fma(one * F32(2.0**-12), one * F32(2.0**-12), one)    # a tie: to even
        assert (halfway == 1).all()
        c = one * F32(1 + 2.0**-23)
        x, y = one * F32(1 + 2.0**-12), one * F32(1 + 2.0**-12)      # x * y = 1 + 2**-11 + 2**-24: a tie with nothing below
        assert (simd_numpy.fma(x, y, a * b) == F32(1 + 2.0**-11 + (2.0**-23 if expected > 1 else 0))).all()
        assert (simd_numpy.fma(a, b, c) == c).all()


# ---- bounds ----------------------------------------------------------------------------------------------------------

LOADS = {"load_bytes": 64, "load_f32": 64, "load_i8_as_f32": 16, "load_bf16_as_f32": 32, "load_f16_as_f32": 32, "broadcast4": 4}


@pytest.mark.parametrize("name", LOADS)
def test_loads_stay_inside(name):
    load, data = getattr(simd_numpy, name), np.zeros(256, np.uint8)
    address, last = address_of(data), 256 - LOADS[name]
    for base in (data, address):
        load(base, 0), load(base, last)
        for outside in (-1, last + 1, 256, 1 << 40):
            with pytest.raises(IndexError, match=f"{LOADS[name]} bytes at byte {outside} of an array of 256 bytes"):
                load(base, outside)
    load(address + last, 0), load(address + 100, -100)
    with pytest.raises(IndexError):
        load(data.view(np.int32), last // 4 + 1)      # an index counts the array's own elements


def test_stores_stay_inside():
    f, i, b = simd_numpy.zero_f32(), simd_numpy.zero_i32(), np.zeros(64, np.uint8)
    data = np.full(128, 9, np.uint8)
    for store, value, size in (
        (simd_numpy.store_bytes, b, 64), (simd_numpy.store_f32, f, 64), (simd_numpy.store_low_bytes, i, 16),
        (simd_numpy.store_f32_as_f16, f, 32), (simd_numpy.store_scalar_f32, F32(0), 4),
    ):
        for outside in (-1, 129 - size):
            with pytest.raises(IndexError):
                store(data, outside, value)
    for spread, value, stride in (
        (simd_numpy.spread_words, i, 43), (simd_numpy.spread_bytes, i, 9), (simd_numpy.spread_f32_as_f16, f, 9)
    ):
        with pytest.raises(IndexError):
            spread(data, 0, stride, value)
    simd_numpy.prefetch_tile(data, 1 << 50, 1, 1, 0, 0)


def test_only_known_memory_is_read_by_address():
    data = np.arange(64, dtype=np.uint8)
    address = address_of(data)
    np.testing.assert_array_equal(simd_numpy.load_bytes(np.int64(address), 0), data)
    for elsewhere in (address - 1, address + 64, 0, 1 << 60):
        with pytest.raises(IndexError):
            simd_numpy.load_bytes(elsewhere, 0)
    del data
    with pytest.raises(IndexError, match="lies in no array"):
        simd_numpy.load_bytes(address, 0)


def test_what_compiled_code_leaves_undefined_is_refused():
    high, i = np.full(64, 128, np.uint8), simd_numpy.zero_i32()
    with pytest.raises(ValueError, match="byte 128"):
        simd_numpy.dot4_7bit(i, high, high)
    for value in (2.0**31, -np.inf, np.nan):
        with pytest.raises(ValueError, match="no int32 holds"):
            simd_numpy.round_to_i32(simd_numpy.splat_f32(value))
    with pytest.raises(TypeError, match="16 x int32 where 64 bytes of float32 belong"):
        simd_numpy.store_f32(np.zeros(64, F32), 0, i)


def run_interpreted(code, *arguments):
    """Output of a program whose kernels are ordinary Python."""
    environment = os.environ | {"EDGEMISTRAL_SIMD": "interpret"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_kernels_refuse_indices_from_the_end():
    code = """
import numpy as np
from edgemistral.kernels.addresses import address_of
from edgemistral.kernels.jit import entry
@entry
def last(values, which):
    return values[which]
print(last(np.arange(3), 2))
try:
    last(np.arange(3), -1)
except IndexError as error:
    print(error)
"""
    assert run_interpreted(code) == ["2", "index", "-1", "is", "negative"]


# ---- a whole model ---------------------------------------------------------------------------------------------------

def digests(path, kv_bits=8, threads=1):
    """Of the logits of a prompt that takes tiles; then tokens that are generated one by one."""
    ids = [1, 7, 300, 41, 5, 99, 260, 3, 12]
    with edgemistral.load(path, kv_bits=kv_bits, threads=threads) as model:
        logits = hashlib.sha256(model.logits(ids).tobytes()).hexdigest()
        return [logits, *map(str, model.generate(ids, 3, temperature=0))]


@pytest.mark.parametrize(("bits", "kv_bits", "threads"), [(4, 8, 1), (4, 4, 1), (8, 16, 2)])
def test_a_model_gives_the_compiled_bits(bits, kv_bits, threads, tmp_path):
    golden = next(model for model in MODELS if model.name == "sliding_window")
    path = quantize(golden.write(write_hf, tmp_path), tmp_path / "blob", bits=bits, progress=False)
    code = f"""
import sys
from pathlib import Path
from tests.kernels.test_simd_numpy import digests
print(*digests(Path(sys.argv[1]), {kv_bits}, {threads}))
"""
    assert run_interpreted(code, str(path)) == digests(path, kv_bits)
