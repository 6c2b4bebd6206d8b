"""Activations as the matrix kernels pack them: made empty, and read back into rows and columns."""

from __future__ import annotations

import numpy as np

from edgemistral.files.layout import BLOCK, GROUP, GROUPS, round_up
from edgemistral.kernels.activations import Activations, tile_size


def empty_activations(tokens, cols):
    tokens = round_up(tokens, tile_size.py_func(tokens))
    codes = np.zeros(tokens * cols, np.int8)
    sums, scales = np.zeros(tokens * cols // GROUP, np.int32), np.zeros(tokens * cols // BLOCK, np.float32)
    return Activations(codes, codes.view(np.int32), sums, scales)


def unpack_activations(activations, tokens, cols):
    """Codes (tokens, cols), sums (tokens, cols / 32), scales (tokens, cols / 128)."""
    t, blocks = tile_size.py_func(tokens), cols // BLOCK
    codes = activations.codes.reshape(blocks, -1, BLOCK // 4, t, 4).transpose(1, 3, 0, 2, 4).reshape(-1, cols)
    sums = activations.sums.reshape(blocks, -1, GROUPS, t).transpose(1, 3, 0, 2).reshape(-1, blocks * GROUPS)
    scales = activations.scales.reshape(blocks, -1, t).transpose(1, 2, 0).reshape(-1, blocks)
    return codes[:tokens], sums[:tokens], scales[:tokens]
