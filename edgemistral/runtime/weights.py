"""The weights as the kernels see them: one mapped range of bytes, and the offset of every tensor."""

from __future__ import annotations

import numpy as np

from edgemistral.files import layout
from edgemistral.files.blob import Blob
from edgemistral.files.layout import Matrix
from edgemistral.kernels.matmul import ZERO_POINTS, MatrixAt
from edgemistral.kernels.operands import Weights


def map_weights(blob: Blob) -> Weights:
    """Offsets of an open blob, whose tensors `Blob.open` has checked against its config."""
    def where(matrix: Matrix) -> MatrixAt:
        return MatrixAt(
            bits=matrix.bits,
            zero_point=ZERO_POINTS[matrix.bits],
            blocks=matrix.blocks,
            pairs=matrix.panels // 2,
            codes=blob.offsets[matrix.name],
            row_scales=blob.offsets[matrix.name + ".row_scales"],
            levels=blob.offsets[matrix.name + ".levels"] if matrix.bits == 4 else 0,
        )

    norms = [f"layers.{layer}.{kind}_norm" for layer in range(blob.config.n_layers) for kind in ("attention", "ffn")]
    return Weights(
        blob.data,
        blob.offsets["tok_embeddings"],
        np.array([where(matrix) for matrix in layout.matrices(blob.config, blob.recipe)], np.int64),
        np.array([blob.offsets[name] for name in (*norms, "norm")], np.int64),
    )
