"""Measures the inputs of each matrix: the calibration text goes through the float32 model, layer by layer.

A column of a matrix matters as much as the input that it multiplies. So before a layer is quantized, the hidden states of
the calibration text pass through it in float32, and the mean square of every input is kept. The next layer continues from
these states (tokens x dim); nothing else is kept.

Every product has the same shape for any memory, threads and strips: one window of tokens by `TILE` rows of a matrix, on one
thread of BLAS. So the statistics, and the blob, do not depend on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.files.bf16 import widen
from edgemistral.measure.reference import attend, rms_norm, rotated, swiglu
from edgemistral_quantize.ahead import one_ahead

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

TILE = 256        # rows of a matrix in one product
TOKENS = 64       # computed together in element-wise operations
MATRICES = ("wqkv", "wo", "w13", "w2")
SAMPLED_ROWS = 256       # about as many of each matrix
SAMPLED_TOKENS = 512     # at most, of all windows


class Source(Protocol):
    """The part of a checkpoint that is needed."""

    config: ModelConfig

    def strips(self, name: str, strip_bytes: int) -> Iterator[NDArray[Any]]:
        """Rows of a blob's tensor in the blob's order."""


@dataclass
class Inputs:
    """By the name of a layer's matrix: the mean squares of its inputs, and samples if they were asked for."""

    mean_squares: dict[str, F64] = field(default_factory=dict)        # (cols,)
    of_windows: dict[str, list[F64]] = field(default_factory=dict)    # (cols,) of each window
    tokens: dict[str, list[F32]] = field(default_factory=dict)        # (some, cols) inputs of each window
    weights: dict[str, F32] = field(default_factory=dict)             # (some, cols) rows of the matrix


Collect = Callable[[str, Sequence[F32]], None]
"""(matrix, inputs of some windows, each (tokens, cols)): called for all windows in their order, a few at a time."""


class CalibrationPass:
    """The hidden states of the calibration text on their way through the layers.

    Works in about `work_bytes(...)` of memory. `progress(n)` counts the checkpoint's bytes that were read.
    """

    def __init__(
        self, source: Source, windows: Sequence[NDArray[np.int32]], at_once: int, strip_bytes: int,
        progress: Callable[[int], object], threads: int | None = None, relative: bool = True, samples: bool = False,
    ) -> None:
        """windows: token ids (n,) each. at_once: windows that pass a matrix together, while it is in memory.

        relative: divide the inputs of wo and w2 by the size of the state that they add to (see `_over_size`). samples: keep
        samples of inputs and weights, too.
        """
        self._samples = samples
        self._source, self._config, self._relative = source, source.config, relative
        self._at_once, self._strip_bytes, self._progress = at_once, strip_bytes, progress
        # What overflows becomes an infinity, which `convert` refuses in one line: no warnings before it.
        self._pool = ThreadPoolExecutor(
            threads or os.cpu_count() or 1, initializer=partial(np.seterr, over="ignore", invalid="ignore")
        )
        self.states = self._embed(windows)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()

    def pass_layer(self, layer: int, collect: Collect | None = None) -> Inputs:
        """Move the states through `layer`; returns the inputs of its matrices. Call it for 0, 1, ... in turn."""
        c, at = self._config, f"layers.{layer}."
        norms = {name: list(self._strips(at + name)) for name in ("attention_norm", "ffn_norm")}
        rows = {"wqkv": c.q_dim + 2 * c.kv_dim, "wo": c.dim, "w13": 2 * c.hidden_dim, "w2": c.dim}
        sums: dict[str, F64] = {}
        parts: dict[str, list[F32]] = {}      # of matrices: sampled rows
        found, every = Inputs(), -(-self.tokens // SAMPLED_TOKENS)

        def meet(matrix: str, inputs: list[F32]) -> list[F32]:
            outputs = self._times(inputs, at + matrix, rows[matrix], sampled(matrix))
            if matrix in ("wo", "w2"):   # their outputs are added to the states, and a norm comes next
                add(states, outputs)
                if self._relative:
                    self._each(_over_size, inputs, states)
            for squares in self._pool.map(_sum_of_squares, inputs):   # in the windows' order, for any number of threads
                sums[matrix] = sums[matrix] + squares if matrix in sums else squares
                if self._samples:
                    found.of_windows.setdefault(matrix, []).append(squares)
            if self._samples:
                found.tokens.setdefault(matrix, []).extend(x[::every].copy() for x in inputs)
            if collect is not None:
                collect(matrix, inputs)
            return outputs

        def sampled(matrix: str) -> list[F32] | None:
            """Where to put the sampled rows, once."""
            return parts.setdefault(matrix, []) if self._samples and matrix not in parts else None

        def add(states: Iterable[F32], more: Iterable[F32]) -> None:
            for x, y in zip(states, more, strict=True):
                x += y

        for first in range(0, len(self.states), self._at_once):
            states = self.states[first : first + self._at_once]
            h = meet("wqkv", self._each(lambda x: rms_norm(x, norms["attention_norm"], c.norm_eps), states))
            h = self._each(lambda qkv: attend(c, rotated(c, qkv, np.arange(len(qkv))), np.arange(len(qkv))), h)
            meet("wo", h)
            h = meet("w13", self._each(lambda x: rms_norm(x, norms["ffn_norm"], c.norm_eps), states))
            h = self._each(_swiglu, h)
            meet("w2", h)
        found.mean_squares = {name: total / self.tokens for name, total in sums.items()}
        for squares in found.of_windows.values():
            squares[:] = (total / len(x) for total, x in zip(squares, self.states, strict=True))
        found.weights = {name: np.concatenate(part) for name, part in parts.items()}
        return found

    def pass_norm(self, collect: Collect | None = None) -> Inputs:
        """The output head's inputs, after the last layer."""
        norm = list(self._strips("norm"))
        total = np.zeros(self._config.dim)
        for first in range(0, len(self.states), self._at_once):
            states = self.states[first : first + self._at_once]
            inputs = self._each(lambda x: rms_norm(x, norm, self._config.norm_eps), states)
            total = sum(self._pool.map(_sum_of_squares, inputs), total)
            if collect is not None:
                collect("output", inputs)
        return Inputs({"output": total / self.tokens})

    @property
    def tokens(self) -> int:
        """The tokens of all windows."""
        return sum(map(len, self.states))

    def map(self, function: Callable[..., Any], *arrays: Iterable[Any]) -> Iterable[Any]:
        """Python's `map`, in the threads of this pass."""
        return self._pool.map(function, *arrays)

    def _each(self, function: Callable[..., F32], *arrays: Iterable[F32]) -> list[F32]:
        return list(self._pool.map(function, *arrays))

    def _times(self, inputs: list[F32], name: str, rows: int, sampled: list[F32] | None) -> list[F32]:
        """x W^T of each input x (tokens, cols) by the matrix W (rows, cols) -> (tokens, rows). `sampled` gets rows of W."""
        outputs = [np.empty((len(x), rows), np.float32) for x in inputs]
        first, every = 0, max(1, rows // SAMPLED_ROWS)
        for tile in one_ahead(tiled(self._strips(name))):
            if sampled is not None:
                sampled.append(tile[-first % every :: every].copy())
            columns = slice(first, first + len(tile))
            list(self._pool.map(partial(_multiply, tile, columns), inputs, outputs))
            first += len(tile)
        return outputs

    def _embed(self, windows: Sequence[NDArray[np.int32]]) -> list[F32]:
        states = [np.empty((len(ids), self._config.dim), np.float32) for ids in windows]
        first = 0
        for strip in self._strips("tok_embeddings"):
            for x, ids in zip(states, windows, strict=True):
                here = (ids >= first) & (ids < first + len(strip))
                x[here] = widen(strip[ids[here] - first])
            first += len(strip)
        return states

    def _strips(self, name: str) -> Iterator[NDArray[Any]]:
        for strip in self._source.strips(name, self._strip_bytes):
            self._progress(strip.nbytes)
            yield strip


def work_bytes(config: ModelConfig, window: int, n_windows: int, at_once: int) -> int:
    """Memory of a `CalibrationPass` without its strips: the states, and the widest activations of `at_once` windows."""
    c = config
    attention = 4 * window * (c.q_dim + 2 * c.kv_dim) + 4 * 256 * window
    feed_forward = window * (3 * c.hidden_dim + 2 * c.dim) + 8 * TOKENS * c.hidden_dim
    return 4 * (window * c.dim * n_windows + at_once * max(attention, feed_forward))


def sample_bytes(config: ModelConfig, n_windows: int) -> int:
    """Memory of a layer's samples, and of estimating the errors of one matrix."""
    cols = (config.dim, config.q_dim, config.dim, config.hidden_dim)
    return 4 * (SAMPLED_TOKENS + n_windows + 2 * SAMPLED_ROWS) * (sum(cols) + 6 * max(cols))


def tiled(strips: Iterable[NDArray[Any]]) -> Iterator[F32]:
    """The same rows as float32, `TILE` at a time (fewer at the end), for strips of any size."""
    waiting: list[F32] = []
    n = 0
    for strip in strips:
        first = 0
        while first < len(strip):
            part = widen(strip[first : first + TILE - n])
            waiting.append(part)
            n += len(part)
            first += len(part)
            if n == TILE:
                yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
                waiting, n = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _multiply(w: F32, columns: slice, x: F32, y: F32) -> None:
    y[:, columns] = x @ w.T


def _over_size(x: F32, states: F32) -> F32:
    """Divide each token's inputs, in place, by the size of its state: the next norm divides their error by that.

    Without it a few tokens with huge states, mostly the first one of a text, would outweigh all others.
    """
    for first in range(0, len(x), TOKENS):
        rows = slice(first, first + TOKENS)
        x[rows] /= np.sqrt(np.square(states[rows]).mean(axis=1, keepdims=True) + np.float32(1e-12))
    return x


def _swiglu(gate_up: F32) -> F32:
    """`swiglu`, a few tokens at a time: its intermediate values take several times as much as its result."""
    hidden = np.empty((len(gate_up), gate_up.shape[1] // 2), np.float32)
    for first in range(0, len(hidden), TOKENS):
        hidden[first : first + TOKENS] = swiglu(gate_up[first : first + TOKENS])
    return hidden


def _sum_of_squares(x: F32) -> F64:
    """The sum of squares of each column of x (tokens, cols)."""
    total: F64 = np.zeros(x.shape[1])
    for first in range(0, len(x), TOKENS):
        total += np.square(x[first : first + TOKENS]).sum(axis=0, dtype=np.float64)
    return total
