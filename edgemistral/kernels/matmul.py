"""Weights (4 or 8 bits) times quantized activations: y = W x for one token or many, from the same bytes in the same order.

Every output is reduced in one fixed sequence, whatever the number of tokens or threads:

    for each block of 128 columns:   f = 0
        for each group of 32:        f = fma(float(exact integer dot), group_scale, f)
                                     y = fma(f, activation_scale, y)
    y * row_scale

One token (or two) streams the weights at the speed of memory: codes are looked up in registers. Many tokens unpack one block
of a pair of panels to 8 bits (it stays in L1) and let every tile of tokens meet it; all that streams is sequential.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.kernels.activations import LONG, SHORT, tile_size
from edgemistral.kernels.jit import inlined, inner
from edgemistral.kernels.simd import (
    LOWERING,
    add_i32,
    broadcast4,
    dot4,
    dot4_7bit,
    fma,
    high_nibbles,
    load_bytes,
    load_f32,
    load_i8_as_f32,
    look_up,
    low_nibbles,
    mul,
    prefetch,
    splat_f32,
    splat_i32,
    store_bytes,
    store_f32,
    to_f32,
    zero_f32,
    zero_i32,
)
from edgemistral.kernels.unroll import registers, static, unroll, unrolled
from edgemistral.layout import BLOCK, BLOCK_BYTES, CODE_ZERO, GROUPS, LEVEL_ZERO, PANEL, SCALE_BYTES

PAIR = 2 * PANEL         # rows of two panels, the unit of work
AHEAD = 6528             # bytes between a load and its prefetch
BLOCK4, BLOCK8 = BLOCK_BYTES[4], BLOCK_BYTES[8]


class MatrixAt(NamedTuple):
    """Where one matrix lies in the blob."""

    bits: int
    blocks: int           # of 128 columns
    pairs: int            # of panels of 16 rows
    codes: int            # byte offsets
    row_scales: int
    levels: int           # 4 bits only


class MatrixScratch(NamedTuple):
    """What one thread needs beside the weights; every array starts at a multiple of 64 bytes."""

    weights: NDArray[np.uint8]     # (2 * 2048,) one block of a pair of panels, unpacked to 8 bits
    scales: NDArray[np.float32]    # (4 * 32,) its group scales
    result: NDArray[np.float32]    # (tokens * 32,) the pair's outputs of every token


@inner
def zero_of(bits):
    """What a stored weight is larger by than the value it stands for."""
    return np.int32(LEVEL_ZERO) if bits == 4 else np.int32(CODE_ZERO)


# ---- one or two tokens -----------------------------------------------------------------------------------------------

def _make_panel(BITS, T):
    """The kernel of one panel for T = 1 or 2 tokens: codes go from memory through registers, never through a buffer."""
    BYTES = BLOCK_BYTES[BITS]

    @inner
    @unrolled(BITS=BITS, T=T, BYTES=BYTES)
    def panel(blob, at, blocks, levels_at, row_scales, x, result, column):
        """result[token * 32 + column ...] = the 16 rows of the panel at byte `at` times every token."""
        even = registers()
        odd = registers()
        f = registers()
        y = registers()
        if static(BITS == 4):
            levels = load_bytes(blob, levels_at)
        for t in unroll(T):
            y[t] = zero_f32()
        for block in range(blocks):
            base = at + block * BYTES
            for line in unroll(BYTES // 64):
                prefetch(blob, base + AHEAD + 64 * line)
            for t in unroll(T):
                f[t] = zero_f32()
            for g in unroll(4):
                for t in unroll(T):
                    even[t], odd[t] = splat_i32(x.sums[(block * GROUPS + g) * T + t]), zero_i32()
                for c in unroll(4):
                    if static(BITS == 4):
                        codes = load_bytes(blob, base + SCALE_BYTES + 64 * (4 * g + c))
                        w0, w1 = look_up(levels, low_nibbles(codes)), look_up(levels, high_nibbles(codes))
                    else:
                        w0 = load_bytes(blob, base + SCALE_BYTES + 128 * (4 * g + c))
                        w1 = load_bytes(blob, base + SCALE_BYTES + 128 * (4 * g + c) + 64)
                    for t in unroll(T):
                        four = (block * BLOCK + 32 * g + 8 * c) * T + 4 * t
                        if static(BITS == 4):
                            even[t] = dot4_7bit(even[t], w0, broadcast4(x.codes, four))
                            odd[t] = dot4_7bit(odd[t], w1, broadcast4(x.codes, four + 4 * T))
                        else:
                            even[t] = dot4(even[t], w0, broadcast4(x.codes, four))
                            odd[t] = dot4(odd[t], w1, broadcast4(x.codes, four + 4 * T))
                scale = load_i8_as_f32(blob, base + 16 * g)
                for t in unroll(T):
                    f[t] = fma(to_f32(add_i32(even[t], odd[t])), scale, f[t])
            for t in unroll(T):
                y[t] = fma(f[t], splat_f32(x.scales[block * T + t]), y[t])
        for t in unroll(T):
            store_f32(result, PAIR * t + column, mul(y[t], row_scales))

    return panel


_panel_4bit_1, _panel_4bit_2 = _make_panel(4, 1), _make_panel(4, 2)
_panel_8bit_1, _panel_8bit_2 = _make_panel(8, 1), _make_panel(8, 2)


# ---- many tokens -----------------------------------------------------------------------------------------------------

@inlined
@unrolled()
def _unpack_4bit(blob, at, panel_bytes, levels, scratch):
    """One block of two panels -> unsigned bytes [group][8 chunks][panel][64] and float scales [group][panel][16]."""
    for panel in range(2):
        base = at + panel * panel_bytes
        for line in unroll(17):
            prefetch(blob, base + BLOCK4 + 64 * line)
        for g in unroll(4):
            store_f32(scratch.scales, PAIR * g + PANEL * panel, load_i8_as_f32(blob, base + 16 * g))
            for c in unroll(4):
                codes = load_bytes(blob, base + SCALE_BYTES + 64 * (4 * g + c))
                store_bytes(scratch.weights, 128 * (8 * g + 2 * c) + 64 * panel, look_up(levels, low_nibbles(codes)))
                store_bytes(scratch.weights, 128 * (8 * g + 2 * c + 1) + 64 * panel, look_up(levels, high_nibbles(codes)))


@inlined
@unrolled()
def _unpack_8bit(blob, at, panel_bytes, scratch):
    for panel in range(2):
        base = at + panel * panel_bytes
        for line in unroll(33):
            prefetch(blob, base + BLOCK8 + 64 * line)
        for g in unroll(4):
            store_f32(scratch.scales, PAIR * g + PANEL * panel, load_i8_as_f32(blob, base + 16 * g))
            for c in unroll(8):
                codes = load_bytes(blob, base + SCALE_BYTES + 64 * (8 * g + c))
                store_bytes(scratch.weights, 128 * (8 * g + c) + 64 * panel, codes)


def _make_tiles(T, SEVEN_BITS):
    @inlined
    @unrolled(T=T, SEVEN_BITS=SEVEN_BITS)
    def tiles(x, first, count, scratch):
        """The unpacked block meets `count` tiles of activations from tile `first` on; adds to scratch.result."""
        i = registers()
        f = registers()
        w = registers()
        for n in range(count):
            tile = first + n
            for t in unroll(T):
                for p in unroll(2):
                    f[t, p] = zero_f32()
            for g in range(GROUPS):
                for t in unroll(T):
                    for p in unroll(2):
                        i[t, p] = splat_i32(x.sums[(tile * GROUPS + g) * T + t])
                for c in unroll(8):
                    for p in unroll(2):
                        w[p] = load_bytes(scratch.weights, 128 * (8 * g + c) + 64 * p)
                    for t in unroll(T):
                        four = broadcast4(x.codes, ((tile * GROUPS + g) * 8 + c) * 4 * T + 4 * t)
                        for p in unroll(2):
                            if static(SEVEN_BITS):
                                i[t, p] = dot4_7bit(i[t, p], w[p], four)
                            else:
                                i[t, p] = dot4(i[t, p], w[p], four)
                for p in unroll(2):
                    scale = load_f32(scratch.scales, PAIR * g + PANEL * p)
                    for t in unroll(T):
                        f[t, p] = fma(to_f32(i[t, p]), scale, f[t, p])
            for t in unroll(T):
                scale = splat_f32(x.scales[tile * T + t])
                for p in unroll(2):
                    at = PAIR * (n * T + t) + PANEL * p
                    store_f32(scratch.result, at, fma(f[t, p], scale, load_f32(scratch.result, at)))
    return tiles


_tiles_4bit_short, _tiles_4bit_long = _make_tiles(SHORT, True), _make_tiles(LONG, True)
if type(LOWERING).dot4 is type(LOWERING).dot4_7bit:      # one instruction for both: compile it once
    _tiles_8bit_short, _tiles_8bit_long = _tiles_4bit_short, _tiles_4bit_long
else:
    _tiles_8bit_short, _tiles_8bit_long = _make_tiles(SHORT, False), _make_tiles(LONG, False)


# ---- a pair of panels ------------------------------------------------------------------------------------------------

@inner
def multiply_pair(blob, matrix, pair, x, tokens, scratch):
    """scratch.result[token][32] = rows 32 pair ... 32 pair + 31 of the matrix times every token. matrix: a MatrixAt."""
    bits, blocks, result = matrix.bits, matrix.blocks, scratch.result
    panel_bytes = blocks * (BLOCK4 if bits == 4 else BLOCK8)
    at, row_scales = matrix.codes + 2 * pair * panel_bytes, matrix.row_scales + 4 * PAIR * pair
    if tokens <= 2:
        for half in range(2):
            scales = load_f32(blob, row_scales + 4 * PANEL * half)
            if bits == 4 and tokens == 1:
                _panel_4bit_1(blob, at + half * panel_bytes, blocks, matrix.levels, scales, x, result, PANEL * half)
            elif bits == 4:
                _panel_4bit_2(blob, at + half * panel_bytes, blocks, matrix.levels, scales, x, result, PANEL * half)
            elif tokens == 1:
                _panel_8bit_1(blob, at + half * panel_bytes, blocks, 0, scales, x, result, PANEL * half)
            else:
                _panel_8bit_2(blob, at + half * panel_bytes, blocks, 0, scales, x, result, PANEL * half)
        return
    t = tile_size(tokens)
    tiles = (tokens + t - 1) // t
    for row in range(0, tiles * t * PAIR, PANEL):
        store_f32(result, row, zero_f32())
    for block in range(blocks):
        if bits == 4:
            _unpack_4bit(blob, at + block * BLOCK4, panel_bytes, load_bytes(blob, matrix.levels), scratch)
            if t == SHORT:
                _tiles_4bit_short(x, block * tiles, tiles, scratch)
            else:
                _tiles_4bit_long(x, block * tiles, tiles, scratch)
        else:
            _unpack_8bit(blob, at + block * BLOCK8, panel_bytes, scratch)
            if t == SHORT:
                _tiles_8bit_short(x, block * tiles, tiles, scratch)
            else:
                _tiles_8bit_long(x, block * tiles, tiles, scratch)
    low, high = load_f32(blob, row_scales), load_f32(blob, row_scales + 4 * PANEL)
    for token in range(tokens):
        store_f32(result, PAIR * token, mul(load_f32(result, PAIR * token), low))
        store_f32(result, PAIR * token + PANEL, mul(load_f32(result, PAIR * token + PANEL), high))
