"""The KV store: any prompt finds its longest stored prefix, nothing wrong is ever found, and the quota holds."""

from __future__ import annotations

import os
import random
import threading

import numpy as np
import pytest

import edgemistral
from edgemistral.demo import demo_model
from edgemistral.errors import BadInput, BadRequest
from edgemistral.files import records
from edgemistral.files.kv_store import KVStore
from edgemistral.generate.engine import Engine
from edgemistral.generate.sampler import SamplingParams
from edgemistral.runtime.segments import SegmentPool
from edgemistral.runtime.session import geometry_of
from tests.stored import CONFIG, StoringTransformer, pinned

GREEDY = SamplingParams(temperature=0)
ROOT = records.root_of({"blob": "x"})
STRIDE = 1 << 16


def engine_of(folder, quota=1 << 30, root=ROOT, segments=64):
    fake = StoringTransformer(CONFIG, chunk=64, segments=segments)
    engine = Engine(fake)
    engine.end_ids = frozenset()
    engine.use_store(KVStore(folder, root, geometry_of(fake.pool), quota))
    return engine, fake


def cached(engine, prompt, n=1):
    generation = engine.generate(prompt, GREEDY, n)
    tokens = list(generation)
    return generation.usage.cached_tokens, tokens


def prompt(length, *changes):
    ids = [1, *(3 + n % 50 for n in range(length - 1))]
    for at in changes:
        ids[at] = 290
    return ids


def files(folder):
    return sorted(path.name for path in folder.rglob("*.kv"))


def test_after_a_restart_any_prompt_finds_its_longest_stored_prefix(tmp_path):
    engine, _ = engine_of(tmp_path)
    _, tokens = cached(engine, prompt(1000), 60)
    engine.close()
    assert len(files(tmp_path)) == 4                       # the answer makes the fourth full
    engine, fake = engine_of(tmp_path)
    assert cached(engine, prompt(1000), 60) == (768, tokens)
    assert cached(engine, prompt(900, 600))[0] == 600      # which the first one has in memory now
    engine.close()
    engine, fake = engine_of(tmp_path)
    assert cached(engine, prompt(900, 700))[0] == 512
    assert cached(engine, prompt(900, 10))[0] == 10
    assert cached(engine, [*prompt(1000), *tokens, 2, 5])[0] == 1024
    assert fake.pool.used <= 64
    engine.close()


def test_the_store_is_for_its_owner_and_one_model_only(tmp_path):
    engine, _ = engine_of(tmp_path / "store")
    cached(engine, prompt(600))
    engine.close()
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "store").rglob("*"))
    other, _ = engine_of(tmp_path / "store", root=records.root_of({"blob": "y"}))
    assert cached(other, prompt(600))[0] == 0
    other.close()


def test_nothing_is_written_twice(tmp_path):
    engine, _ = engine_of(tmp_path)
    cached(engine, prompt(600))
    engine.close()
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*.kv")}
    for _ in range(2):
        engine, _ = engine_of(tmp_path)
        cached(engine, [*prompt(600), 7], 100)
        engine.close()
    assert {path: path.stat().st_ino for path in before} == before and len(files(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["flip", "record", "truncate", "empty", "other"])
def test_a_damaged_file_is_never_used_and_made_anew(tmp_path, damage):
    engine, fake = engine_of(tmp_path)
    _, tokens = cached(engine, prompt(900), 5)
    engine.close()
    store = KVStore(tmp_path, ROOT, geometry_of(fake.pool), 1 << 30)
    chain = records.chain_of(ROOT, np.array(prompt(900)[:256], np.int32))
    path = store._path(records.chain_of(chain, np.array(prompt(900)[256:512], np.int32)))
    data = bytearray(path.read_bytes())
    if damage == "other":
        data = bytearray(store._path(chain).read_bytes())
    elif damage in ("flip", "record"):
        data[5000 if damage == "flip" else -1500] ^= 1
    else:
        data = data[: len(data) // 2] if damage == "truncate" else bytearray()
    path.write_bytes(data)
    engine, _ = engine_of(tmp_path)
    assert len(files(tmp_path)) == 3                       # starting deletes nothing
    assert cached(engine, prompt(900), 5) == (256, tokens)
    engine.close()
    assert len(files(tmp_path)) == 3
    engine, _ = engine_of(tmp_path)
    assert cached(engine, prompt(900), 5) == (768, tokens)
    engine.close()


def test_the_quota_holds_and_beginnings_outlive_ends(tmp_path):
    quota = 6 * STRIDE
    engine, _ = engine_of(tmp_path, quota)
    cached(engine, prompt(600))                            # two segments
    cached(engine, prompt(1400, 300))                      # five, of which one is shared: one of the others has to go
    engine.close()
    assert len(files(tmp_path)) == 6
    engine, _ = engine_of(tmp_path, quota)                 # after a restart, too
    cached(engine, prompt(1100, 20))
    engine.close()
    assert len(files(tmp_path)) <= 6
    engine, _ = engine_of(tmp_path, quota)
    assert cached(engine, prompt(1100, 20))[0] == 1024
    assert cached(engine, prompt(1400, 300))[0] >= 256     # its beginning is there yet
    engine.close()
    engine, _ = engine_of(tmp_path, 3 * STRIDE)            # a smaller one counts from the next file on
    cached(engine, prompt(1400, 5))
    engine.close()
    assert len(files(tmp_path)) == 3
    engine, _ = engine_of(tmp_path, 3 * STRIDE)
    assert cached(engine, prompt(1400, 5))[0] == 768
    engine.close()
    engine, _ = engine_of(tmp_path / "none", STRIDE - 1)
    assert cached(engine, prompt(600))[0] == 0
    engine.close()
    assert files(tmp_path / "none") == []


def test_what_is_used_stays_and_other_models_count(tmp_path):
    quota = 4 * STRIDE
    first, _ = engine_of(tmp_path, quota, root=records.root_of({"blob": "y"}))
    cached(first, prompt(600))
    first.close()
    engine, _ = engine_of(tmp_path, quota)
    cached(engine, prompt(600, 3))
    engine.close()
    for path in tmp_path.rglob("*.kv"):
        os.utime(path, (1, 1))
    first, _ = engine_of(tmp_path, quota, root=records.root_of({"blob": "y"}))
    assert cached(first, prompt(600))[0] == 512
    first.close()
    engine, _ = engine_of(tmp_path, quota)
    cached(engine, prompt(600, 4))
    engine.close()
    first, _ = engine_of(tmp_path, quota, root=records.root_of({"blob": "y"}))
    assert cached(first, prompt(600))[0] == 512 and len(files(tmp_path)) == 4
    first.close()


def test_a_session_gives_to_the_store_and_takes_from_it(tmp_path):
    engine, _ = engine_of(tmp_path / "store")
    home = pinned(engine, tmp_path / "a.session")
    list(engine.generate(prompt(800), GREEDY, 2, home=home))
    list(engine.generate([1, 50, 51], GREEDY, 300, home=home))       # which writes over its file
    engine.close()
    engine, _ = engine_of(tmp_path / "store")
    home = pinned(engine, tmp_path / "b.session")
    taken = engine.generate(prompt(900), GREEDY, 2, home=home)
    list(taken)
    assert taken.usage.cached_tokens == 768 and taken.sequence is home
    assert engine.generate(prompt(900), GREEDY, 2, home=home)
    engine.close()


def test_evictions_edits_and_the_store_change_no_token(tmp_path):
    chance = random.Random(3)
    twin, _ = engine_of(tmp_path / "unused", 1)
    engine, _ = engine_of(tmp_path / "store", 9 * STRIDE, segments=9)
    for round_ in range(14):
        if round_ % 5 == 4:
            engine.close()
            engine, _ = engine_of(tmp_path / "store", 9 * STRIDE, segments=9)
        ids = prompt(chance.choice([300, 520, 900]), *(chance.choice([5, 200, 270, 500, 600][: 3]) for _ in range(2)))
        assert cached(engine, ids, 3)[1] == cached(twin, ids, 3)[1]
    engine.close()
    twin.close()


def test_a_full_disk_ends_the_storing_and_nothing_else(tmp_path, monkeypatch):
    engine, _ = engine_of(tmp_path)
    monkeypatch.setattr(KVStore, "put", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert cached(engine, prompt(900), 3)[1] and threading.active_count()
    engine.close()
    assert files(tmp_path) == []


def test_what_cannot_be_a_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    pool = SegmentPool(CONFIG)
    with pytest.raises(BadInput, match="cannot be the folder of a KV store"):
        KVStore(tmp_path / "file", ROOT, geometry_of(pool), 1 << 30)
    with pytest.raises(BadRequest, match="kv_store_quota"):
        edgemistral.load(demo_model(), kv_store=tmp_path, kv_store_quota=0)
    with pytest.raises(BadInput, match="cannot be the folder"):
        edgemistral.load(demo_model(), threads=1, kv_store=tmp_path / "file")


def test_the_demo_model_finds_a_long_text_again(tmp_path):
    text, answers = "Tell me about Paris, please. " * 90, []
    for turn in range(2):
        with edgemistral.load(demo_model(), threads=1, kv_store=tmp_path) as model:
            reply = model.chat([{"role": "user", "content": text}], 20, temperature=0)
            answers.append("".join(reply))
            assert reply.usage.cached_tokens == (turn and reply.usage.prompt_tokens // 256 * 256)
    assert answers[0] == answers[1]
