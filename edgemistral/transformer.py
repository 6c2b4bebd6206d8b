"""The transformer: `forward` reads as the paper does, and a team of threads runs it from top to bottom together.

Three structures: the blueprint (`Shape`), the weights, and the scratch (`State`, shared by the threads, and `Own`, one for
each). Between its phases the threads meet at a barrier; inside a phase whoever is free takes the next share of the work.
No sum depends on who computes it, on how many tokens a call brings, or on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.blob import Blob
from edgemistral.config import ModelConfig
from edgemistral.errors import BadRequest, ContextOverflow
from edgemistral.kernels.activations import (
    TILE,
    Activations,
    inverse_rms,
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
from edgemistral.kernels.matmul import PAIR, MatrixAt, MatrixScratch, multiply_pair, zero_of
from edgemistral.kernels.simd import add, load_bf16_as_f32, load_f32, store_f32
from edgemistral.kernels.team import barrier, take
from edgemistral.kv_cache import KVCache
from edgemistral.layout import ALIGNMENT, BLOCK, GROUP, GROUPS, PANEL, round_up
from edgemistral.team import Team, compile_for
from edgemistral.weights import map_weights

CHUNK = 256                  # most tokens of one call: enough that reading the weights costs nothing beside computing
PHASES_OF_LAYER = 9
PAIRS_OF_HIDDEN = 2 * BLOCK // PAIR      # pairs of w13's panels that make one block of w2's columns

Allocate = Callable[[int, Any], NDArray[Any]]


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
    hidden: NDArray[np.float32]    # (tokens * 128,) one block of SwiGLU's output for every token
    row: NDArray[np.float32]       # (128,) one block of one token
    residue: NDArray[np.float32]   # (128,) what the first digit of a token's block left over
    bytes: NDArray[np.int8]        # (128,) codes of one block
    words: NDArray[np.int32]       # the same bytes


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
                quantize_block(own.row, 0, zero, state.narrow, tokens, token, block, (own.bytes, own.words))
    barrier(sync, phase, threads)


@inner
def _project(rank, threads, sync, phase, weights, matrix, x, tokens, out, stride, own):
    """out[token * stride + row] = (W x[token])[row]."""
    while True:
        first, last = take(sync, phase, threads, matrix.pairs, 2)
        if first >= last:
            break
        for pair in range(first, last):
            multiply_pair(weights.blob, matrix, pair, x, tokens, own.matrix)
            for token in range(tokens):
                to = token * stride + PAIR * pair
                store_f32(out, to, load_f32(own.matrix.result, PAIR * token))
                store_f32(out, to + PANEL, load_f32(own.matrix.result, PAIR * token + PANEL))
    barrier(sync, phase, threads)


@inner
def _project_and_add(rank, threads, sync, phase, shape, weights, matrix, x, tokens, state, own):
    """state.x[token] += W x[token]."""
    while True:
        first, last = take(sync, phase, threads, matrix.pairs, 2)
        if first >= last:
            break
        for pair in range(first, last):
            multiply_pair(weights.blob, matrix, pair, x, tokens, own.matrix)
            for token in range(tokens):
                for half in range(0, PAIR, PANEL):
                    to = token * shape.dim_cols + PAIR * pair + half
                    store_f32(state.x, to, add(load_f32(state.x, to), load_f32(own.matrix.result, PAIR * token + half)))
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
                take_query(state.qkv, query, hd, kv.bits, state.queries, row, own.attention)
            key = at + (shape.n_heads + head) * hd
            rotate(state.qkv, key, hd, state.cos, state.sin, token * half)
            value = key + shape.n_kv_heads * hd
            block = block_at(kv, layer, shape.n_layers, shape.n_kv_heads, head, (position + token) // POSITIONS)
            append_key_value(cache, block, kv.bits, position + token, state.qkv, key, value, hd, own.attention)
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
                quantize_block(state.mixed, at, zero, state.narrow, tokens, token, block, (own.bytes, own.words))
    barrier(sync, phase, threads)


@inner
def _gate_and_up(rank, threads, sync, phase, weights, matrix, zero, tokens, state, own):
    """wide = quantize(silu(w1 narrow) * w3 narrow); a unit is one block of hidden columns."""
    while True:
        first, last = take(sync, phase, threads, matrix.pairs // PAIRS_OF_HIDDEN, 1)
        if first >= last:
            break
        for block in range(first, last):
            for pair in range(PAIRS_OF_HIDDEN):
                multiply_pair(weights.blob, matrix, PAIRS_OF_HIDDEN * block + pair, state.narrow, tokens, own.matrix)
                for token in range(tokens):
                    gate = load_f32(own.matrix.result, PAIR * token)
                    up = load_f32(own.matrix.result, PAIR * token + PANEL)
                    store_f32(own.hidden, BLOCK * token + PANEL * pair, swiglu(gate, up))
            for token in range(tokens):
                quantize_block(own.hidden, BLOCK * token, zero, state.wide, tokens, token, block, (own.bytes, own.words))
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
                step = quantize_block(own.row, 0, zero, state.narrow, 2 * tokens, 2 * token, block, (own.bytes, own.words))
                for i in range(BLOCK):
                    own.residue[i] = own.row[i] - step * np.float32(own.bytes[i])
                quantize_block(own.residue, 0, zero, state.narrow, 2 * tokens, 2 * token + 1, block, (own.bytes, own.words))
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
        _project(rank, threads, sync, phase + 2, weights, wqkv, state.narrow, tokens, state.qkv, shape.qkv_dim, own)
        _rotate_and_append(rank, threads, sync, phase + 3, shape, layer, position, tokens, state, cache, kv, own)
        _attend(rank, threads, sync, phase + 4, shape, layer, position, tokens, state, cache, kv, own)
        _quantize_mixed(rank, threads, sync, phase + 5, shape, zero, tokens, state, own)
        _project_and_add(rank, threads, sync, phase + 6, shape, weights, wo, state.narrow, tokens, state, own)
        norm = weights.norms[2 * layer + 1]
        _normalize(rank, threads, sync, phase + 7, shape, weights, norm, zero, tokens, state, own)
        _gate_and_up(rank, threads, sync, phase + 8, weights, w13, zero, tokens, state, own)
        _project_and_add(rank, threads, sync, phase + 9, shape, weights, w2, state.wide, tokens, state, own)
        phase += 9
    if n_logits > 0:
        output, norm, skip = _matrix(weights, 4 * shape.n_layers), weights.norms[2 * shape.n_layers], tokens - n_logits
        zero, stride = zero_of(output.bits), PAIR * output.pairs
        _normalize_in_two_digits(rank, threads, sync, phase + 1, shape, weights, norm, zero, skip, n_logits, state, own)
        _project(rank, threads, sync, phase + 2, weights, output, state.narrow, 2 * n_logits, state.logits, stride, own)


# ---- from Python -----------------------------------------------------------------------------------------------------

class Transformer:
    """A model over its KV cache: `forward` appends tokens and returns logits. Not reentrant: the caller holds a lock."""

    def __init__(self, blob: Blob, *, context: int | None = None, kv_bits: int = 8, threads: int = 1) -> None:
        """context: positions of the cache, at most the model's own maximum (None: that)."""
        config = blob.config
        if context is not None and not 1 <= context <= config.context:
            raise BadRequest(f"context is {context}, the model's is {config.context}", "context")
        self.config, self.context, self.chunk = config, context or config.context, min(CHUNK, context or config.context)
        self._blob: Blob | None = blob
        self._kv = KVCache(config, kv_bits)
        self._team = Team(threads)
        self._weights = map_weights(blob)
        self._shape = _shape(config)
        self._state, self._own = _workspace(self._shape, self.chunk, threads)
        self._frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        self._ready = False

    @property
    def length(self) -> int:
        """Positions that the KV cache holds."""
        return self._kv.length

    def forward(self, ids: NDArray[np.int32], n_logits: int) -> NDArray[np.float32]:
        """Append the tokens `ids` (m,), m <= chunk; next-token logits (n_logits, vocab_size) after each of the last n_logits.

        When an exception ends the wait (Ctrl-C), nothing was appended.
        """
        tokens, position = len(ids), self._kv.length
        if not 0 < tokens <= self.chunk or not 0 <= n_logits <= tokens:
            raise ValueError(f"{tokens} tokens and {n_logits} logits in a call of at most {self.chunk}")
        if position + tokens > self.context:
            raise ContextOverflow(position + tokens, self.context)
        ids = np.ascontiguousarray(ids, np.int64)
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(f"token ids must be within 0 .. {self.config.vocab_size - 1}")
        self._team.wait()
        angles = np.arange(position, position + tokens)[:, None] * self._frequencies
        self._state.cos[: angles.size] = np.cos(angles).reshape(-1)
        self._state.sin[: angles.size] = np.sin(angles).reshape(-1)
        cache = self._kv.reserve(position + tokens)
        state = self._state if n_logits <= 1 else self._state._replace(logits=_logits(self._shape, n_logits))
        common = (self._shape, self._weights, ids, position, n_logits, state, cache, self._kv.layout)
        if not self._ready:
            compile_for(forward, (0, 1, np.zeros(1, np.int64), *common, self._own[0]))
            self._ready = True
        self._team.run(forward, PHASES_OF_LAYER * self.config.n_layers + 3, common, self._own)
        self._kv.length = position + tokens
        rows = round_up(self.config.vocab_size, PAIR)
        digits = state.logits[: 2 * n_logits * rows].reshape(n_logits, 2, rows)[:, :, : self.config.vocab_size]
        return digits[:, 0] + digits[:, 1]

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        self._kv.truncate(length)

    def close(self) -> None:
        """Stop the threads, delete the KV file, unmap the weights."""
        self._team.close()
        self._kv.close()
        if self._blob is not None:
            del self._weights
            self._blob.close()
            self._blob = None


def _shape(config: ModelConfig) -> Shape:
    return Shape(
        config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim, config.group,
        config.sliding_window or config.context, config.vocab_size, config.norm_eps, round_up(config.dim, BLOCK),
        round_up(config.q_dim, BLOCK), round_up(config.hidden_dim, BLOCK),
        round_up(config.q_dim + 2 * config.kv_dim, PAIR),
    )


def workspace_bytes(config: ModelConfig, context: int, threads: int) -> int:
    """Ordinary memory that a Transformer takes for activations and logits, in bytes."""
    taken = 0

    def count(n: int, dtype: Any) -> NDArray[Any]:
        nonlocal taken
        taken += n * np.dtype(dtype).itemsize + ALIGNMENT
        return np.zeros(0, dtype)

    _workspace(_shape(config), min(CHUNK, context), threads, count)
    return taken


def _aligned(n: int, dtype: Any) -> NDArray[Any]:
    """n zeros that start at a multiple of 64 bytes, so that no vector straddles two cache lines (10 % of prefill)."""
    data = np.zeros(n * np.dtype(dtype).itemsize + ALIGNMENT, np.uint8)
    start = -data.ctypes.data % ALIGNMENT
    return data[start : start + n * np.dtype(dtype).itemsize].view(dtype)


def _workspace(shape: Shape, chunk: int, threads: int, array: Allocate = _aligned) -> tuple[State, Sequence[Own]]:
    """All that a Transformer computes in; `array(n, dtype)` makes each part."""
    tokens, hd = round_up(2 * chunk, TILE), shape.head_dim      # twice: the head meets two digits of each token
    rows, rows_of_span = shape.n_kv_heads * round_up(chunk * shape.group, ROWS), round_up(SPAN * shape.group, ROWS)

    def activations(tokens: int, cols: int) -> Activations:
        codes = array(tokens * cols, np.int8)
        return Activations(
            codes, codes.view(np.int32), array(tokens * cols // GROUP, np.int32), array(tokens * cols // BLOCK, np.float32)
        )

    def own() -> Own:
        probabilities = array(ROWS * POSITIONS, np.float32)
        block, head = array(BLOCK, np.int8), array(hd, np.int8)
        return Own(
            MatrixScratch(
                weights=array(PAIR * BLOCK, np.uint8),
                scales=array(PAIR * GROUPS, np.float32),
                result=array(tokens * PAIR, np.float32),
            ),
            AttentionScratch(
                values=array(rows_of_span * hd, np.float32),
                peaks=array(rows_of_span, np.float32),
                sums=array(rows_of_span * 16, np.float32),
                probabilities=probabilities,
                codes=probabilities.view(np.uint8),
                first_seen=array(ROWS, np.int64),
                last_seen=array(ROWS, np.int64),
                head_bytes=head,
                head_words=head.view(np.int32),
                head_halves=array(hd, np.uint16),
            ),
            hidden=array(chunk * BLOCK, np.float32),
            row=array(BLOCK, np.float32),
            residue=array(BLOCK, np.float32),
            bytes=block,
            words=block.view(np.int32),
        )

    queries = array(rows * hd, np.int8)
    state = State(
        x=array(chunk * shape.dim_cols, np.float32),
        qkv=array(chunk * shape.qkv_dim, np.float32),
        mixed=array(chunk * shape.q_cols, np.float32),
        narrow=activations(tokens, max(shape.dim_cols, shape.q_cols)),
        wide=activations(round_up(chunk, TILE), shape.hidden_cols),
        queries=Queries(
            queries, queries.view(np.int32), array(rows, np.int32), array(rows, np.float32), array(rows * hd, np.float32)
        ),
        logits=_logits(shape, 1, array),
        cos=array(chunk * hd // 2, np.float32),
        sin=array(chunk * hd // 2, np.float32),
    )
    return state, [own() for _ in range(threads)]


def _logits(shape: Shape, n_logits: int, array: Allocate = _aligned) -> NDArray[np.float32]:
    return array(2 * n_logits * round_up(shape.vocab_size, PAIR), np.float32)
