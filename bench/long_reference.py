"""Logits of a few positions of a long prompt, in float32 and in bounded memory: `naive.forward` in blocks of rows.

All layers but the last are computed at every position, the last one only where it is asked for: there the other
positions matter by their keys and values alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from edgemistral.config import ModelConfig
from tests import naive

F32 = NDArray[np.float32]
Rows = NDArray[np.int64]   # positions, ascending

BLOCK_ROWS = 512   # positions that go through the matrices together
QUERIES = 32       # positions that attend together: their scores of one KV head are 15 MB at 30,000 positions


def logits_at(
    weights: Mapping[str, F32], config: ModelConfig, ids: NDArray[np.int32], at: Rows, threads: int, bar: tqdm
) -> F32:
    """Next-token logits (len(at), vocab_size) after the positions `at` of the prompt `ids`.

    `weights` as in `naive.forward`. `bar` counts blocks of rows. The threads share the blocks, each with
    a BLAS of one thread: NumPy releases the GIL in all that takes time.
    """
    everywhere = np.arange(len(ids))
    x = weights["tok_embeddings"][ids]
    bar.total = (2 * config.n_layers - 1) * len(_blocks(everywhere)) + len(_blocks(at))
    with ThreadPoolExecutor(threads) as pool:
        for layer in range(config.n_layers):
            of_layer = {name: weights[f"layers.{layer}.{name}"] for name in naive.LAYER_TENSORS}
            _layer(x, of_layer, config, at if layer == config.n_layers - 1 else everywhere, pool, bar)
    return naive.rms_norm(x[at], weights["norm"], config.norm_eps) @ weights["output"].T


def _layer(
    x: F32, w: Mapping[str, F32], config: ModelConfig, at: Rows, pool: Executor, bar: tqdm
) -> None:
    """One layer on x (n, dim), in place at the positions `at`."""
    n = len(x)
    keys = np.empty((config.n_kv_heads, n, config.head_dim), np.float32)
    values = np.empty_like(keys)

    def append(rows: Rows) -> None:
        h = naive.rms_norm(x[rows], w["attention_norm"], config.norm_eps)
        keys[:, rows] = _rotated_heads(h @ w["wk"].T, rows, config)
        values[:, rows] = _heads(h @ w["wv"].T, config).swapaxes(0, 1)

    def finish(rows: Rows) -> None:
        h = naive.rms_norm(x[rows], w["attention_norm"], config.norm_eps)
        y = x[rows] + _attend(_rotated_heads(h @ w["wq"].T, rows, config), keys, values, rows, config) @ w["wo"].T
        h = naive.rms_norm(y, w["ffn_norm"], config.norm_eps)
        x[rows] = y + naive.swiglu(h @ w["w1"].T, h @ w["w3"].T) @ w["w2"].T

    for step, positions in ((append, np.arange(n)), (finish, at)):
        for _ in pool.map(step, _blocks(positions)):
            bar.update()


def _blocks(rows: Rows) -> list[Rows]:
    return [rows[i : i + BLOCK_ROWS] for i in range(0, len(rows), BLOCK_ROWS)]


def _heads(x: F32, config: ModelConfig) -> F32:
    """(T, heads * head_dim) -> (T, heads, head_dim)"""
    return x.reshape(len(x), -1, config.head_dim)


def _rotated_heads(x: F32, positions: Rows, config: ModelConfig) -> F32:
    """(T, heads * head_dim) -> (heads, T, head_dim), rotated to the positions."""
    return naive.rope(_heads(x, config), positions, config.rope_theta).swapaxes(0, 1)


def _attend(queries: F32, keys: F32, values: F32, positions: Rows, config: ModelConfig) -> F32:
    """Causal grouped-query attention of queries (heads, T, head_dim) at `positions` -> (T, q_dim)."""
    _, tokens, head_dim = queries.shape
    out = np.empty((tokens, config.n_kv_heads, config.group, head_dim), np.float32)
    for first in range(0, tokens, QUERIES):
        rows = positions[first : first + QUERIES]
        low, high = naive.first_visible(int(rows[0]), config.sliding_window), int(rows[-1]) + 1
        seen, row = np.arange(low, high), rows[:, None]
        visible = seen <= row
        if config.sliding_window is not None:
            visible &= seen > row - config.sliding_window
        unseen = np.where(visible, np.float32(0), np.float32(-np.inf))
        for head in range(config.n_kv_heads):
            q = queries[head * config.group : (head + 1) * config.group, first : first + QUERIES].reshape(-1, head_dim)
            scores = (q @ keys[head, low:high].T).reshape(config.group, len(rows), -1)
            scores *= np.float32(head_dim**-0.5)
            scores += unseen
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            mixed = scores @ values[head, low:high]
            mixed /= scores.sum(axis=-1, keepdims=True)
            out[first : first + QUERIES, head] = mixed.swapaxes(0, 1)
    return out.reshape(tokens, config.q_dim)
