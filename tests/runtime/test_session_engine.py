"""The engine over sessions: what it finds, shares, gives up and leaves on the disk."""

from __future__ import annotations

import pytest

from edgemistral.files.session import SessionFile
from edgemistral.files.session_header import read_header
from edgemistral.runtime.segments import SegmentPool
from edgemistral.runtime.session import SessionFailed
from tests.stored import CONFIG, GREEDY, check, engine_of, pinned, reopen


def test_a_restart_computes_what_is_new_only(tmp_path):
    path, prompt = tmp_path / "a.session", [1, *[9] * 600]
    engine, _ = engine_of()
    home = pinned(engine, path)
    prompt += list(engine.generate(prompt, GREEDY, 20, home=home))
    engine.close()
    engine, fake = engine_of()
    home = pinned(engine, path)
    again = engine.generate([*prompt, 2, 30, 31], GREEDY, 5, home=home)
    tokens = list(again)
    assert again.usage.cached_tokens == len(prompt) - 1       # the last token of an answer has never been fed
    assert fake.calls[0] == [prompt[-1], 2, 30, 31]
    assert tokens == list(engine_of()[0].generate([*prompt, 2, 30, 31], GREEDY, 5))
    engine.close()


def test_others_fork_a_session_and_keep_what_they_share_when_it_is_cut_or_closed(tmp_path):
    engine, _ = engine_of()
    home, prompt = pinned(engine, tmp_path / "a.session"), [1, *[9] * 700]
    list(engine.generate(prompt, GREEDY, 3, home=home))
    other = engine.generate([*prompt[:650], 40], GREEDY, 200)
    assert other.home is None and len([next(other) for _ in range(50)]) == 50
    assert other.usage.cached_tokens == 650 and other.sequence is not home
    assert other.sequence.addresses[0] == home.addresses[0]
    list(engine.generate([1, 50, 51], GREEDY, 300, home=home))      # the session goes another way
    assert home.ids.tolist()[:3] == [1, 50, 51]
    assert other.sequence.addresses[0] != home.addresses[0]
    third = engine.generate([*home.ids.tolist(), 60], GREEDY, 3)
    list(third)
    engine.unpin(home)
    for _ in range(100):
        next(other)                                                  # whose content is checked in every step
    list(engine.generate([*third.history[:290].tolist(), 61], GREEDY, 3))
    engine.close()


def test_a_session_takes_over_what_another_conversation_computed(tmp_path):
    engine, fake = engine_of()
    prompt = [1, *[9] * 700]
    engine.prefill(prompt)
    home = pinned(engine, tmp_path / "a.session")
    fake.steps.clear()
    taken = engine.generate([*prompt, 10, 11], GREEDY, 1, home=home)
    list(taken)
    assert fake.calls == [[10, 11]] and taken.usage.cached_tokens == 701
    engine.close()
    pool = SegmentPool(CONFIG)
    sequence, _ = reopen(tmp_path / "a.session", pool)
    assert sequence.ids.tolist() == [*prompt, 10, 11]
    check(sequence)
    sequence.close()
    pool.close()


def test_a_session_is_never_evicted_and_two_generations_take_turns_on_it(tmp_path):
    engine, _ = engine_of(segments=4)
    home, prompt = pinned(engine, tmp_path / "a.session"), [1, *[9] * 500]
    list(engine.generate(prompt, GREEDY, 2, home=home))
    for start in range(10, 16):
        engine.prefill([1, start, *[start] * 400])
    assert home.length >= 502
    twin = engine_of()[0]
    one, two = (engine.generate([*prompt, start], GREEDY, 8, home=home) for start in (20, 21))
    while not (one.done and two.done):
        engine.step([task for task in (one, two) if not task.done])
    assert list(one) == list(twin.generate([*prompt, 20], GREEDY, 8))
    assert list(two) == list(twin.generate([*prompt, 21], GREEDY, 8))
    three, four = (engine.generate([*prompt, start], GREEDY, 8, home=home) for start in (22, 23))
    mixed = [(next(three), next(four)) for _ in range(8)]           # one that is left alone loses it, and goes on all the same
    assert [a for a, _ in mixed] == list(twin.generate([*prompt, 22], GREEDY, 8))
    assert [b for _, b in mixed] == list(twin.generate([*prompt, 23], GREEDY, 8))
    engine.close()


def test_a_session_that_cannot_grow_stops_its_own_generation_only(tmp_path, monkeypatch):
    engine, _ = engine_of()
    home = pinned(engine, tmp_path / "a.session")
    here = engine.generate([1, *[9] * 250], GREEDY, 40, home=home)
    there = engine.generate([1, 50], GREEDY, 40)

    def full(size):
        raise OSError(28, "No space left on device")

    engine.step([here, there])
    while here.pending > 1 or here.length == 251:
        engine.step([here, there])
    monkeypatch.setattr(home._file.disk, "grow", full)
    while not there.done:
        engine.step([task for task in (here, there) if not task.done and task.error is None])
    assert len(list(there)) == 40
    with pytest.raises(SessionFailed, match="No space left"):
        list(here)
    engine.close()
    pool = SegmentPool(CONFIG)
    sequence, file = reopen(tmp_path / "a.session", pool)
    assert sequence.length == 256 and not file.cut_back
    sequence.close()
    pool.close()


def test_a_session_of_a_closed_engine_is_on_the_disk(tmp_path):
    engine, _ = engine_of()
    home = pinned(engine, tmp_path / "a.session")
    generation = engine.generate([1, *[9] * 100], GREEDY, 40, home=home)
    next(generation)
    engine.close()
    found = SessionFile.inspect(tmp_path / "a.session")
    assert len(found.ids) == 101 and not found.cut_back
    assert read_header(found.disk).model == "tiny"
    found.close()
