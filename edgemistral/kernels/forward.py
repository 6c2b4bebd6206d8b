"""The forward pass: it reads as the paper does, and a team of threads runs it from top to bottom together.

Three structures: the blueprint (`Shape`), the weights, and the scratch (`State`, shared by the threads, and `Own`, one for
each). Between its phases the threads meet at a barrier; inside a phase whoever is free takes the next share of the work.
No sum depends on who computes it, on how many tokens a call brings, or on how many threads there are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.files.layout import BLOCK, PANEL
from edgemistral.kernels.activations import (
    SHORT,
    Activations,
    inverse_rms,
    keep_residue,
    normalize_block,
    quantize_block,
    swiglu,
)
from edgemistral.kernels.attention import (
    POSITIONS,
    ROWS,
    SPAN,
    AttentionScratch,
    Queries,
    append_key_value,
    attend,
    block_at,
    rotate,
    take_query,
)
from edgemistral.kernels.jit import entry, inner
from edgemistral.kernels.matmul import PAIR, STREAM, MatrixAt, MatrixScratch, multiply_pairs, streams_of, zero_of
from edgemistral.kernels.simd import add, load_bf16_as_f32, load_f32, store_f32
from edgemistral.kernels.sync import barrier, take

PHASES_OF_LAYER = 9
PAIRS_OF_HIDDEN = 2 * BLOCK // PAIR      # pairs of w13's panels that make one block of w2's columns


class Shape(NamedTuple):
    """The blueprint, as the kernels use it. Widths padded to whole blocks of 128 columns are called `*_cols`."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    group: int           # query heads of one KV head
    window: int          # positions a query may see, itself included
    vocab_size: int
    norm_eps: float
    dim_cols: int        # of wqkv, w13, output
    q_cols: int          # of wo
    hidden_cols: int     # of w2
    qkv_dim: int         # rows of wqkv


class State(NamedTuple):
    """What the threads share during one call, for up to CHUNK tokens."""

    x: NDArray[np.float32]         # (tokens, dim_cols) the residual stream; zeros behind dim
    qkv: NDArray[np.float32]       # (tokens, qkv_dim) queries, keys, values
    mixed: NDArray[np.float32]     # (tokens, q_cols) what attention brought; zeros behind q_dim
    narrow: Activations            # inputs of wqkv, wo, w13 and the output head
    wide: Activations              # inputs of w2
    queries: Queries
    logits: NDArray[np.float32]    # (2 * n_logits, vocab rows) the head's product with both digits of each token
    cos: NDArray[np.float32]       # (tokens, head_dim / 2)
    sin: NDArray[np.float32]       # (tokens, head_dim / 2)


class Own(NamedTuple):
    """What each thread has for itself."""

    matrix: MatrixScratch
    attention: AttentionScratch
    hidden: NDArray[np.float32]    # (tokens * 128,) one block of SwiGLU's output for every token; of every stream for few
    row: NDArray[np.float32]       # (128,) one block of one token


# ---- the phases ------------------------------------------------------------------------------------------------------

@inner
def _embed(rank, threads, sync, phase, shape, weights, ids, state):
    """x[token] = tok_embeddings[id]."""
    while True:
        first, last = take(sync, phase, threads, ids.size, 4)
        if first >= last:
            break
        for token in range(first, last):
            row = weights.tok_embeddings + 2 * shape.dim * ids[token]
            for i in range(0, shape.dim, 16):
                store_f32(state.x, token * shape.dim_cols + i, load_bf16_as_f32(weights.blob, row + 2 * i))
    barrier(sync, phase, threads)


@inner
def _normalize(rank, threads, sync, phase, shape, weights, norm, zero, tokens, state, own):
    """narrow = quantize(RMSNorm(x))."""
    while True:
        first, last = take(sync, phase, threads, tokens, 4)
        if first >= last:
            break
        for token in range(first, last):
            at = token * shape.dim_cols
            factor = inverse_rms(state.x, at, shape.dim, shape.norm_eps)
            for block in range(shape.dim_cols // BLOCK):
                size, weight_at = shape.dim - BLOCK * block, norm + 4 * BLOCK * block
                normalize_block(state.x, at + BLOCK * block, weights.blob, weight_at, factor, size, own.row)
                quantize_block(own.row, 0, zero, state.narrow, tokens, token, block)
    barrier(sync, phase, threads)


@inner
def _project(rank, threads, sync, phase, weights, matrix, x, tokens, out, stride, adds, own):
    """out[token * stride + row] = (W x[token])[row], added to what is there if `adds`."""
    streams = streams_of(tokens)
    apart = (matrix.pairs + streams - 1) // streams
    while True:
        first, last = take(sync, phase, threads, apart, 2)
        if first >= last:
            break
        for unit in range(first, last):
            multiply_pairs(weights.blob, matrix, unit, apart, x, tokens, own.matrix)
            for stream in range(streams):
                pair = unit + stream * apart
                if pair < matrix.pairs:
                    for token in range(tokens):
                        for half in range(0, PAIR, PANEL):
                            to = token * stride + PAIR * pair + half
                            product = load_f32(own.matrix.result, STREAM * stream + PAIR * token + half)
                            store_f32(out, to, add(load_f32(out, to), product) if adds else product)
    barrier(sync, phase, threads)


@inner
def _rotate_and_append(rank, threads, sync, phase, shape, layer, position, tokens, state, cache, kv, own):
    """Rotate queries and keys, quantize the queries, append keys and values to the cache; a unit is a head and a token."""
    rows_of_head = (tokens * shape.group + ROWS - 1) // ROWS * ROWS
    half, hd = shape.head_dim // 2, shape.head_dim
    while True:
        first, last = take(sync, phase, threads, shape.n_kv_heads * tokens, 4)
        if first >= last:
            break
        for unit in range(first, last):
            head, token = unit // tokens, unit % tokens
            at = token * shape.qkv_dim
            for h in range(shape.group):
                query = at + (head * shape.group + h) * hd
                rotate(state.qkv, query, hd, state.cos, state.sin, token * half)
                row = head * rows_of_head + token * shape.group + h
                take_query(state.qkv, query, hd, kv.bits, state.queries, row)
            key = at + (shape.n_heads + head) * hd
            rotate(state.qkv, key, hd, state.cos, state.sin, token * half)
            value = key + shape.n_kv_heads * hd
            block = block_at(kv, layer, shape.n_layers, shape.n_kv_heads, head, (position + token) // POSITIONS)
            append_key_value(cache, block, kv.bits, position + token, state.qkv, key, value, hd)
    barrier(sync, phase, threads)


@inner
def _attend(rank, threads, sync, phase, shape, layer, position, tokens, state, cache, kv, own):
    """mixed = attention over the cache; a unit is a head and a span of tokens, the longest rows first."""
    spans = (tokens + SPAN - 1) // SPAN
    while True:
        unit, last = take(sync, phase, threads, shape.n_kv_heads * spans, 1)
        if unit >= last:
            break
        for u in range(unit, last):
            head, span = u % shape.n_kv_heads, spans - 1 - u // shape.n_kv_heads
            first, end = span * SPAN, min(span * SPAN + SPAN, tokens)
            attend(cache, kv, layer, shape.n_layers, shape.n_kv_heads, head, shape.group, shape.head_dim, shape.window,
                   position, tokens, first, end, state.queries, state.mixed, shape.q_cols, own.attention)
    barrier(sync, phase, threads)


@inner
def _quantize_mixed(rank, threads, sync, phase, shape, zero, tokens, state, own):
    """narrow = quantize(mixed)."""
    while True:
        first, last = take(sync, phase, threads, tokens, 4)
        if first >= last:
            break
        for token in range(first, last):
            for block in range(shape.q_cols // BLOCK):
                at = token * shape.q_cols + BLOCK * block
                quantize_block(state.mixed, at, zero, state.narrow, tokens, token, block)
    barrier(sync, phase, threads)


@inner
def _gate_and_up(rank, threads, sync, phase, weights, matrix, zero, tokens, state, own):
    """wide = quantize(silu(w1 narrow) * w3 narrow); a unit is one block of hidden columns."""
    streams, blocks = streams_of(tokens), matrix.pairs // PAIRS_OF_HIDDEN
    apart = (blocks + streams - 1) // streams
    while True:
        first, last = take(sync, phase, threads, apart, 1)
        if first >= last:
            break
        for unit in range(first, last):
            for n in range(PAIRS_OF_HIDDEN):
                pair = PAIRS_OF_HIDDEN * unit + n
                multiply_pairs(weights.blob, matrix, pair, PAIRS_OF_HIDDEN * apart, state.narrow, tokens, own.matrix)
                for stream in range(streams):
                    for token in range(tokens):
                        gate = load_f32(own.matrix.result, STREAM * stream + PAIR * token)
                        up = load_f32(own.matrix.result, STREAM * stream + PAIR * token + PANEL)
                        to = (SHORT * stream + token) * BLOCK + PANEL * n
                        store_f32(own.hidden, to, swiglu(gate, up))
            for stream in range(streams):
                block = unit + stream * apart
                if block < blocks:
                    for token in range(tokens):
                        at = (SHORT * stream + token) * BLOCK
                        quantize_block(own.hidden, at, zero, state.wide, tokens, token, block)
    barrier(sync, phase, threads)


@inner
def _normalize_in_two_digits(rank, threads, sync, phase, shape, weights, norm, zero, skip, tokens, state, own):
    """narrow = quantize(RMSNorm(x)) of the last tokens, each followed by what rounding left of it, quantized again.

    The head is the last to add noise to the logits, and it is read once a call: two products with it cost a hundredth of a
    step and bring its share of the noise to nothing.
    """
    while True:
        first, last = take(sync, phase, threads, tokens, 4)
        if first >= last:
            break
        for token in range(first, last):
            at = (skip + token) * shape.dim_cols
            factor = inverse_rms(state.x, at, shape.dim, shape.norm_eps)
            for block in range(shape.dim_cols // BLOCK):
                size, weight_at = shape.dim - BLOCK * block, norm + 4 * BLOCK * block
                normalize_block(state.x, at + BLOCK * block, weights.blob, weight_at, factor, size, own.row)
                top = quantize_block(own.row, 0, zero, state.narrow, 2 * tokens, 2 * token, block)
                keep_residue(own.row, top)
                quantize_block(own.row, 0, zero, state.narrow, 2 * tokens, 2 * token + 1, block)
    barrier(sync, phase, threads)


@inner
def _matrix(weights, index):
    m = weights.matrices
    return MatrixAt(m[index, 0], m[index, 1], m[index, 2], m[index, 3], m[index, 4], m[index, 5])


@entry
def forward(rank, threads, sync, shape, weights, ids, position, n_logits, state, cache, kv, own):
    """The model for the tokens `ids` from `position` on; state.logits receives both digits' logits of the last n_logits."""
    tokens = ids.size
    phase = 0
    _embed(rank, threads, sync, phase, shape, weights, ids, state)
    for layer in range(shape.n_layers):
        wqkv, wo = _matrix(weights, 4 * layer), _matrix(weights, 4 * layer + 1)
        w13, w2 = _matrix(weights, 4 * layer + 2), _matrix(weights, 4 * layer + 3)
        norm, zero = weights.norms[2 * layer], zero_of(wqkv.bits)
        _normalize(rank, threads, sync, phase + 1, shape, weights, norm, zero, tokens, state, own)
        _project(rank, threads, sync, phase + 2, weights, wqkv, state.narrow, tokens, state.qkv, shape.qkv_dim, False, own)
        _rotate_and_append(rank, threads, sync, phase + 3, shape, layer, position, tokens, state, cache, kv, own)
        _attend(rank, threads, sync, phase + 4, shape, layer, position, tokens, state, cache, kv, own)
        _quantize_mixed(rank, threads, sync, phase + 5, shape, zero, tokens, state, own)
        _project(rank, threads, sync, phase + 6, weights, wo, state.narrow, tokens, state.x, shape.dim_cols, True, own)
        norm = weights.norms[2 * layer + 1]
        _normalize(rank, threads, sync, phase + 7, shape, weights, norm, zero, tokens, state, own)
        _gate_and_up(rank, threads, sync, phase + 8, weights, w13, zero, tokens, state, own)
        _project(rank, threads, sync, phase + 9, weights, w2, state.wide, tokens, state.x, shape.dim_cols, True, own)
        phase += 9
    if n_logits > 0:
        output, norm, skip = _matrix(weights, 4 * shape.n_layers), weights.norms[2 * shape.n_layers], tokens - n_logits
        zero, stride = zero_of(output.bits), PAIR * output.pairs
        _normalize_in_two_digits(rank, threads, sync, phase + 1, shape, weights, norm, zero, skip, n_logits, state, own)
        _project(rank, threads, sync, phase + 2, weights, output, state.narrow, 2 * n_logits, state.logits, stride, False, own)
