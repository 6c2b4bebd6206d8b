"""Keys and values as half floats, for reference.

    block     K: 4 panels of 16 positions: [head_dim dims][16 positions]
              V: [64 positions][head_dim dims]

Queries and probabilities stay float32.
"""

from __future__ import annotations

import numpy as np

from edgemistral.kernels.jit import inlined
from edgemistral.kernels.kv_layout import POSITIONS, ROWS
from edgemistral.kernels.simd import (
    add,
    fma,
    load_f16_as_f32,
    load_f32,
    mul,
    splat_f32,
    spread_f32_as_f16,
    store_f32,
    store_f32_as_f16,
    zero_f32,
)
from edgemistral.kernels.softmax import softmax
from edgemistral.kernels.unroll import registers, unroll, unrolled


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
@unrolled(ROWS=ROWS)
def tile_16bit(at, queries, tile_at, row, head_dim, first_seen, last_seen, masked, scratch):
    """See `kv_formats.attend_to_block`."""
    s = registers()
    k = registers()
    values = 128 * head_dim
    for r in unroll(ROWS):
        for p in unroll(4):
            s[r, p] = zero_f32()
    for c in range(head_dim):
        for p in unroll(4):
            k[p] = load_f16_as_f32(at, 32 * head_dim * p + 32 * c)
        for r in unroll(ROWS):
            q = splat_f32(queries.floats[(tile_at * ROWS + r) * head_dim + c])
            for p in unroll(4):
                s[r, p] = fma(k[p], q, s[r, p])
    for r in unroll(ROWS):
        softmax(s[r, 0], s[r, 1], s[r, 2], s[r, 3], first_seen[r], last_seen[r], masked, at, row + r, head_dim, scratch)
    for d in range(0, head_dim, 64):
        for r in unroll(ROWS):
            for p in unroll(4):
                s[r, p] = zero_f32()
        for c in range(64):
            for p in unroll(4):
                k[p] = load_f16_as_f32(at, values + 2 * (head_dim * c + d + 16 * p))
            for r in unroll(ROWS):
                q = splat_f32(scratch.probabilities[64 * r + c])
                for p in unroll(4):
                    s[r, p] = fma(k[p], q, s[r, p])
        for r in unroll(ROWS):
            for p in unroll(4):
                if 16 * p < head_dim - d:
                    v = (row + r) * head_dim + d + 16 * p
                    store_f32(scratch.values, v, add(s[r, p], load_f32(scratch.values, v)))
