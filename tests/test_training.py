"""The demo model's training: its exercises, and that an interruption changes nothing. Needs PyTorch (the `train` extra)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edgemistral.demo import checkpoint_dir
from edgemistral.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from batches import IGNORED, repeated_batch  # noqa: E402
from train_demo import CONFIG, FIRST_TOKENS, Training  # noqa: E402


def training() -> Training:
    prose = np.random.default_rng(0).integers(259, CONFIG.vocab_size, 20_000).astype(np.uint16)
    tokenizer = Tokenizer((checkpoint_dir() / "tokenizer.model").read_bytes())
    return Training(tokenizer, prose, prose, "cpu", compiled=False)


def test_repetitions_are_to_be_learned_from_their_second_time_on() -> None:
    ids, targets = repeated_batch(CONFIG.vocab_size, 8, 64, CONFIG.bos_id, np.random.default_rng(0))
    assert ids.shape == targets.shape == (8, 64) and (ids[:, 0] == CONFIG.bos_id).all()
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        period = next(n for n, target in enumerate(wanted) if target != IGNORED)
        seen = row[1:]
        assert wanted[period:-1] == seen[period:] == [seen[n - period] for n in range(period, 63)]
        assert min(seen) >= 259


def test_an_interrupted_training_goes_on_with_the_same_bits() -> None:
    whole, first, second = training(), training(), training()
    whole.tokens = first.tokens = FIRST_TOKENS
    losses = [whole.train_step() for _ in range(2)]
    assert first.train_step() == losses[0]
    second.load(first.state())
    assert second.train_step() == losses[1]
    assert all(map(torch.equal, whole.model.parameters(), second.model.parameters()))
