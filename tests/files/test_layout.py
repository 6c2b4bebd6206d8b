"""The order of a blob's bytes, written out by hand where the quantizer and the kernels rely on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemistral.files import layout
from edgemistral.files.layout import BLOCK, GROUP, PANEL, Matrix, Recipe, TensorSpec
from tests import blobs


def random_weights(rng, rows, cols, bits):
    codes = rng.integers(0, 1 << bits, (rows, cols), dtype=np.uint8)
    return codes, rng.integers(-128, 128, (rows, cols // GROUP), dtype=np.int8)


@pytest.mark.parametrize(("size", "step", "expected"), [(0, 128, 0), (1, 128, 128), (128, 128, 128), (129, 128, 256)])
def test_round_up(size, step, expected):
    assert layout.round_up(size, step) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_every_byte_has_the_place_that_the_docstring_gives_it(bits):
    codes, scales = random_weights(np.random.default_rng(bits), 2 * PANEL, 2 * BLOCK, bits)
    packed = layout.pack(codes, scales, bits)
    assert packed.shape == (2, 2, layout.BLOCK_BYTES[bits]) == (2, 2, {4: 1088, 8: 2112}[bits])
    for panel in range(2):
        for block in range(2):
            data = packed[panel, block]
            for group in range(4):
                for row in range(16):
                    assert data[16 * group + row].view(np.int8) == scales[16 * panel + row, 4 * block + group]
            for at, byte in enumerate(data[64:]):
                chunk, j = divmod(at, 64)
                row = 16 * panel + j // 4
                if bits == 8:
                    assert byte == codes[row, 128 * block + 4 * chunk + j % 4]
                else:
                    col = 128 * block + 8 * chunk + j % 4
                    assert (byte & 15, byte >> 4) == (codes[row, col], codes[row, col + 4])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([4, 8]), st.integers(0, 1 << 32))
def test_unpack_is_the_inverse_of_pack(panels, blocks, bits, seed):
    codes, scales = random_weights(np.random.default_rng(seed), panels * PANEL, blocks * BLOCK, bits)
    packed = layout.pack(codes, scales, bits)
    assert packed.dtype == np.uint8 and packed.shape == (panels, blocks, layout.BLOCK_BYTES[bits])
    for got, expected in zip(layout.unpack(packed, bits), (codes, scales), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_what_stored_weights_are_worth():
    rng = np.random.default_rng(0)
    row_scales = rng.standard_normal(PANEL).astype(np.float32)
    for bits in (4, 8):
        codes, scales = random_weights(rng, PANEL, BLOCK, bits)
        levels = np.tile(rng.choice(128, 16, replace=False).astype(np.uint8), 4) if bits == 4 else None
        weights = layout.dequantize(layout.pack(codes, scales, bits), row_scales, levels)
        for row, col in ((0, 0), (3, 127), (15, 40)):
            value = int(levels[codes[row, col]]) - 64 if bits == 4 else int(codes[row, col]) - 128
            expected = np.float32(value) * (np.float32(scales[row, col // 32]) * row_scales[row])
            assert weights[row, col] == expected
        assert weights.dtype == np.float32


def test_gate_and_up_rows_alternate_by_panels():
    gate, up = np.arange(32)[:, None], 100 + np.arange(32)[:, None]
    rows = layout.interleave_gate_up(gate, up)[:, 0]
    assert rows.tolist() == [*range(16), *range(100, 116), *range(16, 32), *range(116, 132)]


def test_shapes_are_padded_to_pairs_of_panels_and_blocks():
    assert Matrix("m", 33, 129, 4).shape == (4, 2, 1088)
    assert Matrix("m", 32, 128, 8).shape == (2, 1, 2112)
    config = blobs.config()     # dim 192, 6 + 2 + 2 heads of 32, hidden_dim 448, vocabulary 515
    wqkv, wo, w13, w2 = layout.layer_matrices(config, 1, Recipe(4))
    assert (wqkv.name, wqkv.rows, wqkv.shape) == ("layers.1.wqkv", 320, (20, 2, 1088))
    assert (wo.name, wo.shape) == ("layers.1.wo", (12, 2, 1088))
    assert (w13.name, w13.rows, w13.shape) == ("layers.1.w13", 1024, (64, 2, 1088))    # whole blocks of w2's columns
    assert (w2.name, w2.shape) == ("layers.1.w2", (12, 4, 1088))
    assert layout.output_matrix(config, Recipe(4, 8)).shape == (34, 2, 2112)


@pytest.mark.parametrize("recipe", [Recipe(4, 8), Recipe(4, 4), Recipe(8, 8)])
def test_tensors_come_in_the_order_of_use_and_keep_alignment(recipe):
    specs = list(layout.tensors(blobs.config(n_layers=1), recipe, tokenizer_bytes=7))
    names = [spec.name for spec in specs if not spec.name.endswith((".row_scales", ".levels"))]
    layer = ["attention_norm", "wqkv", "wo", "ffn_norm", "w13", "w2"]
    assert names == ["tok_embeddings", *(f"layers.0.{name}" for name in layer), "norm", "output", "tokenizer"]
    by_name = {spec.name: spec for spec in specs}
    assert len(by_name) == len(specs)
    assert by_name["tok_embeddings"] == TensorSpec("tok_embeddings", "BF16", (515, 192))
    assert by_name["layers.0.w2.row_scales"] == TensorSpec("layers.0.w2.row_scales", "F32", (192,))
    assert by_name["tokenizer"].n_bytes == 7
    assert ("layers.0.wo.levels" in by_name) == (recipe.bits == 4)
    assert ("output.levels" in by_name) == (recipe.output_bits == 4)
    assert all(spec.n_bytes % layout.ALIGNMENT == 0 for spec in specs[:-1])


def test_bytes_of_dtypes():
    assert [TensorSpec("t", dtype, (3, 5)).n_bytes for dtype in ("U8", "BF16", "F32")] == [15, 30, 60]
