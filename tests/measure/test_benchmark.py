"""The work that shares of the machine's limits are counted from."""

from __future__ import annotations

from edgemistral.measure.benchmark import products
from tests import blobs


def test_products_of_a_prompt_are_counted_one_by_one():
    c = blobs.config(sliding_window=20, hidden_dim=512)          # whole blocks: no padding is counted
    dim, q, kv, hidden = c.dim, c.q_dim, c.kv_dim, c.hidden_dim
    first, rest = dim * (q + 2 * kv), q * dim + 3 * dim * hidden
    for tokens, depth in ((1, 0), (30, 0), (7, 16)):
        whole = only = dim * c.vocab_size
        for layer in range(c.n_layers):
            for token in range(tokens):
                after = rest + 2 * q * min(depth + token + 1, 20)
                whole += first + after
                only += first + (after if layer < c.n_layers - 1 or token == tokens - 1 else 0)
        assert products(c, tokens, depth) == only
        assert products(c, tokens, depth, whole=True) == whole
