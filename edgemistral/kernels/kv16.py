"""Keys and values as half floats, for reference.

    block     K: 4 panels of 16 positions: [head_dim dims][16 positions]
              V: [64 positions][head_dim dims]

Queries and probabilities stay float32.
"""

from __future__ import annotations

import numpy as np

from edgemistral.kernels.jit import inlined
from edgemistral.kernels.kv_layout import DIMS, POSITIONS, ROWS
from edgemistral.kernels.simd import (
    add,
    broadcast_f32,
    fma,
    load_f16_as_f32,
    load_f32,
    mul,
    splat_f32,
    spread_f32_as_f16,
    store_f32,
    store_f32_as_f16,
    store_tile,
    tile,
    zero_f32_tile,
)
from edgemistral.kernels.softmax import softmax, values_stride


@inlined
def append_16bit(at, within, x, key_at, value_at, head_dim):
    """Write the rotated key and the value of position `within` of the block at address `at`."""
    keys = 2 * (within // 16 * head_dim * 16 + within % 16)
    values = 2 * (POSITIONS * head_dim + within * head_dim)
    for i in range(0, head_dim, 16):
        spread_f32_as_f16(at, keys + 32 * i, 32, load_f32(x, key_at + i))
        store_f32_as_f16(at, values + 2 * i, load_f32(x, value_at + i))


@inlined
def scale_query_16bit(x, at, head_dim, queries, row_at):
    """The rotated query at x[at] -> row `row_at` of the float queries (counted over all heads and tiles)."""
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    for i in range(0, head_dim, 16):
        store_f32(queries.floats, row_at * head_dim + i, mul(load_f32(x, at + i), splat_f32(scale)))


@inlined
def tile_16bit(at, ahead, queries, tile_at, row, head_dim, masked, scratch):
    """See `kv_formats.TILE`."""
    values, floats = 128 * head_dim, ROWS * head_dim * tile_at
    s = zero_f32_tile(ROWS, 4)
    for c in range(head_dim):
        k = tile(load_f16_as_f32, at, 32 * c, 1, 4, 0, 32 * head_dim)
        s = fma(k, tile(broadcast_f32, queries.floats, floats + c, ROWS, 1, head_dim, 0), s)
    p = softmax(s, masked, row, head_dim, scratch)
    store_tile(store_f32, scratch.probabilities, 0, POSITIONS, 16, p)
    stride = values_stride(head_dim)
    for d in range(0, head_dim, DIMS):
        s = zero_f32_tile(ROWS, 4)
        for c in range(POSITIONS):
            v = tile(load_f16_as_f32, at, values + 2 * (head_dim * c + d), 1, 4, 0, 32)
            s = fma(v, tile(broadcast_f32, scratch.probabilities, c, ROWS, 1, POSITIONS, 0), s)
        to = row * stride + d
        s = add(s, tile(load_f32, scratch.values, to, ROWS, 4, stride, 16))
        store_tile(store_f32, scratch.values, to, stride, 16, s)
