"""The forward pass. It reads like the paper, and a team of threads runs it together from top to bottom.

One call computes a step: any mix of prompt chunks, single tokens and drafts, each a row of consecutive tokens of another
sequence. Matrices work on tokens only; attention uses each token's own sequence. Between phases the threads wait at a
barrier; within a phase each free thread takes the next share of the work. No sum depends on the thread that computes it, on
the other rows of the step, or on the number of threads.

A phase gets everything in one `Pass`: the blueprint, the weights, the work, and the scratch.
"""

from __future__ import annotations

import numpy as np

from edgemistral.files.layout import BLOCK, PANEL
from edgemistral.kernels.activations import (
    SHORT,
    inverse_rms,
    keep_residue,
    normalize_block,
    quantize_block,
    swiglu,
    tile_size,
)
from edgemistral.kernels.attention import (
    ATTEND,
    MERGE_SPLITS,
    block_at,
    own_block_at,
)
from edgemistral.kernels.jit import entry, inlined, part
from edgemistral.kernels.kv_formats import APPEND, QUANTIZE_QUERY
from edgemistral.kernels.kv_layout import KV_FORMATS, POSITIONS
from edgemistral.kernels.matmul import PAIR, STREAM, MatrixAt, matrix_at, multiply_pairs, streams_of
from edgemistral.kernels.operands import Pass
from edgemistral.kernels.rope import rotate
from edgemistral.kernels.simd import add, load_bf16_as_f32, load_f32, store_f32
from edgemistral.kernels.sync import barrier, report, take
from edgemistral.kernels.unroll import unrolled

PAIRS_OF_HIDDEN = 2 * BLOCK // PAIR      # pairs of w13's panels that make one block of w2's columns
UNIT = 8 * BLOCK         # columns of a tile that one thread quantizes
# What `matmul` does with its product: sets or adds, or adds those of both digits of a token. As numbers: for False and True it
# would be compiled twice.
SETS, ADDS, DIGITS = np.int64(0), np.int64(1), np.int64(2)


# ---- the phases: each hands out its work with `take` and ends with a `barrier` -----------------------------------------

@part
def embed(p):
    """x[token] = tok_embeddings[id]."""
    shape, ids = p.shape, p.rows.ids
    while True:
        first, last = take(p.member, ids.size, 4)
        if first >= last:
            break
        for token in range(first, last):
            row = p.weights.tok_embeddings + 2 * shape.dim * ids[token]
            for i in range(0, shape.dim, 16):
                store_f32(p.state.x, token * shape.dim_cols + i, load_bf16_as_f32(p.weights.blob, row + 2 * i))
    barrier(p.member)


@inlined
def units_of(tokens, cols):
    """How many units of work a step's activations are: a unit is a tile of tokens and UNIT columns.

    Tokens of one tile share cache lines, and it takes long to move a line from one core to another.
    """
    t = tile_size(tokens)
    return (tokens + t - 1) // t * ((cols + UNIT - 1) // UNIT)


@inlined
def unit_at(unit, tokens, cols):
    """The first and last token, and the first and last block of columns of a unit."""
    t, parts = tile_size(tokens), (cols + UNIT - 1) // UNIT
    token, column = unit // parts * t, unit % parts * UNIT
    return token, min(token + t, tokens), column // BLOCK, min(column + UNIT, cols) // BLOCK


@part
def rms_norm(p, norm, zero_point):
    """xq = quantize(RMSNorm(x)), for a matrix with this zero point."""
    shape, state, row, tokens = p.shape, p.state, p.own.row, p.rows.ids.size
    while True:
        first, last = take(p.member, units_of(tokens, shape.dim_cols), 1)
        if first >= last:
            break
        for unit in range(first, last):
            first_token, last_token, first_block, last_block = unit_at(unit, tokens, shape.dim_cols)
            for token in range(first_token, last_token):
                at = token * shape.dim_cols
                factor = inverse_rms(state.x, at, shape.dim, shape.norm_eps)
                for block in range(first_block, last_block):
                    size, weight_at = shape.dim - BLOCK * block, norm + 4 * BLOCK * block
                    normalize_block(state.x, at + BLOCK * block, p.weights.blob, weight_at, factor, size, row)
                    quantize_block(row, 0, zero_point, state.xq, tokens, token, block)
    barrier(p.member)


@part
def matmul(p, w, x, tokens, out, stride, mode):
    """out[token * stride + row] = (W x[token])[row], or as `mode` says."""
    streams, result = streams_of(tokens), p.own.matrix.result
    apart = (w.pairs + streams - 1) // streams
    while True:
        first, last = take(p.member, apart, 1)
        if first >= last:
            break
        for unit in range(first, last):
            multiply_pairs(p.weights.blob, w, unit, apart, x, tokens, p.own.matrix)
            for stream in range(streams):
                pair = unit + stream * apart
                if pair < w.pairs:
                    for token in range(tokens):
                        row = token // 2 if mode == DIGITS else token
                        adds = mode == ADDS or (mode == DIGITS and token % 2 == 1)
                        for half in range(0, PAIR, PANEL):
                            to = row * stride + PAIR * pair + half
                            product = load_f32(result, STREAM * stream + PAIR * token + half)
                            store_f32(out, to, add(load_f32(out, to), product) if adds else product)
    barrier(p.member)


def _make_rope_and_append(BITS):
    @part
    @unrolled(BITS=BITS)
    def rope_and_append(p, layer):
        """Rotate queries and keys, quantize the queries, append keys and values to the cache.

        A unit is a KV head of a few tokens: in a KV block they share cache lines.
        """
        shape, rows, state = p.shape, p.rows, p.state
        half, hd, tokens = shape.head_dim // 2, shape.head_dim, rows.ids.size
        while True:
            first, last = take(p.member, shape.n_kv_heads * ((tokens + SHORT - 1) // SHORT), 1)
            if first >= last:
                break
            for n in range(SHORT * first, SHORT * last):
                head, token = n // SHORT % shape.n_kv_heads, n // (SHORT * shape.n_kv_heads) * SHORT + n % SHORT
                if token >= tokens:
                    continue
                at, position = token * shape.qkv_dim, rows.positions[token]
                for h in range(shape.group):
                    query = at + (head * shape.group + h) * hd
                    rotate(state.qkv, query, hd, state.cos, state.sin, token * half)
                    row = head * rows.rows_of_head + rows.query_rows[token] + h
                    QUANTIZE_QUERY[BITS](state.qkv, query, hd, state.queries, row)
                key = at + (shape.n_heads + head) * hd
                rotate(state.qkv, key, hd, state.cos, state.sin, token * half)
                block = block_at(p.kv, rows, token, layer, head, position // POSITIONS)
                own_block = own_block_at(p.kv, rows, token, layer, head)
                value = key + shape.n_kv_heads * hd
                APPEND[BITS](block, own_block, position % POSITIONS, state.qkv, key, value, hd)
        barrier(p.member)

    return rope_and_append


def _make_attention(BITS):
    @part
    @unrolled(BITS=BITS)
    def attention(p, layer):
        """attn_out = attention over the cache; a unit is a KV head and a span of tokens, or one split of these."""
        shape, rows, state = p.shape, p.rows, p.state
        heads, splits = rows.spans.size // 2 * shape.n_kv_heads, rows.splits
        while True:
            first, last = take(p.member, heads * splits, 1)
            if first >= last:
                break
            for unit in range(first, last):
                span, head = 2 * (unit // splits // shape.n_kv_heads), unit // splits % shape.n_kv_heads
                ATTEND[BITS](p.kv, rows, layer, head, rows.spans[span], rows.spans[span + 1], unit % splits, shape.group,
                             shape.head_dim, shape.window, state.queries, state.partials, state.attn_out, shape.q_cols,
                             p.own.attention)
        barrier(p.member)
        if splits == 1:
            return
        while True:
            first, last = take(p.member, heads, 1)
            if first >= last:
                break
            for unit in range(first, last):
                span, head = 2 * (unit // shape.n_kv_heads), unit % shape.n_kv_heads
                MERGE_SPLITS[BITS](p.kv, rows, head, rows.spans[span], rows.spans[span + 1], shape.group, shape.head_dim,
                                   shape.window, state.partials, state.attn_out, shape.q_cols, p.own.attention)
        barrier(p.member)

    return attention


ROPE_AND_APPEND = {bits: _make_rope_and_append(bits) for bits in KV_FORMATS}
ATTENTION = {bits: _make_attention(bits) for bits in KV_FORMATS}


@part
def gather(p, tokens):
    """x[n] = x[tokens[n]] and the same of attn_out, for ascending tokens; a unit is some columns of all of them."""
    shape, state = p.shape, p.state
    units = shape.dim_cols // BLOCK
    while True:
        first, last = take(p.member, units + shape.q_cols // BLOCK, 1)
        if first >= last:
            break
        for unit in range(first, last):
            for n in range(tokens.size):
                for i in range(0, BLOCK, 16):
                    if unit < units:
                        at, cols = BLOCK * unit + i, shape.dim_cols
                        store_f32(state.x, n * cols + at, load_f32(state.x, tokens[n] * cols + at))
                    else:
                        at, cols = BLOCK * (unit - units) + i, shape.q_cols
                        store_f32(state.attn_out, n * cols + at, load_f32(state.attn_out, tokens[n] * cols + at))
    barrier(p.member)


@part
def quantize_attn_out(p, zero_point):
    """xq = quantize(attn_out), for a matrix with this zero point."""
    shape, state, tokens = p.shape, p.state, p.rows.ids.size
    while True:
        first, last = take(p.member, units_of(tokens, shape.q_cols), 1)
        if first >= last:
            break
        for unit in range(first, last):
            first_token, last_token, first_block, last_block = unit_at(unit, tokens, shape.q_cols)
            for token in range(first_token, last_token):
                for block in range(first_block, last_block):
                    at = token * shape.q_cols + BLOCK * block
                    quantize_block(state.attn_out, at, zero_point, state.xq, tokens, token, block)
    barrier(p.member)


@part
def gate_and_up(p, w13, zero_point):
    """hq = quantize(silu(w1 xq) * w3 xq), for a matrix with this zero point; a unit is one block of hidden columns."""
    state, hidden, tokens, result = p.state, p.own.hidden, p.rows.ids.size, p.own.matrix.result
    streams, blocks = streams_of(tokens), w13.pairs // PAIRS_OF_HIDDEN
    apart = (blocks + streams - 1) // streams
    while True:
        first, last = take(p.member, apart, 1)
        if first >= last:
            break
        for unit in range(first, last):
            for n in range(PAIRS_OF_HIDDEN):
                pair = PAIRS_OF_HIDDEN * unit + n
                multiply_pairs(p.weights.blob, w13, pair, PAIRS_OF_HIDDEN * apart, state.xq, tokens, p.own.matrix)
                for stream in range(streams):
                    for token in range(tokens):
                        gate = load_f32(result, STREAM * stream + PAIR * token)
                        up = load_f32(result, STREAM * stream + PAIR * token + PANEL)
                        store_f32(hidden, (SHORT * stream + token) * BLOCK + PANEL * n, swiglu(gate, up))
            for stream in range(streams):
                block = unit + stream * apart
                if block < blocks:
                    for token in range(tokens):
                        quantize_block(hidden, (SHORT * stream + token) * BLOCK, zero_point, state.hq, tokens, token, block)
    barrier(p.member)


@part
def rms_norm_in_two_digits(p, norm, zero_point):
    """xq = quantize(RMSNorm(x)) of the tokens with logits, each followed by its rounding error, quantized too.

    The head adds the last noise to the logits, and is read once in each step: two products with it cost a hundredth of a step
    and remove nearly all of that noise.
    """
    shape, state, row, tokens = p.shape, p.state, p.own.row, p.rows.ids.size
    while True:
        first, last = take(p.member, tokens, 4)
        if first >= last:
            break
        for n in range(first, last):
            at = n * shape.dim_cols
            factor = inverse_rms(state.x, at, shape.dim, shape.norm_eps)
            for block in range(shape.dim_cols // BLOCK):
                size, weight_at = shape.dim - BLOCK * block, norm + 4 * BLOCK * block
                normalize_block(state.x, at + BLOCK * block, p.weights.blob, weight_at, factor, size, row)
                top = quantize_block(row, 0, zero_point, state.xq, 2 * tokens, 2 * n, block)
                keep_residue(row, top)
                quantize_block(row, 0, zero_point, state.xq, 2 * tokens, 2 * n + 1, block)
    barrier(p.member)


def _make_forward(BITS):
    """The forward pass over a KV cache of this format."""
    @entry
    @unrolled(BITS=BITS)
    def forward(member, shape, weights, kv, rows, last, state, own):
        """One step; state.logits receives the logits of the tokens `rows.with_logits`.

        The last layer computes only keys and values of the other tokens: nobody sees more of it. `last` is its part of `rows`.
        """
        p = Pass(member, shape, weights, kv, rows, state, own)
        tokens, n_logits = rows.ids.size, last.ids.size
        embed(p)
        for layer in range(shape.n_layers):
            wqkv, wo = matrix_at(weights.matrices, 4 * layer), matrix_at(weights.matrices, 4 * layer + 1)
            w13, w2 = matrix_at(weights.matrices, 4 * layer + 2), matrix_at(weights.matrices, 4 * layer + 3)
            attention_norm, ffn_norm = weights.norms[2 * layer], weights.norms[2 * layer + 1]
            report(member, layer)

            rms_norm(p, attention_norm, wqkv.zero_point)
            matmul(p, wqkv, state.xq, tokens, state.qkv, shape.qkv_dim, SETS)
            ROPE_AND_APPEND[BITS](p, layer)
            if layer == shape.n_layers - 1 and n_logits < tokens:
                if n_logits == 0:
                    break
                p = Pass(member, shape, weights, kv, last, state, own)
                tokens = n_logits
            ATTENTION[BITS](p, layer)
            if tokens < rows.ids.size:
                gather(p, rows.with_logits)
            quantize_attn_out(p, wo.zero_point)
            matmul(p, wo, state.xq, tokens, state.x, shape.dim_cols, ADDS)

            rms_norm(p, ffn_norm, w13.zero_point)
            gate_and_up(p, w13, w2.zero_point)
            matmul(p, w2, state.hq, tokens, state.x, shape.dim_cols, ADDS)
        report(member, shape.n_layers)
        if n_logits > 0:
            output = matrix_at(weights.matrices, 4 * shape.n_layers)
            rms_norm_in_two_digits(p, weights.norms[2 * shape.n_layers], output.zero_point)
            matmul(p, output, state.xq, 2 * n_logits, state.logits, PAIR * output.pairs, DIGITS)

    return forward


FORWARD = {bits: _make_forward(bits) for bits in KV_FORMATS}


def parts_of(member, shape, weights, kv, rows, last, state, own):
    """The parts of `forward` for these arguments, the most work first: (module, name, arguments).

    Several processes can compile them at once. The last two call others.
    """
    p, result = Pass(member, shape, weights, kv, rows, state, own), own.matrix.result
    w = MatrixAt(0, 0, 0, 0, 0, 0, 0)
    panels = weights.blob, 0, 0, 0, 0, 0, 0, 0, state.xq, 1, result
    tiles = weights.blob, w, 0, 0, 0, state.xq, 1, own.matrix
    return [
        (__name__, f"ATTENTION_{kv.bits}", (p, 0)),
        (__name__, f"ROPE_AND_APPEND_{kv.bits}", (p, 0)),
        (multiply_pairs.__module__, "_multiply_tiles", tiles),
        *((multiply_pairs.__module__, f"_panels_{bits}bit_{n}", panels) for n in (8, 4, 2, 1) for bits in (8, 4)),
        (__name__, "rms_norm_in_two_digits", (p, 0, 0)),
        (__name__, "rms_norm", (p, 0, 0)),
        (__name__, "quantize_attn_out", (p, 0)),
        (__name__, "embed", (p,)),
        (__name__, "gather", (p, rows.with_logits)),
        (__name__, "matmul", (p, w, state.xq, 1, state.qkv, 1, SETS)),
        (__name__, "gate_and_up", (p, w, 0)),
    ]
