"""Prompt lookup: the same tokens as without, in fewer steps where an answer copies."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemistral.generate.engine import Engine
from edgemistral.generate.lookup import MOST, Lookup
from edgemistral.generate.pace import Pace
from edgemistral.generate.sampler import SamplingParams
from tests.fake import FakeTransformer
from tests.generate.test_engine import together

GREEDY = SamplingParams(temperature=0)


class Copying(FakeTransformer):
    """Goes on as the text did where its last two tokens stood before (`share` of the times), as a model that quotes does."""

    share = 1.0
    known: ClassVar[dict[tuple[float, bytes], np.ndarray]] = {}       # what is compared asks for the same again

    def expected_logits(self, ids):
        key = self.share, np.array(ids, np.int32).tobytes()
        if key not in self.known:
            if len(self.known) > 4000:
                self.known.clear()
            self.known[key] = self._logits(ids)
        return self.known[key].copy()

    def _logits(self, ids):
        logits = super().expected_logits(ids)
        logits[2] = -100                                  # no end
        for at in range(len(ids) - 2, 1, -1):
            if ids[at - 2 : at] == ids[-2:] and (self.share == 1 or logits[0] < 4 * self.share - 2):
                logits[ids[at]] = 50
                break
        return logits


@pytest.fixture(autouse=True)
def usual_costs(monkeypatch):
    """The fake's steps take as long as they bring logits; a real one's wait for memory."""
    monkeypatch.setattr(Pace, "note", lambda *_: None)


def model(share=1.0, **settings):
    fake = Copying(context=700, chunk=64, **settings)
    fake.share = share
    return fake


PROMPT = [1, *range(10, 60), 5, *range(10, 13)]


def test_a_quote_takes_fewer_steps_and_gives_the_same_tokens():
    plain, guessing = model(), model()
    expected = list(Engine(plain, lookup=False).generate(PROMPT, GREEDY, 40))
    generation = Engine(guessing).generate(PROMPT, GREEDY, 40)
    assert list(generation) == expected
    assert len(guessing.steps) < len(plain.steps) / 3
    assert generation.usage.accepted_tokens > 25 and generation.usage.new_tokens == 40


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_share_of_right_guesses_gives_the_tokens_of_plain_decoding(data):
    """Greedy and sampled, several at once, to the end of the context and of the segments."""
    share = data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    prompts = data.draw(st.lists(st.lists(st.integers(3, 8), min_size=1, max_size=40), min_size=1, max_size=4))
    length = data.draw(st.sampled_from([1, 7, 60, 300, None]))
    params = [
        SamplingParams(temperature=data.draw(st.sampled_from([0.0, 0.8])), seed=n, top_logprobs=1) for n in range(len(prompts))
    ]
    plain, guessing = Engine(model(share), lookup=False), Engine(model(share))
    asked = list(zip(prompts, params, strict=True))
    expected = [plain.generate(prompt, one, length) for prompt, one in asked]
    seen = [guessing.generate(prompt, one, length) for prompt, one in asked]
    assert together(guessing, seen) == together(plain, expected)
    for a, b in zip(seen, expected, strict=True):
        assert (a.finish_reason, a.logprobs) == (b.finish_reason, b.logprobs)
        assert len(a.logprobs) == a.usage.new_tokens == b.usage.new_tokens
        assert 0 <= a.usage.accepted_tokens <= a.usage.guessed_tokens


def test_a_step_that_only_decodes_stays_small():
    fake = model()
    engine = Engine(fake)
    together(engine, [engine.generate([*PROMPT[:-1], 7 + n, *range(10, 13)], GREEDY, 40) for n in range(3)])
    assert all(sum(map(len, step)) <= 8 for step in fake.steps[4:])


def test_wrong_guesses_cost_next_to_nothing():
    """Tokens that repeat without a pattern: after a few wrong guesses there are almost none."""
    fake = model(0.0)
    ids = np.random.default_rng(0).integers(3, 5, 300).tolist()
    pace, lookup, history = Pace(), Lookup(np.array(ids, np.int32), 20), np.array(ids, np.int32)
    extra = 0.0
    for length in range(20, 300):
        guess = lookup.guess(history[:length], MOST, pace)
        if guess:
            extra += pace.cost(1 + len(guess)) - 1
            lookup.learn(len(guess), 0)
    assert 0 < extra < 0.02 * 280
    assert fake.steps == []


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4])
def test_short_histories_have_nothing_to_look_up(length):
    history = np.full(10, 7, np.int32)
    assert len(Lookup(history, length).guess(history[:length], MOST, Pace())) <= max(0, length - 3)


def test_it_can_be_turned_off():
    fake = model()
    list(Engine(fake, lookup=False).generate(PROMPT, GREEDY, 20))
    assert max(map(len, fake.calls[1:])) == 1


def test_a_guess_must_pay_for_the_whole_step():
    """Up to 4 tokens cost what one does, and more three times as much: the place that is left is used, not more."""
    pace, history = Pace(), np.array([*range(10, 30)] * 2, np.int32)
    pace._alone = {tokens: 1.0 if tokens <= 4 else 3.0 for tokens in range(1, 12)}
    lookup = Lookup(history, 22)
    for _ in range(30):
        lookup.learn(MOST, MOST)
    for length, others, guessed in ((25, 0, 3), (26, 1, 2), (27, 2, 1), (28, 3, 0)):
        assert len(lookup.guess(history[:length], MOST, pace, others)) == guessed
