"""A transformer without weights, for tests of what stands above it: it records what it is asked to compute."""

from __future__ import annotations

import hashlib

import numpy as np

from edgemistral.config import ModelConfig

VOCAB_SIZE = 300


def tiny_config(**changes) -> ModelConfig:
    fields = {
        "dim": 32, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 32, "hidden_dim": 32, "norm_eps": 1e-5,
        "vocab_size": VOCAB_SIZE, "context": 64, "rope_theta": 1e4, "sliding_window": None, "bos_id": 1, "eos_id": 2,
    }
    return ModelConfig(**{**fields, **changes})


class FakeTransformer:
    """Logits are random numbers seeded by all ids up to the position, so a wrong KV cache gives wrong logits.

    script: after a prefix of this many tokens, this id is the most likely one by far.
    """

    def __init__(self, config=None, context=None, chunk=8, script=None):
        self.config = config or tiny_config()
        self.context, self.chunk = context or self.config.context, chunk
        self.script = script or {}
        self.held: list[int] = []
        self.calls: list[list[int]] = []   # the ids of every forward call
        self.fail_at: int | None = None    # raise KeyboardInterrupt at this call, before anything is appended
        self.closed = False
        self.kv_bytes = 0
        self._logits = np.empty((chunk, self.config.vocab_size), np.float32)   # used again by every call

    @property
    def length(self) -> int:
        return len(self.held)

    def forward(self, ids, n_logits):
        assert not self.closed and ids.dtype == np.int32
        assert 0 <= n_logits <= len(ids) <= self.chunk and len(ids) > 0
        assert self.length + len(ids) <= self.context
        if self.fail_at is not None and len(self.calls) == self.fail_at:
            self.fail_at = None
            raise KeyboardInterrupt
        self.calls.append(ids.tolist())
        self.held += ids.tolist()
        for row, end in enumerate(range(self.length - n_logits + 1, self.length + 1)):
            self._logits[row] = self.expected_logits(self.held[:end])
        return self._logits[:n_logits]

    def expected_logits(self, ids):
        seed = int.from_bytes(hashlib.sha256(repr(list(ids)).encode()).digest()[:8], "little")
        logits = np.random.default_rng(seed).normal(size=self.config.vocab_size).astype(np.float32)
        if len(ids) in self.script:
            logits[self.script[len(ids)]] = 100
        return logits

    def truncate(self, length):
        assert not self.closed and 0 <= length <= self.length
        del self.held[length:]

    def close(self):
        self.closed = True
