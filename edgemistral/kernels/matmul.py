"""Weights (4 or 8 bits) times quantized activations: y = W x for one token or many, from the same bytes in the same order.

Every output is reduced in one fixed sequence, whatever the number of tokens or threads:

    for each block of 128 columns:   f = 0
        for each group of 32:        f = fma(float(exact integer dot), group_scale, f)
                                     y = fma(f, activation_scale, y)
    y * row_scale

With up to DIRECT tokens, codes are looked up and multiplied with a tile of up to SHORT tokens in registers; for the first tile
they stream from memory, for the next ones from L2. With more tokens, one block of a pair of panels is unpacked to 8 bits (it
stays in L1) and multiplied with every tile of LONG tokens. All streams are sequential.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.files.layout import BLOCK_BYTES, CODE_ZERO, GROUPS, LEVEL_ZERO, PANEL, SCALE_BYTES
from edgemistral.kernels.activations import DIRECT, LONG, SHORT
from edgemistral.kernels.jit import inlined, inner, part
from edgemistral.kernels.lowering import choose_reading
from edgemistral.kernels.simd import (
    LOWERING,
    add_i32,
    broadcast_f32,
    broadcast_i32,
    dot4,
    dot4_7bit,
    fma,
    load_bytes,
    load_f32,
    load_i8_as_f32,
    look_up_high,
    look_up_low,
    mul,
    prefetch_tile,
    prefetch_tile_early,
    store_bytes,
    store_f32,
    store_tile,
    tile,
    to_f32,
    words,
    zero_f32,
    zero_f32_tile,
    zero_i32_tile,
)
from edgemistral.kernels.unroll import static, unroll, unrolled

PAIR = 2 * PANEL         # rows of two panels, the unit of work
READING = choose_reading()
FEW = READING.few        # most tokens for which STREAMS streams are read at once
STREAMS = 2              # a CPU reads only a limited distance ahead in each
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
    result: NDArray[np.float32]    # (whole tiles * 32,) the outputs of every token; (STREAMS, SHORT, 32) for FEW tokens


ZERO_POINTS = {4: LEVEL_ZERO, 8: CODE_ZERO}


@inlined
def matrix_at(table, index):
    """Row `index` of an int64 table whose rows are `MatrixAt`s."""
    return MatrixAt(
        table[index, 0], table[index, 1], table[index, 2], table[index, 3], table[index, 4], table[index, 5], table[index, 6]
    )


# ---- up to DIRECT tokens ----------------------------------------------------------------------------------------------

def _make_panels(BITS, T):
    """The kernel of a pair of panels in every stream, for a tile of T tokens: codes never go through a buffer."""
    BYTES = BLOCK_BYTES[BITS]
    S = STREAMS if T <= FEW else 1
    CHAINS = 1 if S * T >= 8 else 2      # about 8 sums at a time hide the latency of the dot product
    FAR = READING.ahead_of_one if T == 1 else READING.ahead_of_few if T <= FEW else READING.ahead_of_many
    LINES = BITS // 4 if FAR else 0      # lines to prefetch with every 64 bytes of 4-bit codes or 128 of 8-bit codes

    @part
    @unrolled(BITS=BITS, T=T, S=S, BYTES=BYTES, CHAINS=CHAINS, FAR=FAR, LINES=LINES)
    def panels(blob, at, apart, panel_bytes, blocks, levels_at, row_scales, scales_apart, x, tiles, result):
        """result[stream][token] = the 32 rows of the pair at byte `at` + stream * `apart` times every token of `tiles` tiles.

        Registers are T tokens x S streams.
        """
        if static(BITS == 4):
            levels = load_bytes(blob, levels_at)
        for half in range(2):
            for n in range(tiles):
                to = PAIR * T * n + PANEL * half
                y = zero_f32_tile(T, S)
                for block in range(blocks):
                    base, block_of_tile = at + half * panel_bytes + block * BYTES, block * tiles + n
                    if static(LINES > 0):
                        prefetch_tile_early(blob, base + FAR, S, 1, apart, 0)
                    f = zero_f32_tile(T, S)
                    for g in range(GROUPS):
                        group = block_of_tile * GROUPS + g
                        scales, codes = base + 16 * g, base + SCALE_BYTES + 64 * BITS * g
                        i = tile(broadcast_i32, x.sums, group * T, T, S, 1, 0)
                        if static(CHAINS == 2):
                            j = zero_i32_tile(T, S)
                        for c in unroll(4):
                            if static(LINES > 0):      # spread evenly: a core can wait for about 24 lines at a time
                                prefetch_tile_early(blob, codes + FAR + 64 * LINES * c, S, LINES, apart, 64)
                            if static(BITS == 4):
                                both = tile(load_bytes, blob, codes + 64 * c, 1, S, 0, apart)
                                v, w = look_up_low(levels, both), look_up_high(levels, both)
                            else:
                                v = tile(load_bytes, blob, codes + 128 * c, 1, S, 0, apart)
                                w = tile(load_bytes, blob, codes + 128 * c + 64, 1, S, 0, apart)
                            a = words(x.codes, (8 * group + 2 * c) * 4 * T, T, 1, 4, 0)
                            b = words(x.codes, (8 * group + 2 * c + 1) * 4 * T, T, 1, 4, 0)
                            if static(BITS == 4 and CHAINS == 2):
                                i, j = dot4_7bit(i, v, a), dot4_7bit(j, w, b)
                            elif static(BITS == 4):
                                i = dot4_7bit(dot4_7bit(i, v, a), w, b)
                            elif static(CHAINS == 2):
                                i, j = dot4(i, v, a), dot4(j, w, b)
                            else:
                                i = dot4(dot4(i, v, a), w, b)
                        if static(CHAINS == 2):
                            i = add_i32(i, j)
                        f = fma(to_f32(i), tile(load_i8_as_f32, blob, scales, 1, S, 0, apart), f)
                    y = fma(f, tile(broadcast_f32, x.scales, block_of_tile * T, T, 1, 1, 0), y)
                y = mul(y, tile(load_f32, blob, row_scales + 4 * PANEL * half, 1, S, 0, scales_apart))
                store_tile(store_f32, result, to, PAIR, STREAM, y)

    return panels


_panels_4bit_1, _panels_4bit_2, _panels_4bit_4, _panels_4bit_8 = (_make_panels(4, t) for t in (1, 2, 4, 8))
_panels_8bit_1, _panels_8bit_2, _panels_8bit_4, _panels_8bit_8 = (_make_panels(8, t) for t in (1, 2, 4, 8))


# ---- many tokens -----------------------------------------------------------------------------------------------------

@inlined
def _unpack_4bit(blob, at, panel_bytes, levels, scratch):
    """One block of two panels -> unsigned bytes [group][8 chunks][panel][64] and float scales [group][panel][16]."""
    for panel in range(2):
        base = at + panel * panel_bytes
        for g in range(GROUPS):
            store_f32(scratch.scales, PAIR * g + PANEL * panel, load_i8_as_f32(blob, base + 16 * g))
            for c in range(4):
                codes = load_bytes(blob, base + SCALE_BYTES + 64 * (4 * g + c))
                store_bytes(scratch.weights, 128 * (8 * g + 2 * c) + 64 * panel, look_up_low(levels, codes))
                store_bytes(scratch.weights, 128 * (8 * g + 2 * c + 1) + 64 * panel, look_up_high(levels, codes))


@inlined
def _unpack_8bit(blob, at, panel_bytes, scratch):
    for panel in range(2):
        base = at + panel * panel_bytes
        for g in range(GROUPS):
            store_f32(scratch.scales, PAIR * g + PANEL * panel, load_i8_as_f32(blob, base + 16 * g))
            for c in range(8):
                codes = load_bytes(blob, base + SCALE_BYTES + 64 * (8 * g + c))
                store_bytes(scratch.weights, 128 * (8 * g + c) + 64 * panel, codes)


def _make_tiles(T, SEVEN_BITS):
    @inlined
    @unrolled(T=T, SEVEN_BITS=SEVEN_BITS)
    def tiles(x, first, count, scratch, blob, ahead, panel_bytes, lines):
        """Multiply the unpacked block with `count` tiles of activations from tile `first` on; adds to scratch.result.

        Meanwhile `lines` lines from byte `ahead` on, and of the next panel, are prefetched, a few with every tile: all at once
        they would delay the other loads. Registers are T tokens x 2 panels.
        """
        share = (lines + count - 1) // count
        for n in range(count):
            for line in range(share * n, min(share * n + share, lines)):
                prefetch_tile(blob, ahead + 64 * line, 2, 1, panel_bytes, 0)
            f = zero_f32_tile(T, 2)
            for g in range(GROUPS):
                group = (first + n) * GROUPS + g
                i = tile(broadcast_i32, x.sums, group * T, T, 2, 1, 0)
                for c in range(8):
                    w = tile(load_bytes, scratch.weights, 128 * (8 * g + c), 1, 2, 0, 64)
                    a = words(x.codes, (8 * group + c) * 4 * T, T, 1, 4, 0)
                    if static(SEVEN_BITS):
                        i = dot4_7bit(i, w, a)
                    else:
                        i = dot4(i, w, a)
                f = fma(to_f32(i), tile(load_f32, scratch.scales, PAIR * g, 1, 2, 0, PANEL), f)
            at = PAIR * T * n
            scale = tile(broadcast_f32, x.scales, (first + n) * T, T, 1, 1, 0)
            y = fma(f, scale, tile(load_f32, scratch.result, at, T, 2, PAIR, PANEL))
            store_tile(store_f32, scratch.result, at, PAIR, PANEL, y)

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
    if tokens > DIRECT:
        _multiply_tiles(blob, matrix, at, panel_bytes, scales, x, tokens, scratch)
        return
    tiles = (tokens + SHORT - 1) // SHORT      # 1 for few tokens; a literal 1 would be a type of its own, compiled again
    if pair + apart >= matrix.pairs:
        apart = 0
    far, scales_far = 2 * apart * panel_bytes, 4 * PAIR * apart
    if bits == 4:
        if tokens == 1:
            _panels_4bit_1(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, tiles, result)
        elif tokens == 2:
            _panels_4bit_2(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, tiles, result)
        elif tokens <= 4:
            _panels_4bit_4(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, tiles, result)
        else:
            _panels_4bit_8(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, tiles, result)
    elif tokens == 1:
        _panels_8bit_1(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, tiles, result)
    elif tokens == 2:
        _panels_8bit_2(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, tiles, result)
    elif tokens <= 4:
        _panels_8bit_4(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, tiles, result)
    else:
        _panels_8bit_8(blob, at, far, panel_bytes, blocks, levels, scales, scales_far, x, tiles, result)


@part
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
