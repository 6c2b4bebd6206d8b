"""The demo model's training: an interruption changes nothing. Needs PyTorch (the `train` extra)."""

from __future__ import annotations

import numpy as np
import pytest

from edgemistral.demo import checkpoint_dir
from edgemistral.text.sentencepiece import SentencePieceTokenizer

torch = pytest.importorskip("torch")

from training.balance import balance  # noqa: E402
from training.network import Mistral  # noqa: E402
from training.train_demo import BEGINS, CONFIG, FIRST_FALL, LATER, STAGES, TOTAL, WARM_UP, Training  # noqa: E402


def training() -> Training:
    prose = np.random.default_rng(0).integers(259, CONFIG.vocab_size, 20_000).astype(np.uint16)
    tokenizer = SentencePieceTokenizer((checkpoint_dir() / "tokenizer.model").read_bytes())
    return Training(tokenizer, prose, prose, "cpu", compiled=False)


def test_an_interrupted_training_goes_on_with_the_same_bits() -> None:
    whole, first, second = training(), training(), training()
    whole.tokens = first.tokens = FIRST_FALL
    losses = [whole.train_step() for _ in range(2)]
    assert first.train_step() == losses[0]
    second.load(first.state())
    assert second.train_step() == losses[1]
    assert all(map(torch.equal, whole.model.parameters(), second.model.parameters()))


def test_rates_rise_and_fall_in_the_first_two_stages_and_in_each_later_one() -> None:
    one = training()

    def rate(tokens: float, stage: int) -> float:
        one.tokens = int(tokens)
        return one.rate(stage)

    assert rate(0, 0) == 1 / WARM_UP
    one.step = WARM_UP
    assert rate(0.4 * FIRST_FALL, 1) == 1 and 0 < rate(FIRST_FALL - 1, 1) < 1e-6
    for n in range(LATER, len(STAGES)):
        begin, end, peak = BEGINS[n], BEGINS[n + 1], STAGES[n].rate
        assert 0 < rate(begin, n) < 0.1 * peak and peak / 2 < rate(begin + 0.1 * STAGES[n].tokens, n) < peak
        assert 0 < rate(end - 1, n) < 1e-6 and rate(end + 100, n) == 0
    assert end == TOTAL


def test_balancing_changes_columns_and_no_logits() -> None:
    """Inputs and weights of very unlike columns: afterwards they are alike, and the model computes the same."""
    torch.manual_seed(0)
    model = Mistral(CONFIG)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter *= torch.exp(torch.randn(parameter.shape[-1]))
        ids = torch.randint(259, CONFIG.vocab_size, (2, 40))
        before, spread = model(ids), columns_spread(model)
        balance(model, [ids])
        torch.testing.assert_close(model(ids), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
        assert columns_spread(model) < 0.8 * spread


def columns_spread(model: Mistral) -> float:
    """How unlike the columns of w2 are: the deviation of the logarithm of their sizes."""
    return float(model.layers[3].w2.weight.square().mean(0).log().std())
