"""A transformer without weights, for tests of what stands above it: it records what it is asked to compute."""

from __future__ import annotations

import hashlib

import numpy as np

from edgemistral.config import ModelConfig
from edgemistral.runtime.segments import SegmentPool

VOCAB_SIZE = 300


def tiny_config(**changes) -> ModelConfig:
    fields = {
        "dim": 32, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 32, "hidden_dim": 32, "norm_eps": 1e-5,
        "vocab_size": VOCAB_SIZE, "context": 64, "rope_theta": 1e4, "sliding_window": None, "bos_id": 1, "eos_id": 2,
    }
    return ModelConfig(**{**fields, **changes})


class FakeTransformer:
    """Logits are random numbers seeded by all ids up to the position, so a wrong sequence gives wrong logits.

    script: after a prefix of this many tokens, this id is the most likely one by far. segments: the budget of the pool.
    """

    step_sizes = (8, 12, 18, 24, 30)
    max_rows = 64

    def __init__(self, config=None, context=None, chunk=8, script=None, segments=64):
        self.config = config or tiny_config()
        self.context, self.chunk = context or self.config.context, chunk
        self.script = script or {}
        self.pool = SegmentPool(self.config, budget=0)
        self.pool.capacity = segments
        self.steps: list[list[list[int]]] = []   # the ids of every row of every step
        self.fail_at: int | None = None    # raise KeyboardInterrupt at this step, before anything is appended
        self.closed = False

    @property
    def calls(self):
        """The ids of every row."""
        return [ids for step in self.steps for ids in step]

    def step(self, rows):
        assert not self.closed and 0 < len(rows) <= self.max_rows
        assert len({id(row.sequence) for row in rows}) == len(rows)
        assert 0 < sum(len(row.ids) for row in rows) <= self.chunk
        for row in rows:
            assert row.ids.dtype == np.int32 and 0 <= row.n_logits <= len(row.ids) > 0
            assert row.sequence.length + len(row.ids) <= self.context
        if self.fail_at is not None and len(self.steps) == self.fail_at:
            self.fail_at = None
            raise KeyboardInterrupt
        self.steps.append([row.ids.tolist() for row in rows])
        logits = []
        for row in rows:
            row.sequence.reserve(row.sequence.length + len(row.ids))
            row.sequence.append(row.ids)
            held = row.sequence.ids.tolist()
            logits += [self.expected_logits(held[:end]) for end in range(len(held) - row.n_logits + 1, len(held) + 1)]
        return np.array(logits, np.float32).reshape(len(logits), self.config.vocab_size)

    def expected_logits(self, ids):
        seed = int.from_bytes(hashlib.sha256(repr(list(ids)).encode()).digest()[:8], "little")
        logits = np.random.default_rng(seed).normal(size=self.config.vocab_size).astype(np.float32)
        if len(ids) in self.script:
            logits[self.script[len(ids)]] = 100
        return logits

    def wait(self):
        pass

    def close(self):
        self.closed = True
        self.pool.close()
