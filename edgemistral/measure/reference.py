"""The model in float32, straight from its checkpoint: what a blob is compared with.

Plain NumPy without any rounding of weights, activations or cache. Slow, and one layer of weights in memory at a time,
as the checkpoint stores them: 0.4 GiB of a 7B, then its output head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig, rope_frequencies
from edgemistral.files import layout

F32 = NDArray[np.float32]
Strips = list[NDArray[Any]]   # rows of one tensor in the checkpoint's dtype; bits of bfloat16 as uint16
STRIP_BYTES = 1 << 26         # of a strip widened to float32
ROWS = 256   # query tokens that attend at once, which bounds the matrix of scores


class Checkpoint(Protocol):
    """What is needed of `edgemistral_quantize.checkpoint.Checkpoint`."""

    config: ModelConfig

    def strips(self, name: str, strip_bytes: int) -> Iterator[NDArray[Any]]:
        """Rows of a blob's tensor in the blob's order."""


class Reference:
    """A checkpoint as a model: `hidden_states` of some texts, then the `logits` of any part of them.

    Raises BadCheckpoint when a tensor cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint

    @classmethod
    def open(cls, directory: Path) -> Reference:
        """Of a checkpoint directory in Hugging Face or Mistral layout. Raises BadConfig or BadCheckpoint."""
        # Here, because this is all that the runtime ever needs of the quantizer.
        from edgemistral_quantize.checkpoint import Checkpoint as Directory

        return cls(Directory(directory))

    def hidden_states(
        self, texts: Sequence[NDArray[np.int32]], progress: Callable[[int, int], None] | None = None
    ) -> list[F32]:
        """The states (n, dim) before the output head for each text (n,) of token ids, every text on its own.

        `progress(done, total)` counts layers of texts.
        """
        n_layers, eps = self.config.n_layers, self.config.norm_eps
        states = [self._embed(ids) for ids in texts]
        for layer in range(n_layers):
            names = ("attention_norm", "wqkv", "wo", "ffn_norm", "w13", "w2")
            weights = {name: self._tensor(f"layers.{layer}.{name}") for name in names}
            for i, x in enumerate(states):
                h = times(rms_norm(x, weights["attention_norm"], eps), weights["wqkv"])
                x += times(self._attend(h), weights["wo"])
                h = times(rms_norm(x, weights["ffn_norm"], eps), weights["w13"])
                x += times(_swiglu(h), weights["w2"])
                if progress is not None:
                    progress(layer * len(texts) + i + 1, n_layers * len(texts))
        norm = self._tensor("norm")
        return [rms_norm(x, norm, eps) for x in states]

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

    def _attend(self, qkv: F32) -> F32:
        """Causal grouped-query attention: queries, keys and values (n, q_dim + 2 kv_dim) -> (n, q_dim)."""
        c, n = self.config, len(qkv)
        heads = qkv.reshape(n, -1, c.head_dim).swapaxes(0, 1)   # (heads, n, head_dim)
        q, k, v = np.split(heads, [c.n_heads, c.n_heads + c.n_kv_heads])
        frequencies = rope_frequencies(c)
        q, k = _rotate(q, frequencies), _rotate(k, frequencies)
        out = np.empty((n, c.n_heads, c.head_dim), np.float32)
        for first in range(0, n, ROWS):
            last = min(first + ROWS, n)
            low = 0 if c.sliding_window is None else max(0, first - c.sliding_window + 1)
            behind = np.arange(first, last)[:, None] - np.arange(low, last)   # the key's distance behind the query
            hidden = (behind < 0) if c.sliding_window is None else (behind < 0) | (behind >= c.sliding_window)
            for head in range(c.n_heads):
                scores = q[head, first:last] @ k[head // c.group, low:last].T / np.float32(np.sqrt(c.head_dim))
                scores[hidden] = -np.inf
                p = np.exp(scores - scores.max(axis=1, keepdims=True))
                out[first:last, head] = p @ v[head // c.group, low:last] / p.sum(axis=1, keepdims=True)
        return out.reshape(n, c.q_dim)


class ReferenceModel:
    """A reference as `evaluate` wants a model."""

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


def widen(strip: NDArray[Any]) -> F32:
    """A checkpoint's own numbers as float32."""
    if strip.dtype.kind == "u":
        return (strip.astype(np.uint32) << 16).view(np.float32)
    return strip.astype(np.float32)


def _rotate(x: F32, frequencies: NDArray[np.float64]) -> F32:
    """Rotary positions 0, 1, ... on x (heads, n, head_dim), pairs (i, i + head_dim / 2) of these frequencies."""
    half = x.shape[2] // 2
    angles = np.arange(x.shape[1])[:, None] * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _swiglu(gate_up: F32) -> F32:
    """(n, 2 * hidden_dim), 16 columns of gate and 16 of up in turn, -> silu(gate) * up."""
    n = len(gate_up)
    pairs = gate_up.reshape(n, -1, 2, layout.PANEL)
    gate, up = pairs[:, :, 0].reshape(n, -1), pairs[:, :, 1].reshape(n, -1)
    e = np.exp(-np.abs(gate))   # of a negative number only: never overflows
    activated: F32 = gate * np.where(gate < 0, e, np.float32(1)) / (1 + e) * up
    return activated
