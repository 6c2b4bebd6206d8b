"""Unrolling Python loops over registers into straight code."""
# ruff: noqa: F821 - the constants of `unrolled` are names of no module

from __future__ import annotations

import inspect
import traceback

import numpy as np
import pytest

from edgemistral.kernels.jit import entry
from edgemistral.kernels.simd import add, load_f32, mul, splat_f32, store_f32, zero_f32
from edgemistral.kernels.unroll import registers, static, unroll, unrolled


def lines(function):
    return function.__unrolled_source__.splitlines()[1:]


def test_loops_over_registers_become_variables():
    @unrolled(ROWS=2)
    def f(x):
        v = registers()
        for r in unroll(ROWS):
            for p in unroll(1, 3):
                v[r, p] = x[10 * r + p]
        return v[0, 1] + v[1, 2]

    assert lines(f) == [
        "    v_0_1 = x[10 * 0 + 1]",
        "    v_0_2 = x[10 * 0 + 2]",
        "    v_1_1 = x[10 * 1 + 1]",
        "    v_1_2 = x[10 * 1 + 2]",
        "    return v_0_1 + v_1_2",
    ]
    assert f(np.arange(20)) == 13


def test_indices_are_computed():
    @unrolled(N=3)
    def f(x):
        v = registers()
        for i in unroll(2 * N):
            v[i // 2, i % 2] = x[i]
        for i in unroll(0, N, 2):
            v[i, 0] += v[i, 1]
        return v[0, 0], v[1, 0], v[2, 0]

    assert f(range(6)) == (1, 2, 9)


def test_ordinary_loops_and_branches_stay():
    @unrolled(N=2)
    def f(n, flag):
        v = registers()
        for i in unroll(N):
            v[i] = i
        for i in range(n):
            for p in unroll(N):
                v[p] += i
        while v[0] < 10:
            for p in unroll(N):
                v[p] += 10
        if flag:
            for p in unroll(N):
                v[p] = -v[p]
        else:
            v[0] = 0
        return v[0], v[1]

    assert f(4, True) == (-16, -17)
    assert f(4, False) == (0, 17)
    assert "for i in range(n):" in f.__unrolled_source__


def test_static_conditions_keep_one_branch():
    def make(bits):
        @unrolled(BITS=bits)
        def f():
            if static(BITS == 8):
                name = "eight"
            elif static(BITS == 4):
                name = "four"
            else:
                name = "other"
            return name
        return f

    for bits, name in ((8, "eight"), (4, "four"), (16, "other")):
        assert lines(make(bits)) == [f"    name = '{name}'", "    return name"]


def test_a_loop_variable_ends_with_its_loop_and_globals_are_seen():
    @unrolled(N=2)
    def f(r):
        total = 0
        for r in unroll(N):
            total += r * LIMIT
        return total

    assert f(5) == 100


LIMIT = 100


def test_functions_of_other_constants_have_other_names():
    """Names tell cached kernels apart."""
    def make(n):
        @unrolled(N=n, ODD=n % 2)
        def f():
            """What it does."""
            return N
        return f

    assert [make(n).__name__ for n in (1, 2)] == ["f_N1_ODD1", "f_N2_ODD0"]
    assert make(1).__doc__ == "What it does."
    assert make(1).__module__ == __name__
    assert make(2)() == 2


KERNELS = {2: lambda x: x + 2, 3: lambda x: 10 * x}


def test_a_table_of_kernels_is_read_ahead_of_time():
    @unrolled(N=2)
    def f(x):
        return KERNELS[N + 1](KERNELS[N](x)) + {2: 1}[2]

    assert lines(f) == ["    return KERNELS_3(KERNELS_2(x)) + {2: 1}[2]"]
    assert f(1) == 31
    with pytest.raises(KeyError):
        @unrolled(N=4)
        def g(x):
            return KERNELS[N](x)


def test_the_source_is_there_for_tracebacks():
    @unrolled(N=2)
    def f(x):
        for i in unroll(N):
            x[i + 5] = i

    assert inspect.getsource(f).strip() == f.__unrolled_source__.strip()
    try:
        f([1])
    except IndexError as error:
        assert traceback.extract_tb(error.__traceback__)[-1].line == "x[0 + 5] = 0"


def test_numba_compiles_what_comes_out():
    @unrolled(ROWS=4)
    def sum_rows(x, factor, out):
        v = registers()
        for r in unroll(ROWS):
            v[r] = mul(load_f32(x, 16 * r), splat_f32(factor))
        v[4] = zero_f32()
        for r in unroll(ROWS):
            v[4] = add(v[4], v[r])
        store_f32(out, 0, v[4])

    x, out = np.arange(64, dtype=np.float32), np.zeros(16, np.float32)
    entry(sum_rows)(x, np.float32(2), out)
    np.testing.assert_array_equal(out, 2 * x.reshape(4, 16).sum(axis=0))


@pytest.mark.parametrize("marker", [registers, lambda: unroll(2), lambda: static(True)])
def test_the_markers_mean_nothing_elsewhere(marker):
    with pytest.raises(TypeError, match="outside of an unrolled function"):
        marker()
