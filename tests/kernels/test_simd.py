"""Every operation of the SIMD vocabulary against NumPy, and under every lowering and code generator of this host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba.core.codegen import get_host_cpu_features

from edgemistral.kernels import lowering, matmul, simd
from edgemistral.kernels.jit import entry

F32 = np.float32


def floats(n, seed=0):
    """Ordinary numbers of all sizes, zeros of both signs, ties of rounding, and the edges of float32."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 10.0 ** rng.integers(-6, 7, n)).astype(F32)
    x[:16] = [0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 1, -1, 127.5, -127.5, 1e-45, -1e-38, 1e30, -1e30]
    return x


# ---- lane by lane ----------------------------------------------------------------------------------------------------

@entry
def float_operations(a, b, c, out):
    for i in range(0, a.size, 16):
        x, y, z = simd.load_f32(a, i), simd.load_f32(b, i), simd.load_f32(c, i)
        simd.store_f32(out[0], i, simd.add(x, y))
        simd.store_f32(out[1], i, simd.sub(x, y))
        simd.store_f32(out[2], i, simd.mul(x, y))
        simd.store_f32(out[3], i, simd.div(x, y))
        simd.store_f32(out[4], i, simd.maximum(x, y))
        simd.store_f32(out[5], i, simd.absolute(x))
        simd.store_f32(out[6], i, simd.where_negative(x, y, z))
        low, high = simd.splat_i32(np.int32(3)), simd.splat_i32(np.int32(11))
        simd.store_f32(out[7], i, simd.where_between(simd.lane_numbers(), low, high, x, y))
        simd.store_f32(out[8], i, simd.splat_f32(a[i]))
        simd.store_f32(out[9], i, simd.fma(x, y, z))
        simd.store_f32(out[10], i, simd.minimum(x, y))
        simd.store_f32(out[11], i, simd.walsh_hadamard(x))


def test_float_operations():
    a, b, c = (floats(1024, seed) for seed in (1, 2, 3))
    b[:16] = b[16:32]
    out = np.zeros((12, 1024), F32)
    float_operations(a, b, c, out)
    lanes = np.arange(1024) % 16
    expected = [
        a + b, a - b, a * b, a / b, np.maximum(a, b), abs(a), np.where(a < 0, b, c),
        np.where((lanes >= 3) & (lanes <= 11), a, b), np.repeat(a[::16], 16),
    ]
    for got, want in zip(out, expected, strict=False):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(out[10], np.minimum(a, b))
    x = a.reshape(-1, 16)
    for n in (1, 2, 4, 8):
        other = x[:, np.arange(16) ^ n]
        x = np.where(np.arange(16) & n, other - x, x + other)
    np.testing.assert_array_equal(out[11].reshape(-1, 16), x)


def test_walsh_hadamard_is_the_matrix():
    signs = np.array([[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)])
    a, out = np.eye(16, dtype=F32).reshape(-1), np.zeros((12, 256), F32)
    float_operations(a, a, a, out)
    np.testing.assert_array_equal(out[11].reshape(16, 16), signs)


def test_fma_rounds_once():
    """x**2 - round(x**2) is what rounding took away, exactly."""
    x = floats(1024)
    x = x[(abs(x) > 1e-10) & (abs(x) < 1e10)][:256]
    out = np.zeros((12, x.size), F32)
    float_operations(x, x, -(x * x), out)
    np.testing.assert_array_equal(out[9], x.astype(np.float64) ** 2 - (x * x))
    assert out[9].any()


@entry
def zero_lanes(out):
    simd.store_f32(out, 0, simd.zero_f32())
    simd.store_f32(out, 16, simd.to_f32(simd.zero_i32()))
    simd.store_f32(out, 32, simd.to_f32(simd.lane_numbers()))
    simd.store_f32(out, 48, simd.to_f32(simd.splat_i32(np.int32(-7))))


def test_constants():
    out = np.full(64, 9, F32)
    zero_lanes(out)
    np.testing.assert_array_equal(out.reshape(4, 16), [[0] * 16, [0] * 16, np.arange(16), [-7] * 16])


@entry
def rounded(x, bytes_, out):
    for i in range(0, x.size, 16):
        n = simd.round_to_i32(simd.load_f32(x, i))
        simd.store_low_bytes(bytes_, i, n)
        simd.store_f32(out, i, simd.to_f32(simd.add_i32(n, n)))


def test_rounding_takes_ties_to_even():
    x = np.concatenate([np.arange(-64, 64, dtype=F32) + F32(0.5), floats(896).clip(-1e9, 1e9)])
    bytes_, out = np.zeros(1024, np.int8), np.zeros(1024, F32)
    rounded(x, bytes_, out)
    n = np.rint(x).astype(np.int32)
    np.testing.assert_array_equal(out, (2 * n).astype(F32))
    np.testing.assert_array_equal(bytes_, n.astype(np.int8))      # the low byte, whatever the others hold


@entry
def exponentials(x, out):
    for i in range(0, x.size, 16):
        simd.store_f32(out, i, simd.exp(simd.load_f32(x, i)))


def test_exp():
    special = [-0.0, -87, -1e30, -np.inf] * 4
    x = np.concatenate([special, np.linspace(-100, 0, 100_000), -np.geomspace(1e-45, 1, 4000)]).astype(F32)
    x = np.resize(x, 16 * (x.size // 16 + 1))
    out = np.full(x.size, 9, F32)
    exponentials(x, out)
    assert (out[x < -87] == 0).all()
    assert (out[x == 0] == 1).all()
    exact, near = np.exp(x.astype(np.float64)), x >= -87
    assert (abs(out - exact)[near] / exact[near]).max() < 4e-7


# ---- across lanes ----------------------------------------------------------------------------------------------------

@entry
def folds(x, n, floats_out, ints_out):
    for i in range(0, x.size, 16):
        v = simd.load_f32(x, i)
        floats_out[i // 16, 0] = simd.highest(v)
        floats_out[i // 16, 1] = simd.total(v)
        ints_out[i // 16] = simd.total_i32(simd.round_to_i32(simd.load_f32(n, i)))


def test_folds():
    x, n = floats(1024), np.random.default_rng(0).integers(-(1 << 24), 1 << 24, 1024).astype(F32)
    floats_out, ints_out = np.zeros((64, 2), F32), np.zeros(64, np.int32)
    folds(x, n, floats_out, ints_out)
    np.testing.assert_array_equal(floats_out[:, 0], x.reshape(64, 16).max(axis=1))
    tree = x.reshape(64, 16)
    for width in (8, 4, 2, 1):
        tree = tree[:, :width] + tree[:, width:]
    np.testing.assert_array_equal(floats_out[:, 1], tree[:, 0])
    np.testing.assert_array_equal(ints_out, n.astype(np.int32).reshape(64, 16).sum(axis=1))


# ---- memory ----------------------------------------------------------------------------------------------------------

@entry
def from_halves(halves, out):
    for i in range(0, halves.size, 16):
        simd.store_f32(out, i, simd.load_f16_as_f32(halves, i))


@entry
def to_halves(x, halves):
    for i in range(0, x.size, 16):
        simd.store_f32_as_f16(halves, i, simd.load_f32(x, i))


def test_every_half_float_is_loaded_exactly():
    halves = np.arange(1 << 16, dtype=np.uint16)
    out = np.zeros(halves.size, F32)
    from_halves(halves, out)
    with np.errstate(invalid="ignore"):      # of signalling NaNs, on ARM
        expected, finite = halves.view(np.float16).astype(F32), np.isfinite(halves.view(np.float16))
    np.testing.assert_array_equal(out[finite].view(np.uint32), expected[finite].view(np.uint32))
    assert np.isfinite(out).all()      # what a position never written may hold must not become a NaN


def test_half_floats_are_stored_as_numpy_rounds_them():
    """Every half, the ties between two halves, and their neighbours; larger numbers become the largest half."""
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(F32)
    ties = (halves + np.append(halves[1:], F32(65504))) / 2
    x = np.concatenate([halves, ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(1e9)), floats(4096)])
    x = np.resize(np.concatenate([x, -x]), 16 * (2 * x.size // 16 + 1))
    out = np.zeros(x.size, np.uint16)
    to_halves(x, out)
    np.testing.assert_array_equal(out, x.clip(-65504, 65504).astype(np.float16).view(np.uint16))


@entry
def from_small(bf16, bytes_, out):
    for i in range(0, bf16.size, 16):
        simd.store_f32(out[0], i, simd.load_bf16_as_f32(bf16, i))
        simd.store_f32(out[1], i, simd.load_i8_as_f32(bytes_, i))


def test_bfloat16_and_bytes_are_loaded_exactly():
    bf16, bytes_ = np.arange(1 << 16, dtype=np.uint16), np.resize(np.arange(256, dtype=np.uint8), 1 << 16)
    out = np.zeros((2, bf16.size), F32)
    from_small(bf16, bytes_, out)
    np.testing.assert_array_equal(out[0].view(np.uint32), bf16.astype(np.uint32) << 16)
    np.testing.assert_array_equal(out[1], bytes_.view(np.int8))


@entry
def to_bf16(x, bf16):
    for i in range(x.size):
        simd.store_scalar_bf16(bf16, i, x[i])


def test_bfloat16_is_stored_to_the_nearest_with_ties_to_even():
    halves = np.arange(1 << 15, dtype=np.uint32)
    halves = halves[halves < 0x7F00]
    x = np.concatenate([halves << 16, (halves << 16) + 0x7FFF, (halves << 16) + 0x8000, (halves << 16) + 0x8001])
    out = np.zeros(x.size, np.uint16)
    to_bf16(x.astype(np.uint32).view(F32), out)
    np.testing.assert_array_equal(out, np.concatenate([halves, halves, halves + halves % 2, halves + 1]))
    to_bf16(-x.astype(np.uint32).view(F32), out)
    assert (out[: len(halves)] == halves + 0x8000).all()


@entry
def byte_operations(a, words, out):
    v = simd.load_bytes(a, 1)                                # no alignment is needed
    simd.store_bytes(out[0], 0, v)
    simd.store_bytes(out[1], 0, simd.low_nibbles(v))
    simd.store_bytes(out[2], 0, simd.without_low_nibbles(v))
    simd.store_bytes(out[3], 0, simd.flip_top_bits(v))
    simd.store_bytes(out[4], 0, simd.broadcast4(a, 3))
    simd.store_bytes(out[5], 0, simd.load_bytes(words, 2))   # an index counts the array's own elements
    simd.prefetch_tile(a, 1 << 40, 1, 1, 0, 0)                                # never faults


def test_byte_operations():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, words = rng.integers(0, 256, 65, dtype=np.uint8), rng.integers(0, 1 << 31, 18, dtype=np.int32)
        out = np.zeros((6, 64), np.uint8)
        byte_operations(a, words, out)
        expected = [a[1:], a[1:] & 15, a[1:] & 240, a[1:] ^ 128, np.tile(a[3:7], 16), words[2:].view(np.uint8)]
        np.testing.assert_array_equal(out, expected)


# ---- what instruction sets do differently ----------------------------------------------------------------------------

@entry
def dots(acc, u, s, out):
    for i in range(0, acc.size, 16):
        start = simd.round_to_i32(simd.load_f32(acc, i))
        a, b = simd.load_bytes(u, 4 * i), simd.load_bytes(s, 4 * i)
        simd.store_f32(out, i, simd.to_f32(simd.dot4(start, a, b)))


@entry
def dots_7bit(acc, u, s, out):
    for i in range(0, acc.size, 16):
        start = simd.round_to_i32(simd.load_f32(acc, i))
        a, b = simd.load_bytes(u, 4 * i), simd.load_bytes(s, 4 * i)
        simd.store_f32(out, i, simd.to_f32(simd.dot4_7bit(start, a, b)))


@pytest.mark.parametrize("largest", [255, 127])
def test_dot4_is_exact_for_all_bytes(largest):
    rng = np.random.default_rng(largest)
    u, s = rng.integers(0, largest + 1, (1024, 4), dtype=np.uint8), rng.integers(-128, 128, (1024, 4), dtype=np.int8)
    u[:64], s[:32], s[32:64] = largest, -128, 127
    u[64:96, ::2], s[64:96, 1::2] = largest, -128
    acc = rng.integers(-(1 << 20), 1 << 20, 1024).astype(F32)
    out, expected = np.zeros(1024, F32), acc + (u.astype(np.int32) * s).sum(axis=1)
    dots(acc, u.reshape(-1), s.reshape(-1), out)
    np.testing.assert_array_equal(out, expected)
    if largest == 127:
        out[:] = 0
        dots_7bit(acc, u.reshape(-1), s.reshape(-1), out)
        np.testing.assert_array_equal(out, expected)


@entry
def looked_up(table, codes, low, high):
    levels = simd.load_bytes(table, 0)
    for i in range(0, codes.size, 64):
        simd.store_bytes(low, i, simd.look_up_low(levels, simd.load_bytes(codes, i)))
        simd.store_bytes(high, i, simd.look_up_high(levels, simd.load_bytes(codes, i)))


def test_both_codes_of_a_byte_are_looked_up():
    rng = np.random.default_rng(0)
    table, codes = rng.integers(0, 256, 16, dtype=np.uint8), rng.permutation(np.arange(640) % 256).astype(np.uint8)
    low, high = np.zeros_like(codes), np.zeros_like(codes)
    looked_up(np.tile(table, 4), codes, low, high)
    np.testing.assert_array_equal(low, table[codes & 15])
    np.testing.assert_array_equal(high, table[codes >> 4])


# ---- between threads -------------------------------------------------------------------------------------------------

@entry
def atomics(counts):
    before = simd.atomic_add(counts, 1, np.int64(5))
    simd.pause()
    return before, simd.atomic_load(counts, 1)


def test_atomics():
    counts = np.array([1, 1 << 40, 3])
    assert atomics(counts) == (1 << 40, (1 << 40) + 5)
    assert counts.tolist() == [1, (1 << 40) + 5, 3]


# ---- under every lowering --------------------------------------------------------------------------------------------

LOWERINGS = [
    ("avx512vbmi", ""), ("avx512vnni", "cascadelake"), pytest.param("avxvnni", "alderlake", marks=pytest.mark.slow),
    ("avx2", "haswell"),
    ("i8mm", "neoverse-n2"), ("dotprod", "cortex-a76"), pytest.param("neon", "cortex-a72", marks=pytest.mark.slow),
    pytest.param("plain", "generic", marks=pytest.mark.slow),
]
"""Name of the lowering, and the oldest CPU that has it: code for that one uses no newer instructions around it."""


def settings_for(simd_name, cpu):
    """Environment of a process that runs this lowering; skips the test where the host cannot."""
    if simd_name not in lowering.available():
        pytest.skip(f"this CPU has no {simd_name}")
    if simd_name == "avxvnni" and "+avxvnni" not in get_host_cpu_features():
        cpu = ""    # has it as a part of AVX-512 only, in another encoding, as Zen 4 does
    return os.environ | {"EDGEMISTRAL_SIMD": simd_name} | ({"NUMBA_CPU_NAME": cpu} if cpu else {})


@pytest.mark.parametrize(("simd_name", "cpu"), LOWERINGS)
def test_operations_and_matrices_under(simd_name, cpu):
    """The tests of what lowerings change, in a process that uses this one."""
    if type(simd.LOWERING) is lowering.LOWERINGS[simd_name] and not cpu:
        pytest.skip("is what this process uses")
    run_again(("test_simd.py", "test_matmul.py", "test_activations.py"), settings_for(simd_name, cpu))


def test_operations_under_interpret():
    """The tests of this file and of the activations, in a process whose kernels are ordinary Python."""
    run_again(("test_simd.py", "test_activations.py"), os.environ | {"EDGEMISTRAL_SIMD": "interpret"})


@pytest.mark.slow
@pytest.mark.parametrize("ahead", ["0", "2176"])
def test_matrices_under_prefetching(ahead):
    """They are instructions in the kernels, or are not there at all."""
    if (matmul.READING.ahead_of_one == 0) == (ahead == "0"):
        pytest.skip("is what this process does")
    run_again(("test_matmul.py",), os.environ | {"EDGEMISTRAL_PREFETCH": ahead})


def run_again(files, environment):
    """These tests in a process with this environment."""
    here = Path(__file__).parent
    tests = [str(here / name) for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not under", *tests]
    done = subprocess.run(command, env=environment, cwd=here.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
