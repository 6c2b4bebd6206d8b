"""Activations on their way into a matrix: RMSNorm, SwiGLU, and int8 codes with one scale for every 128 columns.

    d = absmax / 127,  code = round(x * 127 / absmax),  and for every group of 32 columns -zero_point * sum(codes)

The sums undo the offset `zero_point`, which makes stored weights unsigned. Codes are packed for the matrix kernels: tokens in
tiles of T, and one block of 128 columns of all tiles before the next block,

    codes   int8     [block][tile][32 chunks of 4 columns][T][4]
    sums    int32    [block][tile][4 groups][T]
    scales  float32  [block][tile][T]

so that one pointer with constant offsets reaches every token of a tile (a pointer for each token would spill), and all tiles
for one block of weights lie in one stream.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.files.layout import BLOCK, GROUP, GROUPS
from edgemistral.kernels.jit import inlined
from edgemistral.kernels.lowering import choose_reading
from edgemistral.kernels.simd import (
    LOWERING,
    absolute,
    add,
    add_i32,
    div,
    exp,
    fma,
    highest,
    load_f32,
    maximum,
    mul,
    round_to_i32,
    splat_f32,
    spread_words,
    store_f32,
    sub,
    to_f32,
    total,
    total_i32,
    where_negative,
    zero_f32,
)

SHORT = 8                # tokens of a tile in a short batch; a power of two if there are fewer
DIRECT = min(LOWERING.direct, choose_reading().direct)     # most tokens of a short batch
LONG = LOWERING.tile     # tokens of a tile in a longer batch


class Activations(NamedTuple):
    """Quantized activations of up to `tokens` tokens, packed as described above."""

    codes: NDArray[np.int8]        # (tokens * cols,)
    words: NDArray[np.int32]       # the same bytes, four codes each
    sums: NDArray[np.int32]        # (tokens * cols / 32,)
    scales: NDArray[np.float32]    # (tokens * cols / 128,)


@inlined
def tile_size(tokens):
    """T of the packing for a number of tokens."""
    if tokens > DIRECT:
        return LONG
    t = 1
    while t < tokens and t < SHORT:
        t *= 2
    return t


@inlined
def inverse_rms(x, at, dim, eps):
    """1 / sqrt(mean(x**2) + eps) of the `dim` values at x[at]."""
    squares = zero_f32()
    for i in range(0, dim, 16):
        v = load_f32(x, at + i)
        squares = fma(v, v, squares)
    return np.float32(1) / np.sqrt(total(squares) / np.float32(dim) + np.float32(eps))


@inlined
def normalize_block(x, at, weight, weight_at, factor, size, result):
    """result[:128] = x[at:at + size] * factor * weight, zeros behind; the weight's offset is in bytes."""
    for i in range(0, BLOCK, 16):
        if i < size:
            v = mul(mul(load_f32(x, at + i), splat_f32(factor)), load_f32(weight, weight_at + 4 * i))
            store_f32(result, i, v)
        else:
            store_f32(result, i, zero_f32())


@inlined
def quantize_block(x, at, zero_point, activations, tokens, token, block):
    """x[at:at + 128] -> codes, sums and scale of one token's block; returns the largest magnitude."""
    peak = zero_f32()
    for i in range(0, BLOCK, 16):
        peak = maximum(absolute(load_f32(x, at + i)), peak)
    top = max(highest(peak), np.float32(1e-30))
    factor = splat_f32(np.float32(127) / top)

    t = tile_size(tokens)
    tile = block * ((tokens + t - 1) // t) + token // t
    slot = token % t
    for g in range(GROUPS):
        a = round_to_i32(mul(load_f32(x, at + GROUP * g), factor))
        b = round_to_i32(mul(load_f32(x, at + GROUP * g + 16), factor))
        words = (tile * GROUPS + g) * 8 * t + slot
        spread_words(activations.words, words, t, a)
        spread_words(activations.words, words + 4 * t, t, b)
        activations.sums[(tile * GROUPS + g) * t + slot] = -zero_point * total_i32(add_i32(a, b))
    activations.scales[tile * t + slot] = top / np.float32(127)
    return top


@inlined
def keep_residue(x, top):
    """x[:128] -= the values of the codes from `quantize_block`, which returned `top`."""
    factor, step = splat_f32(np.float32(127) / top), splat_f32(top / np.float32(127))
    for i in range(0, BLOCK, 16):
        v = load_f32(x, i)
        store_f32(x, i, sub(v, mul(to_f32(round_to_i32(mul(v, factor))), step)))


@inlined
def swiglu(gate, up):
    """silu(gate) * up, with silu(g) = g / (1 + e**-g), of 16 values."""
    e = exp(sub(zero_f32(), absolute(gate)))
    numerator = where_negative(gate, mul(gate, e), gate)
    return mul(div(numerator, add(splat_f32(np.float32(1)), e)), up)


