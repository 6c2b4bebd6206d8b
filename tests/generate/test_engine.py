"""The engine over a transformer that records its calls: nothing is computed twice, nothing is left inconsistent.

Over 400 lines: one recording transformer serves all of it.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemistral.errors import BadRequest, Cancelled, ContextOverflow, EdgeMistralError
from edgemistral.generate.engine import WORTH_WAITING, Engine
from edgemistral.generate.sampler import SamplingParams
from tests.fake import VOCAB_SIZE, FakeTransformer

GREEDY = SamplingParams(temperature=0)


def greedy_twin(ids, n):
    """n greedy tokens, each from the whole history anew."""
    fake, history = FakeTransformer(), list(ids)
    for _ in range(n):
        history.append(int(fake.expected_logits(history).argmax()))
    return history[len(ids):]


def shared(a, b):
    """How many leading ids two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_a_prompt_is_computed_in_chunks():
    fake = FakeTransformer(chunk=4)
    logits = Engine(fake).prefill(list(range(10, 20)))
    assert fake.calls == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]
    np.testing.assert_array_equal(logits, fake.expected_logits(range(10, 20)))


def test_only_what_follows_the_common_prefix_is_computed():
    fake = FakeTransformer()
    engine = Engine(fake)
    engine.prefill([1, 5, 6, 7])
    fake.steps.clear()
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
    fake.steps.clear()
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
    fake.steps.clear()
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
    engine = Engine(fake)
    generation = engine.generate([1, 10, 11, 12], GREEDY)
    assert list(generation) == greedy_twin([1, 10, 11, 12], 3)   # the last one needs no position of its own
    assert generation.finish_reason == "context"
    assert len(engine.tokens) == 6


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
    fake.steps.clear()
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
        fake.steps.clear()
        np.testing.assert_array_equal(engine.prefill(prompt), fake.expected_logits(prompt))
        common = max((shared(before, prompt[:-1]) for before in held), default=0)
        assert [token for call in fake.calls for token in call] == prompt[common:]
        held.append(prompt)


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
    fake.steps.clear()
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
    assert engine.tokens.tolist() == [token for call in fake.calls for token in call]
    assert list(engine.generate(prompt, GREEDY, 5)) == greedy_twin(prompt, 5)


# ---- many sequences -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [2, 3, 10])
def test_conversations_in_turn_keep_their_prefixes(n):
    """With a title request after each turn, as chat clients send: every conversation computes only what is new."""
    fake = FakeTransformer(context=400, chunk=64)
    engine = Engine(fake)
    chats = [[1, 10 + i, *range(50, 80)] for i in range(n)]
    for turn in range(4):
        for chat in chats:
            generation = engine.generate(chat, GREEDY, 6)
            chat += generation
            if turn:
                assert generation.usage.cached_tokens >= 0.95 * (generation.usage.prompt_tokens - 7)
            title = engine.generate([*chat, 2, 200, 201], GREEDY, 2)
            list(title)
            assert title.usage.cached_tokens >= len(chat) - 1
            chat += [2, 90 + turn, 91, 92, 93]
    assert fake.pool.used <= fake.pool.capacity


def test_a_fork_leaves_the_original_as_it_was():
    fake = FakeTransformer(context=600, chunk=64)
    engine, chat = Engine(fake), [1, *range(10, 290), *range(10, 40)]
    engine.prefill(chat)
    for edited in ([*chat[:280], 7], [*chat[:20], 7], [*chat[:256], 7]):
        fake.steps.clear()
        np.testing.assert_array_equal(engine.prefill(edited), fake.expected_logits(edited))
        assert fake.calls == [[7]]
    fake.steps.clear()
    engine.prefill([*chat, 8])
    assert fake.calls == [[8]]


def test_the_least_recently_used_goes_first_and_the_budget_holds():
    fake = FakeTransformer(context=600, chunk=64, segments=3)
    engine = Engine(fake)
    a, b, c, d = ([1, start, 40] for start in (10, 20, 30, 50))
    for prompt in (a, b, c):
        engine.prefill(prompt)
    engine.prefill([*a, 5])
    engine.prefill(d)                                   # b goes
    assert fake.pool.used == 3
    for prompt, computed in (([*a, 5, 6], 1), ([*c, 6], 1), ([*b, 6], 3)):
        fake.steps.clear()
        engine.prefill(prompt)
        assert sum(map(len, fake.calls)) == computed


def test_the_same_prompt_again_and_again_takes_room_once():
    fake = FakeTransformer(context=600, chunk=64)
    engine, prompt = Engine(fake), [1, *range(10, 290)]
    for new_tokens in (1, 7, 7, 1, 3, 7):
        list(engine.generate(prompt, GREEDY, new_tokens))
        engine.prefill(prompt)
    assert fake.pool.used <= 2 + 2                        # the longest, and a fork that ends earlier
    fake.steps.clear()
    list(engine.generate(prompt, GREEDY, 7))
    assert fake.calls[0] == prompt[-1:]


def test_one_full_context_always_has_room():
    fake = FakeTransformer(context=600, chunk=64, segments=1)
    engine = Engine(fake)
    assert list(engine.generate([1, 10], GREEDY, 550)) == greedy_twin_of(fake, [1, 10], 550)
    assert list(engine.generate([1, 10], GREEDY, 3)) == greedy_twin_of(fake, [1, 10], 3)


def greedy_twin_of(fake, ids, n):
    history = list(ids)
    while len(history) < len(ids) + n and (token := int(fake.expected_logits(history).argmax())) != 2:
        history.append(token)
    return history[len(ids):]


def together(engine, generations):
    """All tokens of generations that share every step."""
    while going := [one for one in generations if not one.done]:
        engine.step(going)
        assert all(one.error is None for one in going)
    return [list(one) for one in generations]


def test_running_generations_share_every_step():
    fake = FakeTransformer(chunk=16)
    engine = Engine(fake)
    prompts = [[1, 10], [1, 20, 21], [1, 30, 31, 32]]
    results = together(engine, [engine.generate(prompt, GREEDY, 5) for prompt in prompts])
    assert results == [greedy_twin(prompt, 5) for prompt in prompts]
    assert [len(step) for step in fake.steps] == [3] * 5       # one step for the prompts, one for each further token


def test_a_long_prompt_is_fed_beside_the_tokens_of_others():
    fake = FakeTransformer(context=400, chunk=64)
    engine = Engine(fake)
    reader = engine.generate([1, 10], GREEDY, 30)
    next(reader)
    fake.steps.clear()
    prompt = [1, *range(20, 220)]
    assert together(engine, [reader, engine.generate(prompt, GREEDY, 2)])[1] == greedy_twin_of(fake, prompt, 2)
    end = next(i for i, step in enumerate(fake.steps) if prompt[-1] in step[-1])
    assert end > 2 and all(len(step[0]) == 1 for step in fake.steps[:end])                # the reader never stands still
    assert sum(len(step) == 2 for step in fake.steps[: end + 1]) >= 3


def test_one_prompt_of_several_answers_is_read_once():
    fake = FakeTransformer(context=400, chunk=64)
    engine, prompt = Engine(fake), [1, *range(20, 220)]
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(3)]
    alone = [list(Engine(FakeTransformer(context=400, chunk=64)).generate(prompt, one, 4)) for one in params]
    assert together(engine, [engine.generate(prompt, one, 4) for one in params]) == alone
    assert sum(map(len, fake.calls)) <= len(prompt) + 2 * WORTH_WAITING + 3 * 3


def test_too_many_for_the_budget_wait_and_lose_nothing():
    fake = FakeTransformer(context=700, chunk=64, segments=3)
    engine = Engine(fake)
    prompts = [[1, start, *range(40, 240)] for start in (10, 20, 30, 31)]
    results = together(engine, [engine.generate(prompt, GREEDY, 120) for prompt in prompts])   # two segments each
    assert results == [greedy_twin_of(fake, prompt, 120) for prompt in prompts]
    assert fake.pool.used <= 3


def test_what_stops_one_generation_disturbs_no_other():
    engine = Engine(FakeTransformer(chunk=16))

    def broken(done, total):
        raise ZeroDivisionError

    prompts = [[1, 10], [1, 20], [1, 30]]
    generations = [
        engine.generate(prompts[0], GREEDY, 4), engine.generate(prompts[1], GREEDY, 4, progress=broken),
        engine.generate(prompts[2], GREEDY, 4, cancel=lambda: True),
    ]
    while not generations[0].done:
        engine.step(generations)
    assert list(generations[0]) == greedy_twin(prompts[0], 4)
    with pytest.raises(ZeroDivisionError):
        next(generations[1])
    with pytest.raises(Cancelled):
        next(generations[2])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_interleaving_gives_the_tokens_of_a_fresh_model(data):
    """Ten conversations with edits, forks, aborts and evictions, several at once."""
    fake = FakeTransformer(context=700, chunk=data.draw(st.integers(4, 64)), segments=data.draw(st.integers(1, 12)))
    engine, chats = Engine(fake), [[1, 10 + i] for i in range(10)]
    running = []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["begin", "begin", "step", "step", "abort", "edit", "long", "pull"]))
        which = data.draw(st.integers(0, 9))
        if action == "begin":
            params = SamplingParams(temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=which)
            running.append((list(chats[which]), params, engine.generate(chats[which], params, 5)))
        elif action == "step" and running:
            engine.step([one for _, _, one in running])
        elif action == "abort" and running:
            running.pop(data.draw(st.integers(0, len(running) - 1)))
        elif action == "edit":
            del chats[which][data.draw(st.integers(1, len(chats[which]))):]
            chats[which] += data.draw(st.lists(st.integers(3, 6), min_size=1, max_size=4))
        elif action == "long":
            chats[which] += [which + 5] * 150
            del chats[which][650:]
        elif action == "pull" and running:
            next(running[-1][2], None)
        for prompt, params, one in [entry for entry in running if entry[2].done and entry[2].finish_reason is None]:
            check_fresh(prompt, params, one)
        running = [entry for entry in running if not entry[2].done]
    for prompt, params, one in running:
        check_fresh(prompt, params, one)


def check_fresh(prompt, params, generation):
    given, rest = generation.usage.new_tokens, list(generation)
    fresh = list(Engine(FakeTransformer(context=700, chunk=64)).generate(prompt, params, 5))
    assert fresh[given:] == rest


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
