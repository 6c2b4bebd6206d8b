"""A model over its KV cache: what `forward` needs, laid out once, and the calls that run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig, rope_frequencies
from edgemistral.errors import BadRequest, ContextOverflow
from edgemistral.files.blob import Blob
from edgemistral.files.layout import ALIGNMENT, BLOCK, GROUP, GROUPS, round_up
from edgemistral.kernels.activations import LONG, SHORT, Activations
from edgemistral.kernels.attention import POSITIONS, ROWS, SPAN, AttentionScratch, Queries
from edgemistral.kernels.forward import PHASES_OF_LAYER, Own, Shape, State, forward
from edgemistral.kernels.matmul import PAIR, STREAMS, MatrixScratch
from edgemistral.runtime.kv_cache import KVCache
from edgemistral.runtime.team import Team, compile_for
from edgemistral.runtime.weights import map_weights

CHUNK = 256    # most tokens of one call: enough that reading the weights costs nothing beside computing

Allocate = Callable[[int, Any], NDArray[Any]]


class Transformer:
    """A model over its KV cache: `forward` appends tokens and returns logits. Not reentrant: the caller holds a lock."""

    def __init__(self, blob: Blob, *, context: int | None = None, kv_bits: int = 8, threads: int = 1) -> None:
        """context: positions of the cache, at most the model's own maximum (None: that)."""
        config = blob.config
        if context is not None and not 1 <= context <= config.context:
            raise BadRequest(f"context is {context}, the model's is {config.context}", "context")
        self.config, self.context, self.chunk = config, context or config.context, min(CHUNK, context or config.context)
        self.blob, self.kv_bits, self.threads = blob, kv_bits, threads
        self._kv = KVCache(config, kv_bits)
        self._team = Team(threads)
        self._weights = map_weights(blob)
        self._shape = _shape(config)
        self._state, self._own = _workspace(self._shape, self.chunk, threads)
        self._frequencies = rope_frequencies(config)
        self._ready = self._closed = False

    @property
    def length(self) -> int:
        """Positions that the KV cache holds."""
        return self._kv.length

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV file now."""
        return self._kv.file_bytes

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
        if not self._closed:
            self._closed = True
            del self._weights
            self.blob.close()


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
    tokens, hd = _tiled(2 * chunk), shape.head_dim      # twice: the head meets two digits of each token
    rows, rows_of_span = shape.n_kv_heads * round_up(chunk * shape.group, ROWS), round_up(SPAN * shape.group, ROWS)

    def activations(tokens: int, cols: int) -> Activations:
        codes = array(tokens * cols, np.int8)
        return Activations(
            codes, codes.view(np.int32), array(tokens * cols // GROUP, np.int32), array(tokens * cols // BLOCK, np.float32)
        )

    def own() -> Own:
        probabilities = array(ROWS * POSITIONS, np.float32)
        return Own(
            MatrixScratch(
                weights=array(PAIR * BLOCK, np.uint8),
                scales=array(PAIR * GROUPS, np.float32),
                result=array(max(tokens, STREAMS * SHORT) * PAIR, np.float32),
            ),
            AttentionScratch(
                values=array(rows_of_span * hd, np.float32),
                peaks=array(rows_of_span, np.float32),
                sums=array(rows_of_span * 16, np.float32),
                probabilities=probabilities,
                codes=probabilities.view(np.uint8),
                first_seen=array(ROWS, np.int64),
                last_seen=array(ROWS, np.int64),
            ),
            hidden=array(max(chunk, STREAMS * SHORT) * BLOCK, np.float32),
            row=array(BLOCK, np.float32),
        )

    queries = array(rows * hd, np.int8)
    state = State(
        x=array(chunk * shape.dim_cols, np.float32),
        qkv=array(chunk * shape.qkv_dim, np.float32),
        mixed=array(chunk * shape.q_cols, np.float32),
        narrow=activations(tokens, max(shape.dim_cols, shape.q_cols)),
        wide=activations(_tiled(chunk), shape.hidden_cols),
        queries=Queries(
            queries, queries.view(np.int32), array(rows, np.int32), array(rows, np.float32), array(rows * hd, np.float32)
        ),
        logits=_logits(shape, 1, array),
        cos=array(chunk * hd // 2, np.float32),
        sin=array(chunk * hd // 2, np.float32),
    )
    return state, [own() for _ in range(threads)]


def _tiled(tokens: int) -> int:
    """Room for up to so many tokens in whole tiles."""
    return max(SHORT, round_up(tokens, LONG))


def _logits(shape: Shape, n_logits: int, array: Allocate = _aligned) -> NDArray[np.float32]:
    return array(2 * n_logits * round_up(shape.vocab_size, PAIR), np.float32)
