"""The content of a blob and the order of its bytes: the only description, shared by quantizer, reader and kernels.

A weight matrix (rows x cols, y = W x) is cut into **panels** of 16 rows and **blocks** of 128 columns; rows are padded to
whole pairs of panels and columns to whole blocks. The panels of a matrix follow each other, the blocks of a panel follow
each other, and a block is the unit that a kernel streams:

    64 bytes    one signed byte of group scale for every group of 32 columns (4) and row (16), group-major
    codes       4 groups, each in chunks of 4 columns:
                8 bits: 8 chunks of 64 bytes; byte j is row j // 4, column 4 c + j % 4, as code + 128
                4 bits: 4 chunks of 64 bytes; byte j is row j // 4, column 8 c + j % 4 in the low nibble and
                        column 8 c + 4 + j % 4 in the high nibble, as an index into the matrix's 16 levels

so that one dot-product instruction multiplies 64 bytes of codes with 4 broadcast bytes of activations, and 16 rows accumulate
side by side. A weight is  row_scale * group_scale * (level - 64)  in 4 bits and  row_scale * group_scale * code  in 8.
Levels are kept within 0..127, so that no instruction set's 16-bit intermediate sums can saturate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig

PANEL = 16           # rows that accumulate side by side
BLOCK = 128          # columns that share one activation scale
GROUP = 32           # columns that share one weight scale
GROUPS = BLOCK // GROUP
LEVEL_ZERO = 64      # the stored 4-bit level that stands for zero
CODE_ZERO = 128      # the stored 8-bit code that stands for zero
ALIGNMENT = 64       # bytes; every tensor but the last is a multiple of it

SCALE_BYTES = PANEL * GROUPS
BLOCK_BYTES = {bits: SCALE_BYTES + PANEL * BLOCK * bits // 8 for bits in (4, 8)}   # 1088 and 2112


def round_up(size: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `size`."""
    return -(-size // step) * step


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a blob: `rows` x `cols` real values inside padded panels."""

    name: str
    rows: int
    cols: int
    bits: int

    @property
    def panels(self) -> int:
        return round_up(self.rows, 2 * PANEL) // PANEL

    @property
    def blocks(self) -> int:
        return round_up(self.cols, BLOCK) // BLOCK

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the stored bytes: (panels, blocks, bytes of a block)."""
        return self.panels, self.blocks, BLOCK_BYTES[self.bits]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the safetensors header lists it. dtype: U8, F32 or BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * {"U8": 1, "BF16": 2, "F32": 4}[self.dtype]

_LAYER_MATRIX = re.compile(r"layers\.[0-9]+\.(wqkv|wo|w13|w2)")


@dataclass(frozen=True)
class Recipe:
    """The bits of the layers' matrices and of the output head. Embeddings stay bf16: a token reads one row of them."""

    bits: int = 4
    output_bits: int = 8
    eight: tuple[str, ...] = ()   # the layers' matrices with 8 bits if `bits` is 4, in file order

    def bits_of(self, name: str) -> int:
        """The bits of a matrix of the layers."""
        return 8 if name in self.eight else self.bits

    @classmethod
    def from_dict(cls, fields: Any) -> Recipe:
        """The inverse of `to_dict`. Raises ValueError with a few words."""
        if not isinstance(fields, dict) or not {"bits", "output_bits"} <= set(fields) <= {"bits", "output_bits", "eight"}:
            raise ValueError("not bits and output_bits of 4 or 8")
        if not all(type(fields[name]) is int and fields[name] in BLOCK_BYTES for name in ("bits", "output_bits")):
            raise ValueError("not bits and output_bits of 4 or 8")
        eight = fields.get("eight", [])
        if not isinstance(eight, list) or not all(isinstance(name, str) and _LAYER_MATRIX.fullmatch(name) for name in eight):
            raise ValueError('its "eight" is not a list of names of the layers\' matrices')
        if "eight" in fields and (fields["bits"] != 4 or not eight or len(set(eight)) < len(eight)):
            raise ValueError('its "eight" must name different matrices, of a model whose bits are 4')
        return cls(fields["bits"], fields["output_bits"], tuple(eight))

    def to_dict(self) -> dict[str, Any]:
        """As stored in a blob's metadata."""
        fields: dict[str, Any] = {"bits": self.bits, "output_bits": self.output_bits}
        return fields | ({"eight": list(self.eight)} if self.eight else {})


def layer_matrices(config: ModelConfig, layer: int, recipe: Recipe) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """wqkv, wo, w13, w2 of one layer.

    wqkv: the rows of wq, wk, wv one after another, rotary pairs as (i, i + head_dim / 2).
    w13: 16 rows of the gate (w1) and 16 of the up projection (w3) in turn, each padded to whole blocks of w2's columns,
    so that SwiGLU can be applied to a pair of panels as soon as it is computed.
    """
    c, at = config, f"layers.{layer}."

    def matrix(name: str, rows: int, cols: int) -> Matrix:
        return Matrix(at + name, rows, cols, recipe.bits_of(at + name))

    return (
        matrix("wqkv", c.q_dim + 2 * c.kv_dim, c.dim),
        matrix("wo", c.dim, c.q_dim),
        matrix("w13", 2 * round_up(c.hidden_dim, BLOCK), c.dim),
        matrix("w2", c.dim, c.hidden_dim),
    )


def output_matrix(config: ModelConfig, recipe: Recipe) -> Matrix:
    """The output head."""
    return Matrix("output", config.vocab_size, config.dim, recipe.output_bits)


def matrices(config: ModelConfig, recipe: Recipe) -> Iterator[Matrix]:
    """All matrices in file order."""
    for layer in range(config.n_layers):
        yield from layer_matrices(config, layer, recipe)
    yield output_matrix(config, recipe)


def matrix_tensors(matrix: Matrix) -> Iterator[TensorSpec]:
    """The tensors that store one matrix: codes, row scales, and for 4 bits its levels, repeated to fill one vector."""
    yield TensorSpec(matrix.name, "U8", matrix.shape)
    yield TensorSpec(matrix.name + ".row_scales", "F32", (matrix.panels * PANEL,))
    if matrix.bits == 4:
        yield TensorSpec(matrix.name + ".levels", "U8", (64,))


def tensors(config: ModelConfig, recipe: Recipe, tokenizer_bytes: int) -> Iterator[TensorSpec]:
    """Every tensor of a blob in file order, which is the order of use; the tokenizer's odd size comes last."""
    yield TensorSpec("tok_embeddings", "BF16", (config.vocab_size, config.dim))
    for layer in range(config.n_layers):
        wqkv, wo, w13, w2 = layer_matrices(config, layer, recipe)
        yield TensorSpec(f"layers.{layer}.attention_norm", "F32", (config.dim,))
        yield from matrix_tensors(wqkv)
        yield from matrix_tensors(wo)
        yield TensorSpec(f"layers.{layer}.ffn_norm", "F32", (config.dim,))
        yield from matrix_tensors(w13)
        yield from matrix_tensors(w2)
    yield TensorSpec("norm", "F32", (config.dim,))
    yield from matrix_tensors(output_matrix(config, recipe))
    yield TensorSpec("tokenizer", "U8", (tokenizer_bytes,))


def interleave_gate_up(gate: NDArray[np.generic], up: NDArray[np.generic]) -> NDArray[np.generic]:
    """Rows of w1 and w3, each (n, cols) with n a multiple of 16 -> rows of w13 (2 n, cols)."""
    n, cols = gate.shape
    return np.stack([gate.reshape(n // PANEL, PANEL, cols), up.reshape(n // PANEL, PANEL, cols)], axis=1).reshape(2 * n, cols)


def pack(codes: NDArray[np.uint8], scales: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Stored codes uint8 (rows, cols) and scales int8 (rows, cols / 32) -> bytes (panels, blocks, block bytes).

    rows a multiple of 16, cols of 128. The plain twin of what the quantizer's kernel writes.
    """
    rows, cols = codes.shape
    panels, blocks = rows // PANEL, cols // BLOCK
    s = scales.reshape(panels, PANEL, blocks, GROUPS).transpose(0, 2, 3, 1).reshape(panels, blocks, SCALE_BYTES)
    if bits == 8:
        c = codes.reshape(panels, PANEL, blocks, BLOCK // 4, 4).transpose(0, 2, 3, 1, 4)
    else:
        # panel, row, block, chunk, half, 4  ->  panel, block, chunk, half, row, 4
        x = codes.reshape(panels, PANEL, blocks, BLOCK // 8, 2, 4).transpose(0, 2, 3, 4, 1, 5)
        c = x[:, :, :, 0] | x[:, :, :, 1] << 4
    return np.concatenate([s.view(np.uint8), c.reshape(panels, blocks, -1)], axis=2)


def unpack(packed: NDArray[np.uint8], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """The inverse of `pack`."""
    panels, blocks, _ = packed.shape
    s = np.ascontiguousarray(packed[:, :, :SCALE_BYTES]).view(np.int8)
    scales = s.reshape(panels, blocks, GROUPS, PANEL).transpose(0, 3, 1, 2).reshape(panels * PANEL, blocks * GROUPS)
    c = packed[:, :, SCALE_BYTES:]
    if bits == 8:
        codes = c.reshape(panels, blocks, BLOCK // 4, PANEL, 4).transpose(0, 3, 1, 2, 4)
    else:
        x = c.reshape(panels, blocks, BLOCK // 8, 1, PANEL, 4)
        codes = np.concatenate([x & 15, x >> 4], axis=3).transpose(0, 4, 1, 2, 3, 5)   # panel, row, block, chunk, half, 4
    return np.ascontiguousarray(codes.reshape(panels * PANEL, blocks * BLOCK)), scales


def dequantize(
    packed: NDArray[np.uint8], row_scales: NDArray[np.float32], levels: NDArray[np.uint8] | None
) -> NDArray[np.float32]:
    """The float32 weights (padded rows, padded cols) that the stored bytes stand for; `levels` None means 8 bits."""
    codes, scales = unpack(packed, 8 if levels is None else 4)
    values = codes.astype(np.float32) - CODE_ZERO
    if levels is not None:
        values = (levels[:16].astype(np.float32) - LEVEL_ZERO)[codes]
    return values * (np.repeat(scales.astype(np.float32), GROUP, axis=1) * row_scales[:, None])
