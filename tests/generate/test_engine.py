"""The engine over a transformer that records its calls: nothing is computed twice, nothing is left inconsistent."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemistral.errors import BadRequest, Cancelled, ContextOverflow, EdgeMistralError
from edgemistral.generate.engine import Engine
from edgemistral.generate.sampler import SamplingParams
from tests.fake import VOCAB_SIZE, FakeTransformer

GREEDY = SamplingParams(temperature=0)


def greedy_twin(ids, n):
    """n greedy tokens, each from the whole history anew."""
    fake, history = FakeTransformer(), list(ids)
    for _ in range(n):
        history.append(int(fake.expected_logits(history).argmax()))
    return history[len(ids):]


def test_a_prompt_is_computed_in_chunks():
    fake = FakeTransformer(chunk=4)
    logits = Engine(fake).prefill(list(range(10, 20)))
    assert fake.calls == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]
    np.testing.assert_array_equal(logits, fake.expected_logits(range(10, 20)))


def test_only_what_follows_the_common_prefix_is_computed():
    fake = FakeTransformer()
    engine = Engine(fake)
    engine.prefill([1, 5, 6, 7])
    fake.calls.clear()
    engine.prefill([1, 5, 6, 7, 8, 9])
    assert fake.calls == [[8, 9]]
    engine.prefill([1, 5, 40])
    assert fake.calls[1:] == [[40]]
    assert engine.tokens.tolist() == [1, 5, 40]


@pytest.mark.parametrize("prompt", [[1, 5, 6, 7], [1, 5, 6]])
def test_the_last_token_is_computed_for_its_logits(prompt):
    fake = FakeTransformer()
    engine = Engine(fake)
    engine.prefill([1, 5, 6, 7])
    fake.calls.clear()
    logits = engine.prefill(prompt)
    assert fake.calls == [prompt[-1:]]
    np.testing.assert_array_equal(logits, fake.expected_logits(prompt))


def test_a_generation_computes_each_token_once():
    fake = FakeTransformer()
    generation = Engine(fake).generate([1, 10, 11], GREEDY, 5)
    tokens = list(generation)
    assert tokens == greedy_twin([1, 10, 11], 5)
    assert fake.calls == [[1, 10, 11]] + [[t] for t in tokens[:-1]]
    assert generation.finish_reason == "length"
    usage = generation.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.new_tokens) == (3, 0, 5)
    assert usage.prefill_seconds > 0 and usage.decode_seconds > 0 and usage.decode_rate > 0 and usage.prefill_rate > 0


def test_the_next_turn_of_a_chat_costs_its_new_tokens_only():
    fake = FakeTransformer()
    engine = Engine(fake)
    turn = [1, 10, 11]
    turn += engine.generate(turn, GREEDY, 4)
    fake.calls.clear()
    second = engine.generate([*turn, 2, 20, 21], GREEDY, 1)
    next(second)
    assert fake.calls == [[turn[-1], 2, 20, 21]]   # the last token of an answer has never been fed
    assert second.usage.cached_tokens == 6


def test_it_stops_before_the_end_token():
    generation = Engine(FakeTransformer(script={3: 50, 4: 51, 5: 2})).generate([1, 10, 11], GREEDY)
    assert list(generation) == [50, 51]
    assert generation.finish_reason == "stop"
    assert list(generation) == []


def test_it_ends_when_the_context_is_full():
    fake = FakeTransformer(context=6)
    generation = Engine(fake).generate([1, 10, 11, 12], GREEDY)
    assert list(generation) == greedy_twin([1, 10, 11, 12], 3)   # the last one needs no position of its own
    assert generation.finish_reason == "context"
    assert fake.length == 6


@pytest.mark.parametrize("call", [Engine.prefill, Engine.logits, lambda engine, ids: engine.generate(ids, GREEDY)])
def test_a_prompt_over_the_context_is_refused_before_anything_is_computed(call):
    fake = FakeTransformer(context=6)
    engine = Engine(fake)
    engine.prefill([1, 10])
    with pytest.raises(ContextOverflow, match="7 tokens are 1 more than the context of 6") as error:
        call(engine, [1, 11, 12, 13, 14, 15, 16])
    assert error.value.over == 1
    assert fake.calls == [[1, 10]] and engine.tokens.tolist() == [1, 10]


def test_no_new_tokens_computes_nothing():
    fake = FakeTransformer()
    generation = Engine(fake).generate([1, 10], GREEDY, 0)
    assert list(generation) == [] and fake.calls == [] and generation.finish_reason == "length"


def test_logits_at_every_position():
    fake = FakeTransformer(chunk=4)
    engine = Engine(fake)
    engine.prefill([1, 10])
    ids = [1, 10, 11, 12, 13, 14]
    logits = engine.logits(ids)
    np.testing.assert_array_equal(logits, [fake.expected_logits(ids[: i + 1]) for i in range(len(ids))])
    fake.calls.clear()
    engine.prefill([*ids, 15])   # and the cache holds them
    assert fake.calls == [[15]]


def test_a_seed_repeats_whatever_the_cache_held():
    engine = Engine(FakeTransformer())
    params = SamplingParams(temperature=1.0, seed=5)
    first = list(engine.generate([1, 10, 11], params, 8))
    engine.prefill([1, 10, 40, 41])
    assert list(engine.generate([1, 10, 11], params, 8)) == first
    assert list(engine.generate([1, 10, 11], params, 8)) == first


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=12), min_size=1, max_size=6), st.integers(1, 5))
def test_any_sequence_of_prompts_gives_the_logits_of_a_fresh_start(prompts, chunk):
    fake = FakeTransformer(chunk=chunk)
    engine, held = Engine(fake), []
    for prompt in prompts:
        fake.calls.clear()
        np.testing.assert_array_equal(engine.prefill(prompt), fake.expected_logits(prompt))
        common = 0
        while common < min(len(held), len(prompt) - 1) and held[common] == prompt[common]:
            common += 1
        assert [token for call in fake.calls for token in call] == prompt[common:]
        held = prompt


def test_generations_may_be_interleaved_and_dropped():
    engine = Engine(FakeTransformer())
    a, b, c = (engine.generate([1, start], GREEDY, 6) for start in (10, 20, 30))
    next(c)
    mixed = [(next(a), next(b)) for _ in range(6)]
    assert [x for x, _ in mixed] == greedy_twin([1, 10], 6)
    assert [y for _, y in mixed] == greedy_twin([1, 20], 6)


def test_progress_counts_the_tokens_that_had_to_be_computed():
    engine = Engine(FakeTransformer(chunk=4))
    engine.prefill([1, 10])
    seen = []
    prompt = [1, 10, *range(20, 30)]
    assert len(list(engine.generate(prompt, GREEDY, 3, progress=lambda *counts: seen.append(counts)))) == 3
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_cancel_stops_between_chunks_and_keeps_what_was_computed():
    fake = FakeTransformer(chunk=4)
    engine = Engine(fake)
    prompt = list(range(10, 22))
    with pytest.raises(Cancelled):
        engine.prefill(prompt, cancel=lambda: len(fake.calls) == 2)
    assert engine.tokens.tolist() == prompt[:8]
    fake.calls.clear()
    np.testing.assert_array_equal(engine.prefill(prompt), fake.expected_logits(prompt))
    assert fake.calls == [prompt[8:]]


def test_cancel_stops_between_tokens():
    engine = Engine(FakeTransformer())
    taken = []
    generation = engine.generate([1, 10], GREEDY, cancel=lambda: len(taken) == 3)
    with pytest.raises(Cancelled):
        for token in generation:
            taken.append(token)
    assert taken == greedy_twin([1, 10], 3)
    assert list(engine.generate([1, 10], GREEDY, 4)) == greedy_twin([1, 10], 4)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_an_interrupt_at_any_call_leaves_a_consistent_state(at):
    fake = FakeTransformer(chunk=4)
    fake.fail_at = at
    engine = Engine(fake)
    prompt = [1, 10, 11, 12, 13, 14]
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(prompt, GREEDY, 5))
    assert engine.tokens.tolist() == fake.held
    assert list(engine.generate(prompt, GREEDY, 5)) == greedy_twin(prompt, 5)


def test_threads_take_turns():
    engine = Engine(FakeTransformer())
    results = {}

    def work(start):
        results[start] = list(engine.generate([1, start], GREEDY, 8))

    threads = [threading.Thread(target=work, args=(start,)) for start in (10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {start: greedy_twin([1, start], 8) for start in (10, 20, 30)}


@pytest.mark.parametrize(
    "ids",
    [[], [1, VOCAB_SIZE], [-1], [1.0], [[1, 2]], [[1], [1, 2]], ["1"], "abc", [None], [1 << 70], np.zeros(3, bool)],
)
def test_ids_are_checked_at_the_border(ids):
    fake = FakeTransformer()
    with pytest.raises(BadRequest) as error:
        Engine(fake).generate(ids, GREEDY)
    assert error.value.field == "ids"
    assert fake.calls == []


@pytest.mark.parametrize("max_new_tokens", [-1, 1.5, True, "8"])
def test_max_new_tokens_is_checked_at_the_border(max_new_tokens):
    with pytest.raises(BadRequest) as error:
        Engine(FakeTransformer()).generate([1], GREEDY, max_new_tokens)
    assert error.value.field == "max_new_tokens"


def test_numpy_ids_of_any_integer_type_are_welcome():
    for dtype in (np.int64, np.uint8, np.int32):
        Engine(FakeTransformer()).prefill(np.array([1, 10], dtype))


def test_a_closed_engine_says_so():
    fake = FakeTransformer()
    engine = Engine(fake)
    generation = engine.generate([1, 10], GREEDY)
    next(generation)
    engine.close()
    engine.close()
    assert fake.closed
    for call in (lambda: next(generation), lambda: engine.prefill([1]), lambda: engine.tokens):
        with pytest.raises(EdgeMistralError, match="closed"):
            call()
