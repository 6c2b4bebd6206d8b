"""The weights as the kernels see them: one mapped run of bytes, and where in it everything lies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.files import layout
from edgemistral.files.blob import Blob
from edgemistral.files.layout import Matrix


class Weights(NamedTuple):
    """Byte offsets into `blob`, which stays the file's own mapping; nothing is copied."""

    blob: NDArray[np.uint8]         # (bytes of the file,), read-only
    tok_embeddings: int             # bf16 (vocab_size, dim)
    matrices: NDArray[np.int64]     # (4 * n_layers + 1, 6): wqkv, wo, w13, w2 of every layer, then the output head;
                                    # each a `kernels.matmul.MatrixAt`
    norms: NDArray[np.int64]        # (2 * n_layers + 1,): attention_norm, ffn_norm of every layer, then the last norm; float32


def map_weights(blob: Blob) -> Weights:
    """Offsets of an open blob, whose tensors `Blob.open` has checked against its config."""
    def row(matrix: Matrix) -> list[int]:
        levels = blob.offsets[matrix.name + ".levels"] if matrix.bits == 4 else 0
        return [matrix.bits, matrix.blocks, matrix.panels // 2, blob.offsets[matrix.name],
                blob.offsets[matrix.name + ".row_scales"], levels]

    norms = [f"layers.{layer}.{kind}_norm" for layer in range(blob.config.n_layers) for kind in ("attention", "ffn")]
    return Weights(
        blob.data,
        blob.offsets["tok_embeddings"],
        np.array([row(matrix) for matrix in layout.matrices(blob.config, blob.recipe)], np.int64),
        np.array([blob.offsets[name] for name in (*norms, "norm")], np.int64),
    )
