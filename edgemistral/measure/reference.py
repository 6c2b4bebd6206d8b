"""The model in float32: the only float reference, for checkpoints, for the weights of a blob, and for the tests.

Plain NumPy, without rounding of weights, activations or cache. It is slow, and holds one layer of weights in memory at a time:
for a 7B, 0.4 GiB in the checkpoint's dtype, then the output head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig, rope_frequencies
from edgemistral.files import layout
from edgemistral.files.bf16 import widen
from edgemistral.files.blob import Blob

F32 = NDArray[np.float32]
Strips = list[NDArray[Any]]   # rows of one tensor in the checkpoint's dtype; bits of bfloat16 as uint16
Rows = NDArray[np.int64]      # positions, ascending
STRIP_BYTES = 1 << 26         # of a strip in float32
BLOCK_ROWS = 512              # positions multiplied with the matrices together
QUERIES = 64                  # positions in attention together: limits the memory of the scores


class Checkpoint(Protocol):
    """The part of `edgemistral_quantize.checkpoint.Checkpoint` that is needed."""

    config: ModelConfig

    def strips(self, name: str, strip_bytes: int) -> Iterator[NDArray[Any]]:
        """Rows of a blob's tensor in the blob's order."""


class BlobWeights:
    """The dequantized weights of an open blob, as a checkpoint. `config` replaces the blob's own."""

    def __init__(self, blob: Blob, config: ModelConfig | None = None) -> None:
        self.config, self._blob = config or blob.config, blob
        self._matrices = {matrix.name: matrix for matrix in layout.matrices(blob.config, blob.recipe)}

    def strips(self, name: str, strip_bytes: int) -> Iterator[NDArray[Any]]:
        """One strip: the whole tensor."""
        codes = self._blob.array(name)
        if (matrix := self._matrices.get(name)) is None:
            yield codes
            return
        levels = self._blob.array(name + ".levels") if matrix.bits == 4 else None
        rows = 2 * self.config.hidden_dim if name.endswith("w13") else matrix.rows
        yield layout.dequantize(codes, self._blob.array(name + ".row_scales"), levels)[:rows, : matrix.cols]


class Reference:
    """A checkpoint as a model: `hidden_states` of some texts, then the `logits` of any part of them.

    Raises BadCheckpoint when a tensor cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint

    @classmethod
    def open(cls, directory: Path) -> Reference:
        """Open a checkpoint directory in Hugging Face or Mistral layout. Raises BadConfig or BadCheckpoint."""
        # Imported here, because only `eval --reference` needs the quantizer.
        from edgemistral_quantize.checkpoint import Checkpoint as Directory

        return cls(Directory(directory))

    def hidden_states(
        self,
        texts: Sequence[NDArray[np.int32]],
        progress: Callable[[int, int], None] | None = None,
        *,
        at: Sequence[Rows] | None = None,
        threads: int = 1,
    ) -> list[F32]:
        """The states (n, dim) before the output head for each text (n,) of token ids, every text on its own.

        at: for each text, the positions (k,) whose states are wanted, ascending; then the result is (k, dim), and the last
        layer is computed only there. threads: they share the blocks of rows; then give BLAS one thread.
        `progress(done, total)` counts layers of texts.
        """
        n_layers = self.config.n_layers
        states = [self._embed(ids) for ids in texts]
        wanted = [np.arange(len(ids)) for ids in texts] if at is None else list(at)
        with ThreadPoolExecutor(threads) as pool:
            for layer in range(n_layers):
                names = ("attention_norm", "wqkv", "wo", "ffn_norm", "w13", "w2")
                weights = {name: self._tensor(f"layers.{layer}.{name}") for name in names}
                for i, x in enumerate(states):
                    self._layer(x, weights, wanted[i] if layer == n_layers - 1 else np.arange(len(x)), pool)
                    if progress is not None:
                        progress(layer * len(texts) + i + 1, n_layers * len(texts))
        norm = self._tensor("norm")
        return [rms_norm(x[rows], norm, self.config.norm_eps) for x, rows in zip(states, wanted, strict=True)]

    def logits(self, states: F32) -> F32:
        """(n, dim) of `hidden_states` -> next-token logits (n, vocab_size)."""
        return times(states, self._output)

    @cached_property
    def _output(self) -> Strips:
        return self._tensor("output")

    def _tensor(self, name: str) -> Strips:
        return list(self._checkpoint.strips(name, STRIP_BYTES))

    def _embed(self, ids: NDArray[np.int32]) -> F32:
        x = np.empty((len(ids), self.config.dim), np.float32)
        first = 0
        for strip in self._checkpoint.strips("tok_embeddings", STRIP_BYTES):
            here = (ids >= first) & (ids < first + len(strip))
            x[here] = widen(strip[ids[here] - first])
            first += len(strip)
        return x

    def _layer(self, x: F32, w: dict[str, Strips], at: Rows, pool: Executor) -> None:
        """One layer on x (n, dim), in place at the positions `at`."""
        c = self.config
        qkv = np.empty((len(x), c.q_dim + 2 * c.kv_dim), np.float32)

        def project(rows: Rows) -> None:
            qkv[rows] = rotated(c, times(rms_norm(x[rows], w["attention_norm"], c.norm_eps), w["wqkv"]), rows)

        def finish(rows: Rows) -> None:
            y = x[rows] + times(attend(c, qkv, rows), w["wo"])
            x[rows] = y + times(swiglu(times(rms_norm(y, w["ffn_norm"], c.norm_eps), w["w13"])), w["w2"])

        for step, positions in ((project, np.arange(len(x))), (finish, at)):
            list(pool.map(step, [positions[i : i + BLOCK_ROWS] for i in range(0, len(positions), BLOCK_ROWS)]))


class ReferenceModel:
    """A reference with the interface of a model, for `evaluate`."""

    def __init__(self, reference: Reference) -> None:
        self.config, self.context, self._reference = reference.config, reference.config.context, reference

    def logits(self, ids: Any) -> F32:
        """(len(ids), vocab_size)"""
        return self._reference.logits(self._reference.hidden_states([np.asarray(ids, np.int32)])[0])


def rms_norm(x: F32, weight: Strips, eps: float) -> F32:
    """x (n, dim) by the rows' root mean square, times the one row of `weight`."""
    normalized: F32 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * widen(weight[0])
    return normalized


def times(x: F32, matrix: Strips) -> F32:
    """x W^T: (n, cols) by the strips of W (rows, cols) -> (n, rows)."""
    return np.concatenate([x @ widen(strip).T for strip in matrix], axis=1)


def rotated(config: ModelConfig, qkv: F32, positions: Rows) -> F32:
    """Queries, keys and values (n, q_dim + 2 kv_dim), queries and keys rotated; pairs are (i, i + head_dim / 2)."""
    end, half = config.q_dim + config.kv_dim, config.head_dim // 2
    angles = positions[:, None, None] * rope_frequencies(config)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    heads = qkv[:, :end].reshape(len(qkv), -1, config.head_dim)
    a, b = heads[..., :half], heads[..., half:]
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(len(qkv), end)
    return np.concatenate([turned, qkv[:, end:]], axis=1)


def attend(config: ModelConfig, qkv: F32, at: Rows) -> F32:
    """Causal grouped-query attention at the positions `at`, over what `rotated` gives: (n, q_dim + 2 kv_dim) -> (k, q_dim)."""
    c, out = config, np.empty((len(at), config.q_dim), np.float32)
    queries, keys, values = np.split(qkv, [c.q_dim, c.q_dim + c.kv_dim], axis=1)
    width = c.group * c.head_dim      # of the query heads of one KV head
    for first in range(0, len(at), QUERIES):
        rows = at[first : first + QUERIES]
        high = int(rows[-1]) + 1
        low = 0 if c.sliding_window is None else max(0, int(rows[0]) - c.sliding_window + 1)
        behind = rows[:, None] - np.arange(low, high)        # the key's distance behind the query
        hidden = (behind < 0) if c.sliding_window is None else (behind < 0) | (behind >= c.sliding_window)
        unseen = np.where(hidden, np.float32(-np.inf), np.float32(0))[:, None]
        for head in range(c.n_kv_heads):
            of_head = slice(head * c.head_dim, (head + 1) * c.head_dim)
            q = queries[rows, head * width : (head + 1) * width].reshape(-1, c.head_dim)
            scores = (q @ keys[low:high, of_head].T).reshape(len(rows), c.group, -1)
            scores *= np.float32(c.head_dim**-0.5)
            scores += unseen
            scores -= scores.max(axis=-1, keepdims=True)
            p = np.exp(scores, out=scores).reshape(len(q), -1)
            mixed = p @ values[low:high, of_head] / p.sum(axis=-1, keepdims=True)
            out[first : first + QUERIES, head * width : (head + 1) * width] = mixed.reshape(len(rows), -1)
    return out


def swiglu(gate_up: F32) -> F32:
    """(n, 2 * hidden_dim), 16 columns of gate and 16 of up in turn, -> silu(gate) * up."""
    n = len(gate_up)
    pairs = gate_up.reshape(n, -1, 2, layout.PANEL)
    gate, up = pairs[:, :, 0].reshape(n, -1), pairs[:, :, 1].reshape(n, -1)
    e = np.exp(-np.abs(gate))   # of a negative number only: never overflows
    activated: F32 = gate * np.where(gate < 0, e, np.float32(1)) / (1 + e) * up
    return activated
