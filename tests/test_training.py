"""The demo model's training: an interruption changes nothing. Needs PyTorch (the `train` extra)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edgemistral.demo import checkpoint_dir
from edgemistral.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from train_demo import CONFIG, FIRST_TOKENS, Training  # noqa: E402


def training() -> Training:
    prose = np.random.default_rng(0).integers(259, CONFIG.vocab_size, 20_000).astype(np.uint16)
    tokenizer = Tokenizer((checkpoint_dir() / "tokenizer.model").read_bytes())
    return Training(tokenizer, prose, prose, "cpu", compiled=False)


def test_an_interrupted_training_goes_on_with_the_same_bits() -> None:
    whole, first, second = training(), training(), training()
    whole.tokens = first.tokens = FIRST_TOKENS
    losses = [whole.train_step() for _ in range(2)]
    assert first.train_step() == losses[0]
    second.load(first.state())
    assert second.train_step() == losses[1]
    assert all(map(torch.equal, whole.model.parameters(), second.model.parameters()))
