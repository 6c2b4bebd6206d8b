"""Weights (4 or 8 bits) times quantized activations: y = W x for one token or many, from the same bytes in the same order.

Every output is reduced in one fixed sequence, whatever the number of tokens or threads:

    for each block of 128 columns:   f = 0
        for each group of 32:        f = fma(float(exact integer dot), group_scale, f)
                                     y = fma(f, activation_scale, y)
    y * row_scale

With up to SHORT tokens the weights stream at the speed of memory: codes are looked up and multiplied with all tokens in
registers. With more tokens, one block of a pair of panels is unpacked to 8 bits (it stays in L1) and multiplied with every tile
of tokens. All streams are sequential.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.files.layout import BLOCK_BYTES, CODE_ZERO, GROUPS, LEVEL_ZERO, PANEL, SCALE_BYTES
from edgemistral.kernels.activations import LONG, SHORT
from edgemistral.kernels.jit import inlined, inner
from edgemistral.kernels.lowering import prefetch_ahead
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

PAIR = 2 * PANEL         # rows of two panels, the unit of work
FEW = 4                  # most tokens for which a step waits for memory, not for products
AHEAD, AHEAD_OF_MANY = prefetch_ahead()     # bytes between a load and its prefetch, for up to FEW tokens and for more
STREAMS = 2              # streams read at once with up to FEW tokens: a CPU reads only a limited distance ahead in each
STREAM = PAIR * SHORT    # numbers from one stream to the next in a result
BLOCK4, BLOCK8 = BLOCK_BYTES[4], BLOCK_BYTES[8]


class MatrixAt(NamedTuple):
    """The place of one matrix in the blob, and the meaning of its codes."""

    bits: int
    zero_point: int       # stored weight minus its value
    blocks: int           # of 128 columns
    pairs: int            # of panels of 16 rows
    codes: int            # byte offsets
    row_scales: int
    levels: int           # 4 bits only


class MatrixScratch(NamedTuple):
    """The scratch of one thread; every array starts at a multiple of 64 bytes."""

    weights: NDArray[np.uint8]     # (2 * 2048,) one block of a pair of panels, unpacked to 8 bits
    scales: NDArray[np.float32]    # (4 * 32,) its group scales
    result: NDArray[np.float32]    # (tokens * 32,) the pair's outputs of every token; (STREAMS, SHORT, 32) for FEW tokens


ZERO_POINTS = {4: LEVEL_ZERO, 8: CODE_ZERO}


@inlined
def matrix_at(table, index):
    """Row `index` of an int64 table whose rows are `MatrixAt`s."""
    return MatrixAt(
        table[index, 0], table[index, 1], table[index, 2], table[index, 3], table[index, 4], table[index, 5], table[index, 6]
    )


# ---- up to SHORT tokens ----------------------------------------------------------------------------------------------

def _make_panels(BITS, T):
    """The kernel of a pair of panels in every stream, for a tile of T tokens: codes never go through a buffer."""
    BYTES = BLOCK_BYTES[BITS]
    S = STREAMS if T <= FEW else 1
    CHAINS = 1 if S * T >= 8 else 2      # about 8 sums at a time hide the latency of the dot product
    FAR = AHEAD if T <= FEW else AHEAD_OF_MANY
    LINES = BITS // 4 if FAR else 0      # lines to prefetch with every 64 bytes of 4-bit codes or 128 of 8-bit codes

    @inner
    @unrolled(BITS=BITS, T=T, S=S, BYTES=BYTES, CHAINS=CHAINS, FAR=FAR, LINES=LINES)
    def panels(blob, at, apart, panel_bytes, blocks, levels_at, row_scales, scales_apart, x, result):
        """result[stream][token] = the 32 rows of the pair at byte `at` + stream * `apart` times every token."""
        i = registers()
        f = registers()
        w = registers()
        y = registers()
        if static(BITS == 4):
            levels = load_bytes(blob, levels_at)
        for half in range(2):
            for s in unroll(S):
                for t in unroll(T):
                    y[s, t] = zero_f32()
            for block in range(blocks):
                base = at + half * panel_bytes + block * BYTES
                if static(LINES > 0):
                    for s in unroll(S):
                        prefetch(blob, base + s * apart + FAR)
                for s in unroll(S):
                    for t in unroll(T):
                        f[s, t] = zero_f32()
                for g in range(GROUPS):
                    for s in unroll(S):
                        for t in unroll(T):
                            i[s, t, 0] = splat_i32(x.sums[(block * GROUPS + g) * T + t])
                            if static(CHAINS == 2):
                                i[s, t, 1] = zero_i32()
                    for c in unroll(4):
                        for s in unroll(S):
                            for line in unroll(LINES):      # spread evenly: a core can wait for about 24 lines at a time
                                prefetch(blob, base + s * apart + FAR + SCALE_BYTES + 64 * ((4 * g + c) * LINES + line))
                            codes_at = base + s * apart + SCALE_BYTES
                            if static(BITS == 4):
                                codes = load_bytes(blob, codes_at + 64 * (4 * g + c))
                                w[s, 0], w[s, 1] = look_up(levels, low_nibbles(codes)), look_up(levels, high_nibbles(codes))
                            else:
                                w[s, 0] = load_bytes(blob, codes_at + 128 * (4 * g + c))
                                w[s, 1] = load_bytes(blob, codes_at + 128 * (4 * g + c) + 64)
                        for b in unroll(2):
                            for t in unroll(T):
                                four = broadcast4(x.codes, ((block * GROUPS + g) * 8 + 2 * c + b) * 4 * T + 4 * t)
                                for s in unroll(S):
                                    if static(BITS == 4):
                                        i[s, t, b % CHAINS] = dot4_7bit(i[s, t, b % CHAINS], w[s, b], four)
                                    else:
                                        i[s, t, b % CHAINS] = dot4(i[s, t, b % CHAINS], w[s, b], four)
                    for s in unroll(S):
                        scale = load_i8_as_f32(blob, base + s * apart + 16 * g)
                        for t in unroll(T):
                            if static(CHAINS == 2):
                                i[s, t, 0] = add_i32(i[s, t, 0], i[s, t, 1])
                            f[s, t] = fma(to_f32(i[s, t, 0]), scale, f[s, t])
                for t in unroll(T):
                    scale = splat_f32(x.scales[block * T + t])
                    for s in unroll(S):
                        y[s, t] = fma(f[s, t], scale, y[s, t])
            for s in unroll(S):
                scale = load_f32(blob, row_scales + s * scales_apart + 4 * PANEL * half)
                for t in unroll(T):
                    store_f32(result, STREAM * s + PAIR * t + PANEL * half, mul(y[s, t], scale))

    return panels


_panels_4bit_1, _panels_4bit_2, _panels_4bit_4, _panels_4bit_8 = (_make_panels(4, t) for t in (1, 2, 4, 8))
_panels_8bit_1, _panels_8bit_2, _panels_8bit_4, _panels_8bit_8 = (_make_panels(8, t) for t in (1, 2, 4, 8))


# ---- many tokens -----------------------------------------------------------------------------------------------------

@inlined
@unrolled()
def _unpack_4bit(blob, at, panel_bytes, levels, scratch):
    """One block of two panels -> unsigned bytes [group][8 chunks][panel][64] and float scales [group][panel][16]."""
    for panel in range(2):
        base = at + panel * panel_bytes
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
        for g in unroll(4):
            store_f32(scratch.scales, PAIR * g + PANEL * panel, load_i8_as_f32(blob, base + 16 * g))
            for c in unroll(8):
                codes = load_bytes(blob, base + SCALE_BYTES + 64 * (8 * g + c))
                store_bytes(scratch.weights, 128 * (8 * g + c) + 64 * panel, codes)


def _make_tiles(T, SEVEN_BITS):
    @inlined
    @unrolled(T=T, SEVEN_BITS=SEVEN_BITS)
    def tiles(x, first, count, scratch, blob, ahead, panel_bytes, lines):
        """Multiply the unpacked block with `count` tiles of activations from tile `first` on; adds to scratch.result.

        Meanwhile `lines` lines from byte `ahead` on, and of the next panel, are prefetched, a few with every tile: all at once
        they would delay the other loads.
        """
        i = registers()
        f = registers()
        w = registers()
        share = (lines + count - 1) // count
        for n in range(count):
            tile = first + n
            for line in range(share * n, min(share * n + share, lines)):
                prefetch(blob, ahead + 64 * line)
                prefetch(blob, ahead + panel_bytes + 64 * line)
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


_tiles_4bit = _make_tiles(LONG, True)
# If one instruction does both, compile it once.
_tiles_8bit = _tiles_4bit if type(LOWERING).dot4 is type(LOWERING).dot4_7bit else _make_tiles(LONG, False)


# ---- pairs of panels -------------------------------------------------------------------------------------------------

@inner
def streams_of(tokens):
    """How many pairs of panels are read at once for a number of tokens."""
    return STREAMS if tokens <= FEW else 1


@inner
def multiply_pairs(blob, matrix, pair, apart, x, tokens, scratch):
    """scratch.result[stream][token][32] = rows 32 p ... 32 p + 31 times every token, where p = pair + stream * apart.

    There are streams_of(tokens) streams, STREAM numbers from one to the next. The result is meaningless for p past the matrix.
    """
    bits, blocks, levels, result = matrix.bits, matrix.blocks, matrix.levels, scratch.result
    panel_bytes = blocks * (BLOCK4 if bits == 4 else BLOCK8)
    at, scales = matrix.codes + 2 * pair * panel_bytes, matrix.row_scales + 4 * PAIR * pair
    if tokens > SHORT:
        _multiply_tiles(blob, matrix, at, panel_bytes, scales, x, tokens, scratch)
        return
    if pair + apart >= matrix.pairs:
        apart = 0
    far, scales_far = 2 * apart * panel_bytes, 4 * PAIR * apart
    if bits == 4:
        if tokens == 1:
            _panels_4bit_1(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, result)
        elif tokens == 2:
            _panels_4bit_2(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, result)
        elif tokens <= 4:
            _panels_4bit_4(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, result)
        else:
            _panels_4bit_8(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, result)
    elif tokens == 1:
        _panels_8bit_1(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, result)
    elif tokens == 2:
        _panels_8bit_2(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, result)
    elif tokens <= 4:
        _panels_8bit_4(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, result)
    else:
        _panels_8bit_8(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, result)


@inlined
def _multiply_tiles(blob, matrix, at, panel_bytes, row_scales, x, tokens, scratch):
    result, tiles = scratch.result, (tokens + LONG - 1) // LONG
    for row in range(0, tiles * LONG * PAIR, PANEL):
        store_f32(result, row, zero_f32())
    for block in range(matrix.blocks):
        after = block + 1 if block + 1 < matrix.blocks else 2 * matrix.blocks      # at the end, the next pair's first
        if matrix.bits == 4:
            _unpack_4bit(blob, at + block * BLOCK4, panel_bytes, load_bytes(blob, matrix.levels), scratch)
            _tiles_4bit(x, block * tiles, tiles, scratch, blob, at + after * BLOCK4, panel_bytes, BLOCK4 // 64)
        else:
            _unpack_8bit(blob, at + block * BLOCK8, panel_bytes, scratch)
            _tiles_8bit(x, block * tiles, tiles, scratch, blob, at + after * BLOCK8, panel_bytes, BLOCK8 // 64)
    low, high = load_f32(blob, row_scales), load_f32(blob, row_scales + 4 * PANEL)
    for token in range(tokens):
        store_f32(result, PAIR * token, mul(load_f32(result, PAIR * token), low))
        store_f32(result, PAIR * token + PANEL, mul(load_f32(result, PAIR * token + PANEL), high))
