"""Blobs of any shape with random weights, made without a checkpoint or the quantizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgemistral.config import ModelConfig
from edgemistral.files import layout
from edgemistral.files.bf16 import to_bf16
from edgemistral.files.blob_writer import BlobWriter
from edgemistral.files.layout import Recipe


def config(**changes: object) -> ModelConfig:
    """A small model with awkward sizes: widths that are no multiple of a block, a vocabulary that is none of a panel."""
    fields = {
        "dim": 192, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32, "hidden_dim": 448, "vocab_size": 515,
        "context": 512, "norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": None, "bos_id": 1, "eos_id": 2,
    }
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


def write_blob(path: Path, config: ModelConfig, recipe: Recipe, tokenizer: bytes = b"none", seed: int = 0) -> Path:
    """A blob whose weights are uniform random codes of variance 0.5 / columns; padding holds zeros, as the quantizer's does."""
    rng = np.random.default_rng(seed)
    with BlobWriter(path, config, recipe, len(tokenizer), force=True) as writer:
        def write(name: str, array: np.ndarray) -> None:
            writer.write(name, [np.ascontiguousarray(array)], lambda: "0" * 63 + "1")

        embeddings = rng.standard_normal((config.vocab_size, config.dim)).astype(np.float32)
        write("tok_embeddings", to_bf16(embeddings))
        for norm in [name for name in writer.tensors if name.endswith("norm")]:
            write(norm, rng.uniform(0.8, 1.2, config.dim).astype(np.float32))
        for matrix in layout.matrices(config, recipe):
            panels, blocks, _ = matrix.shape
            rows, cols = panels * layout.PANEL, blocks * layout.BLOCK
            scales = rng.integers(20, 128, (rows, cols // layout.GROUP)) * rng.choice([-1, 1], (rows, cols // layout.GROUP))
            scales[:, matrix.cols // layout.GROUP :] = 0
            codes = rng.integers(0, 1 << matrix.bits, (rows, cols), dtype=np.uint8)
            span = 127 / 2 if matrix.bits == 4 else 255 / 2
            row_scales = np.full(rows, (1.5 / matrix.cols) ** 0.5 / span / 75, np.float32)
            if ".w13" in matrix.name:
                pair, within = np.divmod(np.arange(rows), 2 * layout.PANEL)
                padding = pair * layout.PANEL + within % layout.PANEL >= config.hidden_dim
            else:
                padding = np.arange(rows) >= matrix.rows
            row_scales[padding] = 0
            write(matrix.name, layout.pack(codes, scales.astype(np.int8), matrix.bits))
            write(matrix.name + ".row_scales", row_scales)
            if matrix.bits == 4:
                write(matrix.name + ".levels", np.tile(np.sort(rng.choice(128, 16, replace=False)).astype(np.uint8), 4))
        write("tokenizer", np.frombuffer(tokenizer, np.uint8))
        return writer.finish()
