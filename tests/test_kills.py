"""kill -9 at random moments of a process that talks: its session and its store hold what a fresh model computes, or less."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import edgemistral
from edgemistral.demo import demo_model
from edgemistral.files import records
from edgemistral.files.blob import Blob
from edgemistral.runtime.session import geometry_of
from edgemistral.session import binding_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a killed process is another thing there")

# It says with one byte each what it does: p reads a prompt, d decodes, g makes the session's file grow, w writes to the store.
CHILD = """if True:
    import itertools, os, sys, time
    import edgemistral
    from edgemistral.demo import demo_model
    from edgemistral.files.disk import Disk
    from edgemistral.files.kv_store import KVStore
    path, store, start = sys.argv[1], sys.argv[2], int(sys.argv[3])
    topics = ["Rome", "winter", "museums", "food", "trains", "beaches", "Berlin", "mountains"]

    def saying(letter, function):
        def said(*arguments):
            os.write(1, letter)
            time.sleep(0.03)                   # so that it is met now and then
            result = function(*arguments)
            os.write(1, b"d")
            return result
        return said

    with edgemistral.load(demo_model(), threads=1, kv_store=store) as model, model.session(path) as session:
        model.engine.prefill([1])              # loads the kernels
        os.posix_fallocate = saying(b"g", os.posix_fallocate)
        KVStore.put = saying(b"w", KVStore.put)
        os.write(1, b"r")
        for n in itertools.count(start):
            if session.tokens > 640:           # the longest message and answer still fit the context of 1024
                session.clear()
            text = f"Tell me about {topics[n % 8]}. " * (1 + n % 30)
            os.write(1, b"p")
            for piece in model.chat([*session.messages, {"role": "user", "content": text}], 60, temperature=0, session=session):
                os.write(1, b"d")
"""


@pytest.fixture(scope="module")
def model():
    with edgemistral.load(demo_model(), threads=1) as model:
        yield model


def blocks_of(segment, layout, full):
    """The first blocks of every layer and head."""
    shape = (layout.n_layers * layout.n_kv_heads, 4, layout.block_bytes)
    return segment.data[: int(np.prod(shape))].reshape(shape)[:, :full]


def check_session(model, path):
    """It holds what a fresh model computes of its ids, and goes on with that model's tokens; returns how many ids."""
    with model.session(path) as session:
        ids = session.ids.tolist()
        if not ids:
            return 0
        model.logits(ids)                                            # computes all of them anew
        fresh, layout = model.engine._kept.newest, model.engine._open().pool.layout
        for mine, theirs, start in zip(session.sequence.segments, fresh.segments, range(0, len(ids), 256), strict=True):
            full = min(4, (len(ids) - start) // 64)
            assert (blocks_of(mine, layout, full) == blocks_of(theirs, layout, full)).all(), start
        prompt = [*ids, *model.tokenizer.encode("and"), 5]
        going_on = model.generate(prompt, 5, temperature=0, session=session)
        tokens = list(going_on)
        assert going_on.usage.cached_tokens >= len(ids)
        last = model.logits([*prompt, *tokens])[len(prompt) - 1 :]
        assert tokens == [int(row.argmax()) for row in last[: len(tokens)]]
        return len(ids)


def check_store(model, folder, known):
    """Every file that has its name is whole, and holds what a fresh model computes; `known` were seen to."""
    with Blob.open(demo_model()) as blob:
        root = records.root_of(binding_of(blob, 8))
    pool = model.engine._open().pool
    geometry, found = geometry_of(pool), {}
    for path in (folder / root.hex()).glob("*.kv"):
        data = np.fromfile(path, np.uint8)
        record = records.decode(data[-records.TRAILER :].tobytes())
        assert record is not None and records.intact(record, data, geometry) == 256
        assert records.chain_of(record.parent, record.ids).hex() == path.stem
        found[path.stem] = record, data
    for name in found.keys() - known:
        record, data = found[name]
        ids, chain = record.ids.tolist(), record.parent
        while chain != root:                                         # what it continues is there too
            before, _ = found[chain.hex()]
            ids, chain = [*before.ids.tolist(), *ids], before.parent
        model.logits(ids)
        fresh = model.engine._kept.newest.segments[record.number].data[: geometry.data_bytes]
        assert (data[: geometry.data_bytes] == fresh).all()
    known.update(found)          # `|=` would make a new set here


def kill_and_check(folder, model, kills, seed):
    """Tokens that each kill left, and what the process did when it was killed."""
    path, chance, lengths, moments = folder / "a.session", random.Random(seed), [], Counter()
    stored: set[str] = set()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    for n in range(kills):
        command = [sys.executable, "-c", CHILD, str(path), str(folder / "store"), str(chance.randrange(1000))]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, bufsize=0) as process:
            letter, before, said = (b"p", b"d", b"g", b"w")[n % 4], chance.randrange(150), b""
            # Whatever the speed of this machine; what has all been stored is not written again, so not for ever.
            while len(said) <= before or (said[-1:] != letter and len(said) < before + 1000):
                said += (byte := process.stdout.read(1))
                assert byte, said
            time.sleep(chance.uniform(0, 0.04))
            process.kill()
            moments[(said + process.stdout.read())[-1:]] += 1
        lengths.append(check_session(model, path))
        check_store(model, folder / "store", stored)
    return lengths, moments, stored


def test_a_killed_process_leaves_a_valid_session_and_store(tmp_path, model):
    lengths, _, _ = kill_and_check(tmp_path, model, 5, 1)
    assert max(lengths) > 0


@pytest.mark.slow
def test_a_hundred_kills_leave_valid_sessions_and_stores(tmp_path, model):
    moments: Counter[bytes] = Counter()
    for seed in range(2, 6):
        (tmp_path / str(seed)).mkdir()
        lengths, met, stored = kill_and_check(tmp_path / str(seed), model, 25, seed)
        assert len(set(lengths)) > 8 and stored
        moments += met
    assert all(moments[letter] for letter in (b"p", b"d", b"g", b"w")), moments
