"""Sessions over a disk that fails: whatever is left, what is found of it was written there and is a prefix."""

from __future__ import annotations

import random

import pytest

from edgemistral.errors import BadSession
from edgemistral.runtime.segments import SegmentPool
from edgemistral.runtime.session import FileSequence, SessionFailed
from tests.crash import Recorder
from tests.stored import CONFIG, check, compute, make, open_file, reopen


@pytest.fixture
def pool():
    pool = SegmentPool(CONFIG, budget=1 << 30)
    yield pool
    pool.close()


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
    assert file.cut_back == f"{path}: continues from 320 of 600 tokens: the rest is damaged or was never written"
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
