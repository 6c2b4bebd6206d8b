"""Read-ahead: nothing without a shortage, each streamed layer in turn with one, and the same bits either way."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from edgemistral.files.blob import Blob
from edgemistral.files.layout import Recipe
from edgemistral.runtime import read_ahead
from edgemistral.runtime.memory import memory_for_files
from edgemistral.runtime.read_ahead import AHEAD, ReadAhead
from edgemistral.runtime.segments import Row, Sequence
from edgemistral.runtime.transformer import Transformer
from tests import blobs

needs_advice = pytest.mark.skipif(not read_ahead.CAN_ADVISE, reason="this system takes no advice")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return blobs.write_blob(tmp_path_factory.mktemp("read_ahead") / "blob", blobs.config(n_layers=8), Recipe(4, 8))


def step(transformer, sequence, ids=(5, 6, 7)):
    return transformer.step([Row(sequence, np.array(ids, np.int32), 1)])


def test_a_step_says_in_which_layer_it_is(path):
    seen = []
    transformer = Transformer(Blob.open(path), threads=2)
    sequence = Sequence(transformer.pool)
    end = threading.Event()

    def look():
        while not end.is_set():
            seen.append(transformer._team.progress)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    for _ in range(20):
        step(transformer, sequence)
        assert transformer._team.progress == 8          # the head
    end.set()
    looking.join()
    steps = "".join(map(str, seen)).strip("08").split("8")
    assert all("".join(sorted(layers)) == layers for layers in steps) and set(seen) <= set(range(9))
    transformer.close()


@needs_advice
@pytest.mark.parametrize(("missing", "streamed"), [(-1, []), (1, [2, 5, 7]), (2, [1, 3, 5, 7]), (100, [*range(8)])])
def test_as_many_layers_are_streamed_as_the_memory_is_short_of(path, missing, streamed):
    with Blob.open(path) as blob:
        sizes = [size for _, size in ReadAhead(blob, lambda: 0)._pieces]
        needed = blob.data.nbytes - blob.tensors["tok_embeddings"].n_bytes + 1000
        chosen = ReadAhead(blob, lambda: 0, lambda: int((needed - (missing - 0.5) * max(sizes)) / read_ahead.FULL))
        chosen.begin(1000)
        assert chosen.streamed == streamed
        chosen.close()
        unknown = ReadAhead(blob, lambda: 0, lambda: None)
        unknown.begin(1000)
        assert unknown.streamed == []


@needs_advice
def test_layers_are_let_go_behind_a_step_and_asked_for_before_it_comes(path):
    with Blob.open(path) as blob:
        ahead, told = ReadAhead(blob, lambda: 0), []
        ahead._let_go, ahead._ask_for = (lambda layer: told.append(-layer)), told.append
        ahead.streamed, ahead._file = [1, 3, 5, 7], 0
        for layer in (0, 1, 1, 2, 5, 8):
            ahead._advise(layer)
        assert told == [-1, 5, -3, 7, -5, 1, -7, 3]
        told.clear()
        for layer in (0, 4, 4, 7, 0, 2):                          # the head of this step was never seen
            ahead._advise(layer)
        assert told == [-1, 5, -3, 7, -5, 1, -7, 3, -1, 5]
        ahead._file = -1
    assert AHEAD == 2


@needs_advice
@pytest.mark.parametrize("threads", [1, 2])
def test_advice_changes_no_bit(path, threads, monkeypatch):
    monkeypatch.setattr(read_ahead, "LOOK", 0.0)
    plain, short = (Transformer(Blob.open(path), threads=threads) for _ in range(2))
    short._read_ahead._room = lambda: 1
    one, two = Sequence(plain.pool), Sequence(short.pool)
    for n in range(20):
        assert (step(plain, one, [5 + n]) == step(short, two, [5 + n])).all()
        time.sleep(0.001)
    assert short._read_ahead.streamed == [*range(8)] and not plain._read_ahead.streamed
    plain.close()
    short.close()
    short._read_ahead._thread.join(5)
    assert not short._read_ahead._thread.is_alive()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_memory_for_files_is_what_machine_and_groups_leave(tmp_path):
    assert memory_for_files(tmp_path) is None
    write(tmp_path / "proc/meminfo", "MemTotal: 100 kB\nMemAvailable:   60 kB\n")
    write(tmp_path / "proc/self/cgroup", "4:memory:/a/b\n0::/\n")
    assert memory_for_files(tmp_path) == 60 << 10
    inner = tmp_path / "sys/fs/cgroup/memory/a/b"
    for folder, limit in ((inner, 40_000), (inner.parent, 90_000)):
        write(folder / "memory.limit_in_bytes", str(limit))
        write(folder / "memory.usage_in_bytes", "30000")
        write(folder / "memory.stat", "active_file 1\ntotal_active_file 5000\ntotal_inactive_file 4000\n")
    assert memory_for_files(tmp_path) == 40_000 - 30_000 + 9000
    write(tmp_path / "proc/self/cgroup", "0::/c/d\n")
    inner = tmp_path / "sys/fs/cgroup/c/d"
    for folder, limit in ((inner, "max"), (inner.parent, "20000")):
        write(folder / "memory.max", limit + "\n")
        write(folder / "memory.current", "15000\n")
        write(folder / "memory.stat", "anon 7\nactive_file 2000\ninactive_file 1000\n")
    assert memory_for_files(tmp_path) == 20_000 - 15_000 + 3000
