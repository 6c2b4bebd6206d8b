"""Sessions over a disk that fails: whatever is left, what is found of it was written there and is a prefix."""

from __future__ import annotations

import random

import numpy as np
import pytest

from edgemistral.errors import BadSession
from edgemistral.files.session import SessionFile
from edgemistral.files.session_header import read_header
from edgemistral.generate.engine import Engine
from edgemistral.generate.sampler import SamplingParams
from edgemistral.runtime.segments import SegmentPool
from edgemistral.runtime.session import FileSequence, SessionFailed, geometry_of
from tests.crash import Recorder, content
from tests.fake import FakeTransformer, tiny_config

BINDING = {"blob": "b" * 64, "tokenizer": "t", "template": "", "kv_bits": 8, "kv_version": 1}
CONFIG = tiny_config(context=2048)
GREEDY = SamplingParams(temperature=0)
POSITION = 72        # bytes of a position in a block of the tiny model


def open_file(path, pool, **changes):
    return SessionFile.open(path, {**BINDING, **changes}, geometry_of(pool), CONFIG.context, "tiny")


def blocks(sequence, position):
    """The bytes of a position, as a view: where its segment begins, and (start, end) in it."""
    segment = sequence.segments[position // 256]
    within = position % 256
    start = within // 64 * sequence.pool.layout.block_bytes + within % 64 * POSITION
    return segment, start, start + POSITION


def compute(sequence, ids, recorder=None):
    """Append ids as a step does: room, then keys and values, then the count."""
    sequence.reserve(sequence.length + len(ids))
    history = [*sequence.ids.tolist(), *ids]
    for position in range(sequence.length, len(history)):
        segment, start, end = blocks(sequence, position)
        segment.data[start:end] = content(history[: position + 1], POSITION)
        if recorder is not None:
            recorder.store(segment.mapping, start, segment.data[start:end])
    sequence.append(np.array(ids, np.int32))


def check(sequence):
    """What is found stands for its own ids."""
    ids = sequence.ids.tolist()
    for position in [*range(0, len(ids), 17), *range(max(0, len(ids) - 66), len(ids))]:
        segment, start, end = blocks(sequence, position)
        assert (segment.data[start:end] == content(ids[: position + 1], POSITION)).all(), position


@pytest.fixture
def pool():
    pool = SegmentPool(CONFIG, budget=1 << 30)
    yield pool
    pool.close()


def make(path, pool, ids, notes=""):
    """A closed session of these ids."""
    sequence = FileSequence(pool, open_file(path, pool))
    compute(sequence, ids)
    sequence.save(notes)
    sequence.close()


def reopen(path, pool):
    file = open_file(path, pool)
    return FileSequence(pool, file), file


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 255, 256, 257, 512, 600])
def test_a_session_goes_on_where_it_ended(tmp_path, pool, length):
    path = tmp_path / "a.session"
    make(path, pool, range(3, 3 + length), "notes")
    sequence, file = reopen(path, pool)
    assert sequence.ids.tolist() == list(range(3, 3 + length)) and file.notes == "notes" and file.cut_back == ""
    check(sequence)
    compute(sequence, [7] * 300)
    sequence.save()
    sequence.close()
    sequence, _ = reopen(path, pool)
    assert sequence.length == length + 300
    check(sequence)
    sequence.close()
    assert path.stat().st_mode & 0o777 == 0o600 and pool.used == 0


def run_of_actions(sequence, chance, recorder):
    """Grow, save and cut at random. Every version of the ids, and for each event the number of positions that must be there."""
    versions, promises = [[]], []

    def note(promised):
        promises.append((len(recorder.events), promised))

    note(0)
    for _ in range(chance.randint(2, 7)):
        action = chance.choice(["grow", "grow", "grow", "save", "save", "cut"])
        if action == "grow":
            first = True
            for _ in range(chance.choice([1, 5, 70, 300])):
                if first:                                # the partial block of a save may be torn from here on
                    note(promises[-1][1] // 64 * 64)
                    first = False
                compute(sequence, [chance.randint(3, 5)], recorder)
            versions.append(sequence.ids.tolist())
        elif action == "save":
            sequence.save(str(sequence.length))
            note(sequence.length)
        else:
            length = chance.randint(0, sequence.length)
            note(min(promises[-1][1], length) // 64 * 64)
            sequence.cut(length)
            versions.append(sequence.ids.tolist())
    return versions, promises


def check_crashes(tmp_path, pool, seed, crashes):
    chance, path = random.Random(seed), tmp_path / "a.session"
    file = open_file(path, pool)
    file.disk = recorder = Recorder(file.disk)
    sequence = FileSequence(pool, file)
    versions, promises = run_of_actions(sequence, chance, recorder)
    sequence.close()
    for n in range(crashes):
        at = chance.randint(0, len(recorder.events))
        left = tmp_path / f"{n}.session"
        left.write_bytes(recorder.image(at, chance))
        found, file = reopen(left, pool)
        ids = found.ids.tolist()
        assert any(version[: len(ids)] == ids for version in versions), at
        promised = [positions for event, positions in promises if event <= at][-1]
        assert len(ids) >= promised, at
        check(found)
        compute(found, [9] * 70)                          # and it goes on from there
        found.save()
        found.close()
        found, file = reopen(left, pool)
        assert found.ids.tolist() == [*ids, *[9] * 70] and not file.cut_back
        check(found)
        found.close()
        left.unlink()


@pytest.mark.parametrize("seed", range(12))
def test_a_power_cut_at_any_moment_leaves_a_valid_prefix(tmp_path, pool, seed):
    check_crashes(tmp_path, pool, seed, 12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_power_cuts_leave_valid_prefixes(tmp_path, pool, seed):
    check_crashes(tmp_path, pool, seed, 60)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


def test_any_flipped_bit_is_found_or_does_not_matter(tmp_path, pool):
    path, chance = tmp_path / "a.session", random.Random(5)
    ids = [chance.randint(3, 200) for _ in range(600)]
    make(path, pool, ids, "notes")
    whole, file = path.read_bytes(), open_file(path, pool)
    start, stride, block = file.header.start, file.geometry.stride, pool.layout.block_bytes
    file.close()
    spots = [*range(0, 300, 7), *(start + n * stride + m * block + 11 for n in range(3) for m in range(4)),
             *(start + (n + 1) * stride - 2048 + chance.randrange(1176) for n in range(3) for _ in range(6)),
             *((1 << 16) * (1 + n) + chance.randrange(1250) for n in (0, 1) for _ in range(12)),
             *(chance.randrange(len(whole)) for _ in range(60))]
    for at in spots:
        path.write_bytes(whole)
        flip(path, at)
        try:
            sequence, file = reopen(path, pool)
        except BadSession as problem:
            assert at < 1 << 16 and str(path) in str(problem) and "\n" not in str(problem)
            continue
        found = sequence.ids.tolist()
        assert found == ids[: len(found)] and (len(found) == len(ids) or file.cut_back)
        check(sequence)
        sequence.close()


def test_a_damaged_segment_cuts_back_to_its_last_good_block(tmp_path, pool):
    path = tmp_path / "a.session"
    make(path, pool, range(3, 603))
    file = open_file(path, pool)
    at = file.header.start + file.geometry.stride + pool.layout.block_bytes + 5      # segment 1, block 1
    file.close()
    flip(path, at)
    sequence, file = reopen(path, pool)
    assert sequence.length == 256 + 64
    assert file.cut_back == f"{path}: goes on from 320 of 600 tokens: the rest is damaged or was never written"
    check(sequence)
    sequence.close()
    sequence, file = reopen(path, pool)
    assert sequence.length == 320
    sequence.close()


@pytest.mark.parametrize("size", [0.2, 0.5, 0.7, 0.9, 0.99])
def test_a_truncated_file_is_cut_back(tmp_path, pool, size):
    path = tmp_path / "a.session"
    make(path, pool, range(3, 603))
    data = path.read_bytes()
    path.write_bytes(data[: int(size * len(data))])
    sequence, file = reopen(path, pool)
    assert "of 600 tokens" in file.cut_back or sequence.length == 0
    assert sequence.length % 64 == 0 and file.cut_back.startswith(str(path))
    check(sequence)
    sequence.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blob": "c" * 64}, "is of another model, tiny"),
        ({"tokenizer": "u"}, "the tokenizers differ"),
        ({"template": "x"}, "the chat templates differ"),
        ({"kv_bits": 16}, "holds keys and values of 8 bits; this model runs with --kv-bits 16"),
        ({"kv_version": 2}, r"in a format of another edgemistral \(1; this one has 2\)"),
        ({"more": 1}, "is of a model of another shape"),
    ],
)
def test_a_foreign_session_is_refused_and_left_as_it_is(tmp_path, pool, change, message):
    path = tmp_path / "a.session"
    make(path, pool, range(3, 103))
    before = path.read_bytes()
    with pytest.raises(BadSession, match=f"^{path}: .*{message}"):
        open_file(path, pool, **change)
    assert path.read_bytes() == before
    sequence, _ = reopen(path, pool)           # and nothing of it stays locked
    sequence.close()


@pytest.mark.parametrize("content", [b"x", b"no session at all" * 1000, b"edgemistral session\n"])
def test_another_file_is_refused_and_left_as_it_is(tmp_path, pool, content):
    path = tmp_path / "a.session"
    path.write_bytes(content)
    with pytest.raises(BadSession, match="not a session file"):
        open_file(path, pool)
    assert path.read_bytes() == content


def test_a_newer_format_and_a_damaged_header_are_refused(tmp_path, pool):
    path = tmp_path / "a.session"
    make(path, pool, range(3, 103))
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + b"\2" + whole[21:])
    with pytest.raises(BadSession, match="has session format 2, and this edgemistral reads format 1"):
        open_file(path, pool)
    path.write_bytes(whole[:40] + b"#" + whole[41:])
    with pytest.raises(BadSession, match="its header is damaged"):
        open_file(path, pool)


def test_what_cannot_be_opened_says_why(tmp_path, pool):
    (tmp_path / "folder").mkdir()
    for path, message in ((tmp_path / "folder", "directory"), (tmp_path / "no" / "a.session", "cannot be made: No such")):
        with pytest.raises(BadSession, match=message):
            open_file(path, pool)
    file = open_file(tmp_path / "a.session", pool)
    with pytest.raises(BadSession, match="is in use by another program, or open already"):
        open_file(tmp_path / "a.session", pool)
    file.close()
    open_file(tmp_path / "a.session", pool).close()


def test_an_empty_file_becomes_a_session(tmp_path, pool):
    path = tmp_path / "a.session"
    path.touch(0o644)
    open_file(path, pool).close()
    assert path.stat().st_mode & 0o777 == 0o600
    sequence, _ = reopen(path, pool)
    sequence.close()


def test_a_full_disk_leaves_the_session_valid(tmp_path, pool, monkeypatch):
    path = tmp_path / "a.session"
    sequence = FileSequence(pool, open_file(path, pool))
    compute(sequence, [5] * 500)
    sequence.save()

    def full(file, offset, size):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(SessionFailed, match=f"^{path}: cannot be written: No space left on device; it keeps"):
            compute(sequence, [5] * 100)
    assert sequence.length == 500
    sequence.save()
    sequence.close()
    sequence, _ = reopen(path, pool)
    assert sequence.length == 500
    check(sequence)
    compute(sequence, [5] * 100)
    sequence.close()


def test_a_cut_conversation_does_not_come_back(tmp_path, pool):
    path = tmp_path / "a.session"
    make(path, pool, [5] * 700)
    sequence, _ = reopen(path, pool)
    sequence.cut(300)
    compute(sequence, [5] * 300)                # the same as before: old records would continue it
    sequence.save()
    sequence.close()
    sequence, file = reopen(path, pool)
    assert sequence.length == 600 and not file.cut_back
    sequence.close()


# ---- the engine -------------------------------------------------------------------------------------------------------

class StoringTransformer(FakeTransformer):
    """Puts what stands for keys and values into the segments, and checks that what it continues is still there."""

    def step(self, rows):
        before = [row.sequence.ids.tolist() for row in rows]
        for row in rows:
            check(row.sequence)
        logits = super().step(rows)
        for row, ids in zip(rows, before, strict=True):
            history = [*ids, *row.ids.tolist()]
            for position in range(len(ids), len(history)):
                segment, start, end = blocks(row.sequence, position)
                segment.data[start:end] = content(history[: position + 1], POSITION)
        return logits


def engine_of(segments=64):
    fake = StoringTransformer(CONFIG, chunk=64, segments=segments)
    engine = Engine(fake)
    engine.end_ids = frozenset()
    return engine, fake


def pinned(engine, path):
    return engine.pin(lambda pool: FileSequence(pool, open_file(path, pool)))


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
