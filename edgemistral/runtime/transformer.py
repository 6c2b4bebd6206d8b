"""A model over its KV cache: what `forward` needs, laid out once, and the call that runs a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig, rope_frequencies
from edgemistral.errors import BadRequest, ContextOverflow
from edgemistral.files import lost
from edgemistral.files.blob import Blob
from edgemistral.files.layout import ALIGNMENT, BLOCK, GROUP, GROUPS, round_up
from edgemistral.kernels.activations import DIRECT, LONG, SHORT, Activations
from edgemistral.kernels.attention import SPAN, AttentionScratch, Partial, Queries, Rows
from edgemistral.kernels.forward import FORWARD
from edgemistral.kernels.kv_layout import DIMS, POSITIONS, QUERY_SUMS, ROWS, SPLIT_BLOCKS, kv_layout
from edgemistral.kernels.matmul import PAIR, STREAMS, MatrixScratch
from edgemistral.kernels.operands import Own, Shape, State, Weights
from edgemistral.runtime.compiling import compile_forward
from edgemistral.runtime.read_ahead import ReadAhead
from edgemistral.runtime.segments import Row, SegmentPool
from edgemistral.runtime.team import Team
from edgemistral.runtime.weights import map_weights

CHUNK = 256       # most tokens of one step: enough that computing takes much longer than reading the weights
MAX_ROWS = 64     # of one step
SPLIT_ROWS = 512  # query rows of a KV head whose splits threads may share: more rows are enough work for any number of threads
MAX_LOGITS = 64   # tokens whose logits fit into the workspace; a step with more allocates memory

Allocate = Callable[[int, Any], NDArray[Any]]


class Transformer:
    """A model over the sequences of its pool: `step` computes rows. Not reentrant: the caller holds a lock."""

    chunk, max_rows = CHUNK, MAX_ROWS
    step_sizes: Sequence[int] = (
        SHORT // 2, *range(SHORT, min(DIRECT + 1, CHUNK // 2), SHORT), *range(round_up(DIRECT + 1, LONG), CHUNK // 2, LONG)
    )

    def __init__(
        self, blob: Blob, *, context: int | None = None, kv_bits: int = 8, threads: int = 1, kv_budget: int | None = None
    ) -> None:
        """context: the longest sequence, at most the model's own maximum (None: that). kv_budget: bytes, see `SegmentPool`."""
        config = blob.config
        if context is not None and not 1 <= context <= config.context:
            raise BadRequest(f"context is {context}, the model's is {config.context}", "context")
        self.config, self.context = config, context or config.context
        self.blob, self.kv_bits, self.threads = blob, kv_bits, threads
        self.pool = SegmentPool(config, kv_bits, kv_budget)
        lost.install()
        self._team = Team(threads)
        self._weights = map_weights(blob)
        team = self._team
        self._read_ahead = ReadAhead(blob, lambda: team.progress)      # no cycle: what is closed goes at once
        self._shape = _shape(config)
        self._state, self._own = _workspace(self._shape, threads)
        self._frequencies = rope_frequencies(config)
        self._ready = self._closed = False

    def step(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Append every row's ids to its sequence; next-token logits (sum of n_logits, vocab_size), row after row, valid until
        the next call.

        At most `chunk` ids in all, and no two rows of one sequence. A token's logits do not depend on the other rows.
        Raises ContextOverflow or ValueError before anything is computed, FileLost if a file was cut meanwhile. If an
        exception ends the wait (Ctrl-C), nothing was appended, but call `wait` before any change to a segment.
        """
        self._check(rows)
        self._team.wait()
        for row in rows:
            row.sequence.reserve(row.sequence.length + len(row.ids))
        n_logits = sum(row.n_logits for row in rows)
        plan = _lay_out(rows, self._shape.group)
        angles = plan.positions[:, None] * self._frequencies
        state = self._state if n_logits <= MAX_LOGITS else self._state._replace(logits=_logits(self._shape, n_logits))
        state.cos[: angles.size], state.sin[: angles.size] = np.cos(angles).reshape(-1), np.sin(angles).reshape(-1)
        common = (self._shape, self._weights, self.pool.layout, plan, _of_last_layer(plan), state)
        if not self._ready:
            compile_forward(common, self._own[0])
            self._ready = True
        self._read_ahead.begin(len(plan.segments) * self.pool.segment_bytes)
        try:
            self._team.run(FORWARD[self.kv_bits], common, self._own)
        finally:
            self._read_ahead.end()
        lost.check()
        for row in rows:
            row.sequence.append(row.ids)
        rows_of_head = round_up(self.config.vocab_size, PAIR)
        return state.logits[: n_logits * rows_of_head].reshape(n_logits, rows_of_head)[:, : self.config.vocab_size]

    def wait(self) -> None:
        """Wait until no thread works on an interrupted step."""
        self._team.wait()

    def close(self) -> None:
        """Stop the threads, release the KV cache, unmap the weights."""
        self._team.close()
        self._read_ahead.close()
        self.pool.close()
        if not self._closed:
            self._closed = True
            del self._weights, self._state, self._own      # the workspace of a 7B is 40 MB
            self.blob.close()

    def _check(self, rows: Sequence[Row]) -> None:
        """Raise for errors that the kernels do not check."""
        tokens = sum(len(row.ids) for row in rows)
        if not 0 < len(rows) <= MAX_ROWS or len({id(row.sequence) for row in rows}) < len(rows):
            raise ValueError(f"a step takes 1 to {MAX_ROWS} rows, each of another sequence")
        if not 0 < tokens <= self.chunk:
            raise ValueError(f"{tokens} tokens in a step of at most {self.chunk}")
        for row in rows:
            if not 0 <= row.n_logits <= len(row.ids) or not len(row.ids):
                raise ValueError(f"{len(row.ids)} tokens and {row.n_logits} logits in a row")
            if row.sequence.length + len(row.ids) > self.context:
                raise ContextOverflow(row.sequence.length + len(row.ids), self.context)
            if min(row.ids) < 0 or max(row.ids) >= self.config.vocab_size:
                raise ValueError(f"token ids must be within 0 .. {self.config.vocab_size - 1}")


def _lay_out(rows: Sequence[Row], group: int) -> Rows:
    """The rows as the kernels see them."""
    n, starts = [len(row.ids) for row in rows], [row.sequence.length for row in rows]
    tables = [row.sequence.addresses for row in rows]
    firsts = np.cumsum([0, *n])                                       # first token of each row
    within = np.concatenate([np.arange(k) for k in n])
    spans: list[tuple[int, int, int]] = []
    wanted: list[int] = []
    query_rows, next_query = np.zeros(firsts[-1], np.int64), 0
    for row, first, end, start in zip(rows, firsts[:-1].tolist(), firsts[1:].tolist(), starts, strict=True):
        for position in range(start - start % SPAN, start + end - first, SPAN):
            at, until = max(first, first + position - start), min(first + position - start + SPAN, end)
            spans.append(((until - at) * (start + until - first), at, until))
            query_rows[at:until] = next_query + group * np.arange(until - at)
            next_query += round_up(group * (until - at), ROWS)
        wanted += range(end - row.n_logits, end)
    spans.sort(reverse=True)                                          # the longest work first
    splits = (max(row.sequence.length + len(row.ids) for row in rows) - 1) // (POSITIONS * SPLIT_BLOCKS) + 1
    return Rows(
        ids=np.concatenate([row.ids for row in rows]).astype(np.int64),
        positions=np.repeat(starts, n) + within,
        first_segment=np.repeat(np.cumsum([0, *map(len, tables)])[:-1], n),
        query_rows=query_rows,
        spans=np.array([(first, until) for _, first, until in spans], np.int64).reshape(-1),
        with_logits=np.array(wanted, np.int64),
        segments=np.concatenate(tables),
        own_blocks=np.concatenate([row.sequence.own_blocks(len(row.ids)) for row in rows]),
        rows_of_head=next_query,
        splits=splits if splits * next_query <= SPLIT_ROWS else 1,
    )


def _of_last_layer(rows: Rows) -> Rows:
    """The tokens with logits, and the spans that have one: all that the last layer needs after its keys and values."""
    if len(rows.with_logits) == len(rows.ids):
        return rows
    spans = rows.spans.reshape(-1, 2)
    before = np.searchsorted(rows.with_logits, spans)       # of the tokens with logits: before a span, and before its end
    return rows._replace(ids=rows.ids[rows.with_logits], spans=spans[before[:, 0] < before[:, 1]].reshape(-1))


def _shape(config: ModelConfig) -> Shape:
    return Shape(
        config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim, config.group,
        config.sliding_window or config.context, config.vocab_size, config.norm_eps, round_up(config.dim, BLOCK),
        round_up(config.q_dim, BLOCK), round_up(config.hidden_dim, BLOCK),
        round_up(config.q_dim + 2 * config.kv_dim, PAIR),
    )


def example_call(kv_bits: int = 8) -> tuple[tuple[Any, ...], Own]:
    """Arguments with the types of every model's step, to compile `forward` without a model."""
    none, shape = np.zeros(0, np.int64), Shape(1, 1, 1, 1, 1, 1, 1, 1, 1.0, 1, 1, 1, 1)
    state, own = _workspace(shape, 1, lambda _, dtype: np.zeros(0, dtype))
    weights = Weights(np.frombuffer(b"\0", np.uint8), 0, none.reshape(0, 0), none)
    rows = Rows(none, none, none, none, none, none, none, none, 0, 1)
    return (shape, weights, kv_layout(kv_bits, 32, 1, 1), rows, rows, state), own[0]


def workspace_bytes(config: ModelConfig, threads: int) -> int:
    """Ordinary memory that a Transformer takes for activations and logits, in bytes."""
    taken = 0

    def count(n: int, dtype: Any) -> NDArray[Any]:
        nonlocal taken
        taken += n * np.dtype(dtype).itemsize + ALIGNMENT
        return np.zeros(0, dtype)

    _workspace(_shape(config), threads, count)
    return taken


def _aligned(n: int, dtype: Any) -> NDArray[Any]:
    """n zeros that start at a multiple of 64 bytes, so that no vector straddles two cache lines (10 % of prefill)."""
    data = np.zeros(n * np.dtype(dtype).itemsize + ALIGNMENT, np.uint8)
    start = -data.ctypes.data % ALIGNMENT
    return data[start : start + n * np.dtype(dtype).itemsize].view(dtype)


def _workspace(shape: Shape, threads: int, array: Allocate = _aligned) -> tuple[State, Sequence[Own]]:
    """All that a Transformer computes in; `array(n, dtype)` makes each part."""
    chunk, tokens, hd = CHUNK, _tiled(2 * CHUNK), shape.head_dim      # twice: the head uses two digits of each token
    spans = chunk // SPAN + 2 * MAX_ROWS
    rows = shape.n_kv_heads * round_up(chunk * shape.group + spans * (ROWS - 1), ROWS)
    rows_of_span = round_up(SPAN * shape.group, ROWS)

    def activations(tokens: int, cols: int) -> Activations:
        codes = array(tokens * cols, np.int8)
        return Activations(
            codes, codes.view(np.int32), array(tokens * cols // GROUP, np.int32), array(tokens * cols // BLOCK, np.float32)
        )

    def partial(rows: int) -> Partial:
        return Partial(
            values=array(rows * round_up(hd, DIMS), np.float32),
            peaks=array(rows // ROWS * 16, np.float32),
            sums=array(rows * 16, np.float32),
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
                *partial(rows_of_span),
                earlier=partial(rows_of_span),
                probabilities=probabilities,
                codes=probabilities.view(np.uint8),
                first_seen=array(ROWS, np.int32),
                last_seen=array(ROWS, np.int32),
            ),
            hidden=array(max(chunk, STREAMS * SHORT) * BLOCK, np.float32),
            row=array(BLOCK, np.float32),
        )

    queries = array(rows * hd, np.int8)
    state = State(
        x=array(chunk * shape.dim_cols, np.float32),
        qkv=array(chunk * shape.qkv_dim, np.float32),
        attn_out=array(chunk * shape.q_cols, np.float32),
        xq=activations(tokens, max(shape.dim_cols, shape.q_cols)),
        hq=activations(_tiled(chunk), shape.hidden_cols),
        queries=Queries(
            queries, queries.view(np.int32), array(QUERY_SUMS * rows, np.int32), array(rows, np.float32),
            array(rows * hd, np.float32),
        ),
        partials=partial(SPLIT_ROWS * shape.n_kv_heads),
        logits=_logits(shape, MAX_LOGITS, array),
        cos=array(chunk * hd // 2, np.float32),
        sin=array(chunk * hd // 2, np.float32),
    )
    return state, [own() for _ in range(threads)]


def _tiled(tokens: int) -> int:
    """The number of tokens rounded up to whole tiles of any size."""
    return max(round_up(tokens, SHORT), round_up(tokens, LONG))


def _logits(shape: Shape, n_logits: int, array: Allocate = _aligned) -> NDArray[np.float32]:
    return array(n_logits * round_up(shape.vocab_size, PAIR), np.float32)
