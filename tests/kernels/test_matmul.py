"""Matrix times activations against the NumPy twin: the same bits for any number of tokens, in 4 and 8 bits."""

from __future__ import annotations

import numpy as np
import pytest

from edgemistral.files import layout
from edgemistral.files.layout import BLOCK, GROUP, PANEL, round_up
from edgemistral.kernels.activations import quantize_block, tile_size
from edgemistral.kernels.jit import allocating_entry as entry
from edgemistral.kernels.matmul import PAIR, STREAM, STREAMS, ZERO_POINTS, MatrixAt, MatrixScratch, multiply_pairs, streams_of
from tests import naive
from tests.packed import empty_activations

F32 = np.float32


@entry
def multiply(blob, matrix, x, activations, scratch, out):
    """out (tokens, rows) = x (tokens, whole blocks), quantized, times the matrix."""
    tokens = x.shape[0]
    for token in range(tokens):
        for block in range(matrix.blocks):
            at = token * x.shape[1] + BLOCK * block
            quantize_block(x.reshape(-1), at, matrix.zero_point, activations, tokens, token, block)
    apart = (matrix.pairs + streams_of(tokens) - 1) // streams_of(tokens)
    for unit in range(apart):
        multiply_pairs(blob, matrix, unit, apart, activations, tokens, scratch)
        for stream in range(streams_of(tokens)):
            pair = unit + stream * apart
            if pair < matrix.pairs:
                for token in range(tokens):
                    at = STREAM * stream + PAIR * token
                    out[token, PAIR * pair : PAIR * (pair + 1)] = scratch.result[at : at + PAIR]


class Stored:
    """A matrix in a blob of its own, at an odd offset."""

    def __init__(self, codes, scales, row_scales, levels=None):
        bits = 8 if levels is None else 4
        self.packed = layout.pack(codes, scales, bits)
        self.row_scales, self.levels = row_scales, None if levels is None else np.tile(levels, 4)
        parts = [b"12345678", self.packed.tobytes(), row_scales.tobytes()]
        at = np.cumsum([len(part) for part in parts])
        if self.levels is not None:
            parts.append(self.levels.tobytes())
        panels, blocks, _ = self.packed.shape
        self.blob = np.frombuffer(b"".join(parts), np.uint8)         # read-only, as a mapped file is
        self.at = MatrixAt(bits, ZERO_POINTS[bits], blocks, panels // 2, 8, int(at[1]), int(at[2]))

    def times(self, x):
        """By the kernel."""
        tokens, cols = x.shape
        padded = round_up(tokens, tile_size.py_func(tokens))
        result = np.full(max(padded * PAIR, STREAMS * STREAM), np.nan, F32)
        scratch = MatrixScratch(np.zeros(PAIR * BLOCK, np.uint8), np.zeros(4 * PAIR, F32), result)
        out = np.full((tokens, len(self.row_scales)), np.nan, F32)
        multiply(self.blob, self.at, x, empty_activations(tokens, cols), scratch, out)
        return out

    def naive_times(self, x):
        return naive.matmul(self.packed, self.row_scales, self.levels, *naive.quantize_activations(x))

    def weights(self):
        return layout.dequantize(self.packed, self.row_scales, self.levels)


def random_matrix(rng, bits, rows, cols):
    """cols need not be whole blocks: what is behind has zero scales and any codes."""
    padded = round_up(cols, BLOCK)
    scales = rng.integers(-128, 128, (rows, padded // GROUP), dtype=np.int8)
    scales[:, cols // GROUP :] = 0
    levels = rng.choice(128, 16, replace=False).astype(np.uint8) if bits == 4 else None
    codes = rng.integers(0, 1 << bits, (rows, padded), dtype=np.uint8)
    return Stored(codes, scales, rng.standard_normal(rows).astype(F32), levels)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cols", [128, 192, 448])
def test_every_number_of_tokens_gives_the_twins_bits(bits, cols):
    rng = np.random.default_rng(cols + bits)
    matrix = random_matrix(rng, bits, 3 * PAIR, cols)
    x = rng.standard_normal((70, round_up(cols, BLOCK))).astype(F32)
    x[:, cols:], x[7] = 0, 0
    expected = matrix.naive_times(x)
    in_float32 = x @ matrix.weights().T
    assert np.linalg.norm(expected - in_float32) < 0.01 * np.linalg.norm(in_float32)
    for tokens in (1, 2, 3, 4, 5, 8, 9, 24, 33, 70):
        np.testing.assert_array_equal(matrix.times(x[:tokens]), expected[:tokens])
    for token in range(70):
        np.testing.assert_array_equal(matrix.times(x[token : token + 1])[0], expected[token])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("code", ["lowest", "highest"])
@pytest.mark.parametrize("scale", [127, -128])
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_do_not_saturate(bits, code, scale, sign):
    rows, cols = PAIR, 2 * BLOCK
    codes = np.full((rows, cols), 0 if code == "lowest" else (1 << bits) - 1, np.uint8)
    levels = np.array([0, *range(50, 64), 127], np.uint8) if bits == 4 else None
    matrix = Stored(codes, np.full((rows, cols // GROUP), scale, np.int8), np.ones(rows, F32), levels)
    x = np.full((9, cols), sign * 3.5, F32)
    zero, highest = (layout.LEVEL_ZERO, 127) if bits == 4 else (layout.CODE_ZERO, 255)
    exact = ((0 if code == "lowest" else highest) - zero) * scale * sign * 3.5 * cols
    for tokens in (1, 3, 5, 9):
        got = matrix.times(x[:tokens])
        np.testing.assert_array_equal(got, matrix.naive_times(x[:tokens]))
        np.testing.assert_allclose(got, exact, rtol=1e-6)


def test_outliers_stay_in_their_block():
    """A huge activation takes the precision of its own 128 columns and of no others."""
    rng = np.random.default_rng(0)
    matrix = random_matrix(rng, 8, PAIR, 3 * BLOCK)
    x = rng.standard_normal((2, 3 * BLOCK)).astype(F32)
    x[1] = x[0]
    x[1, 5] = 1e8
    first, second = (matrix.times(part) for part in (x, x[1:]))
    np.testing.assert_array_equal(first[1], second[0])
    np.testing.assert_array_equal(first, matrix.naive_times(x))


def test_rows_do_not_depend_on_their_neighbours():
    rng = np.random.default_rng(0)
    matrix, x = random_matrix(rng, 4, 2 * PAIR, 192), rng.standard_normal((4, 256)).astype(F32)
    codes, scales = layout.unpack(matrix.packed, 4)
    order = rng.permutation(2 * PAIR)
    shuffled = Stored(codes[order], scales[order], matrix.row_scales[order], matrix.levels[:PANEL])
    np.testing.assert_array_equal(shuffled.times(x), matrix.times(x)[:, order])
