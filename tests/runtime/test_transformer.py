"""The whole model: close to the float32 reference, and the same bits whatever the threads and the chunks.

Over 400 lines: one set of models and fixtures serves all of it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from edgemistral.errors import BadRequest, ContextOverflow
from edgemistral.files.blob import Blob
from edgemistral.files.layout import Recipe
from edgemistral.kernels.kv_layout import POSITIONS, SPLIT_BLOCKS
from edgemistral.runtime import transformer as module
from edgemistral.runtime.segments import KV_BITS, Row, Sequence
from edgemistral.runtime.transformer import MAX_ROWS, Transformer, workspace_bytes
from tests import blobs, naive
from tests.kernels.test_simd import LOWERINGS, settings_for
from tests.one_sequence import OneSequence

F32 = np.float32

MODELS = {
    "odd sizes": (blobs.config(), Recipe(4, 8)),
    "sliding window": (blobs.config(head_dim=64, n_heads=4, n_kv_heads=1, sliding_window=40), Recipe(8, 8)),
    "mistral heads": (blobs.config(head_dim=128, n_heads=8, n_kv_heads=2, dim=256, hidden_dim=512), Recipe(4, 4)),
    "wide heads": (blobs.config(head_dim=96, n_heads=3, n_kv_heads=3, n_layers=1, vocab_size=33, hidden_dim=320), Recipe(8, 4)),
}


@pytest.fixture(scope="module")
def blob_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    return {name: blobs.write_blob(folder / f"{name}.safetensors", *model) for name, model in MODELS.items()}


@pytest.fixture
def load(blob_paths):
    """load(name, **options) -> OneSequence, closed after the test."""
    opened = []

    def load(name="odd sizes", **options):
        opened.append(OneSequence(Blob.open(blob_paths[name]), **options))
        return opened[-1]

    yield load
    for one in opened:
        one.close()


def random_ids(n, name="odd sizes", seed=0):
    return np.random.default_rng(seed).integers(0, MODELS[name][0].vocab_size, n).astype(np.int32)


def logits_in_chunks(model, ids, sizes):
    """Append the ids in chunks of these sizes; logits of every token."""
    assert sum(sizes) == len(ids)
    return np.concatenate([model.forward(part, len(part)) for part in np.split(ids, np.cumsum(sizes)[:-1])])


GUARD, FILL = 4096, 0xA5


@pytest.fixture
def guards(monkeypatch):
    """Bytes around every array of a workspace, which must keep FILL: jitted code checks no bounds."""
    guards, workspace, logits_of = [], module._workspace, module._logits

    def guarded(n, dtype):
        size = n * np.dtype(dtype).itemsize
        data = np.full(GUARD + size + GUARD, FILL, np.uint8)
        guards.extend((data[:GUARD], data[GUARD + size :]))
        data[GUARD : GUARD + size] = 0
        return data[GUARD : GUARD + size].view(dtype)

    monkeypatch.setattr(module, "_workspace", lambda *sizes: workspace(*sizes, guarded))
    monkeypatch.setattr(module, "_logits", lambda shape, n, array=guarded: logits_of(shape, n, array))
    return guards


@pytest.fixture(scope="module")
def at_once(blob_paths):
    """at_once(name, kv_bits) -> ids (150,) and their logits by one thread in one call."""
    results = {}

    def at_once(name, kv_bits):
        if (name, kv_bits) not in results:
            model, ids = OneSequence(Blob.open(blob_paths[name]), kv_bits=kv_bits), random_ids(150, name)
            results[name, kv_bits] = ids, model.forward(ids, len(ids))
            model.close()
        return results[name, kv_bits]

    return at_once


# ---- close to float32 --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kv_bits", KV_BITS)
def test_logits_are_close_to_float32(blob_paths, at_once, name, kv_bits):
    ids, logits = at_once(name, kv_bits)
    blob = Blob.open(blob_paths[name])
    expected = naive.forward_of_blob(blob, ids)
    assert logits.shape == (len(ids), blob.config.vocab_size) and logits.dtype == F32
    assert naive.mean_kl(expected, logits) < (3e-4 if kv_bits == 4 else 1e-4)
    assert naive.top1_agreement(expected, logits) >= (0.96 if kv_bits == 4 else 0.98)
    blob.close()


# ---- the same bits -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kv_bits", KV_BITS)
@pytest.mark.parametrize(("threads", "sizes"), [
    (1, [1] * 150),
    (2, [150]),
    (3, [150]),
    (2, [1] * 150),
    (2, [2] * 75),
    (3, [64, 1, 63, 1, 1, 20]),
])
def test_threads_and_chunks_change_no_bit(load, at_once, name, kv_bits, threads, sizes):
    ids, expected = at_once(name, kv_bits)
    np.testing.assert_array_equal(logits_in_chunks(load(name, kv_bits=kv_bits, threads=threads), ids, sizes), expected)


@pytest.mark.parametrize("window", [None, 3000])
@pytest.mark.parametrize("kv_bits", KV_BITS)
def test_sharing_a_long_cache_changes_no_bit(tmp_path, monkeypatch, guards, window, kv_bits):
    """Threads share the splits of a long cache, beside a sequence that has only one; without sharing the bits are the same."""
    split, config = POSITIONS * SPLIT_BLOCKS, blobs.config(context=9000, sliding_window=window)
    blob, rng = blobs.write_blob(tmp_path / "blob", config, Recipe(4, 8)), np.random.default_rng(kv_bits)
    long, short = (rng.integers(0, config.vocab_size, n).astype(np.int32) for n in (2 * split + 40, 40))

    def logits(threads, steps, wanted=40):
        """Logits of the last 40 tokens of both, computed together in so many steps: of at most `wanted` tokens a step."""
        model = Transformer(Blob.open(blob), kv_bits=kv_bits, threads=threads)
        sequences = Sequence(model.pool), Sequence(model.pool)
        for start in range(0, 2 * split, 256):
            model.step([Row(sequences[0], long[start : start + 256], 0)])
        n, parts = 40 // steps, []
        wanted = min(wanted, n)
        for at in range(0, 40, n):
            rows = [Row(sequences[0], long[2 * split + at :][:n], wanted), Row(sequences[1], short[at:][:n], wanted)]
            parts.append(model.step(rows).reshape(2, wanted, -1).copy())
        for sequence in sequences:
            sequence.close()
        model.close()
        return np.concatenate(parts, axis=1)

    shared = logits(3, 10)
    np.testing.assert_array_equal(logits(2, 40), shared)
    np.testing.assert_array_equal(logits(2, 8, wanted=1), shared[:, 4::5])
    np.testing.assert_array_equal(logits(1, 1), shared)
    monkeypatch.setattr(module, "SPLIT_ROWS", 0)
    np.testing.assert_array_equal(logits(2, 5), shared)
    assert all((guard == FILL).all() for guard in guards)


@seed(1)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_chunks_of_any_size_change_no_bit(blob_paths, at_once, data):
    name, kv_bits = data.draw(st.sampled_from(list(MODELS))), data.draw(st.sampled_from(KV_BITS))
    ids, expected = at_once(name, kv_bits)
    cuts = sorted(data.draw(st.sets(st.integers(1, 149), max_size=12)))
    model = OneSequence(Blob.open(blob_paths[name]), kv_bits=kv_bits, threads=data.draw(st.integers(1, 3)))
    np.testing.assert_array_equal(logits_in_chunks(model, ids, np.diff([0, *cuts, 150]).tolist()), expected)
    back = model.sequence.continuable(data.draw(st.integers(0, 149)))
    model.truncate(back)
    np.testing.assert_array_equal(model.forward(ids[back:], 150 - back), expected[back:])
    model.close()


def test_more_tokens_than_a_call_takes(load):
    """Past a chunk of 256 and a segment of the KV file; only the last logits are asked for at first."""
    ids = random_ids(512)
    one, two = load(threads=1), load(threads=2)
    one.forward(ids[:256], 0)
    expected = one.forward(ids[256:], 256)
    two.forward(ids[:250], 0)
    two.forward(ids[250:300], 0)
    np.testing.assert_array_equal(two.forward(ids[300:500], 200), expected[44:244])
    two.truncate(256)
    np.testing.assert_array_equal(two.forward(ids[256:], 1), expected[-1:])


@pytest.mark.parametrize("kv_bits", KV_BITS)
def test_what_was_truncated_leaves_no_trace(load, at_once, kv_bits):
    ids, expected = at_once("odd sizes", kv_bits)
    model = load(kv_bits=kv_bits, threads=2)
    model.forward(random_ids(150, seed=1), 0)
    model.truncate(0)
    model.forward(ids[:70], 0)
    model.forward(random_ids(60, seed=2), 0)
    model.truncate(70)
    np.testing.assert_array_equal(logits_in_chunks(model, ids[70:], [5, 75]), expected[70:])


def test_a_4_bit_sequence_goes_on_from_the_beginning_of_a_block(load, at_once):
    """Where the copy of a block is gone, the block is computed anew, and that is said before anything is computed."""
    ids, expected = at_once("odd sizes", 4)
    model = load(kv_bits=4, threads=2)
    logits_in_chunks(model, ids, [100, 30, 20])
    sequence = model.sequence
    assert [sequence.continuable(length) for length in (40, 64, 127, 128, 129, 150)] == [0, 64, 64, 128, 129, 150]
    with pytest.raises(ValueError, match="cannot cut"):
        model.truncate(127)
    fork = sequence.fork(140)                                # with a copy of the copy
    np.testing.assert_array_equal(model.step([Row(fork, ids[140:], 10)]), expected[140:])
    sequence.drop_own_blocks()
    with pytest.raises(ValueError, match="whose copy is gone"):
        model.forward(ids[:1], 1)
    model.truncate(sequence.continuable(140))
    assert sequence.length == 128
    np.testing.assert_array_equal(model.forward(ids[128:], 22), expected[128:])


def test_a_copied_block_is_not_taken_for_a_shorter_one(load, at_once):
    """A sequence that takes over positions of another must forget its own copy, which lacks them."""
    ids, expected = at_once("odd sizes", 4)
    model = load(kv_bits=4, threads=2)
    model.forward(ids, 0)
    home = Sequence(model.pool)
    model.step([Row(home, ids[:70], 0)])               # a copy of block 1 with 6 positions
    home.adopt(model.sequence, 128)
    home.cut(home.continuable(100))
    assert home.length == 64
    np.testing.assert_array_equal(model.step([Row(home, ids[64:], 86)]), expected[64:])
    home.cut(0)
    assert home.continuable(30) == 0


def test_models_do_not_disturb_each_other(load, at_once):
    ids, expected = at_once("odd sizes", 8)
    one, other, parts = load(threads=2), load("mistral heads", threads=2), []
    for part in np.split(ids, 5):
        parts.append(one.forward(part, len(part)))
        other.forward(random_ids(20), 1)
    np.testing.assert_array_equal(np.concatenate(parts), expected)


# ---- calls ---------------------------------------------------------------------------------------------------------------

def test_logits_of_the_last_tokens(load, at_once):
    ids, expected = at_once("odd sizes", 8)
    model = load()
    for n_logits in (0, 1, 2, 10):
        model.truncate(0)
        logits = model.forward(ids[:10], n_logits)
        assert model.length == 10
        np.testing.assert_array_equal(logits, expected[10 - n_logits : 10])
        assert logits.shape == (n_logits, 515)


def test_integers_of_any_type_are_ids(load, at_once):
    ids, expected = at_once("odd sizes", 8)
    for dtype in (np.int64, np.uint16):
        model = load()
        np.testing.assert_array_equal(model.forward(ids.astype(dtype)[:5], 5), expected[:5])
    np.testing.assert_array_equal(load().forward(np.repeat(ids, 2)[::2][:5], 5), expected[:5])


def test_context_overflow_says_by_how_much_and_harms_nothing(load, at_once):
    ids, expected = at_once("odd sizes", 8)
    model = load(context=100)
    assert model.context == 100
    model.forward(ids[:60], 0)
    with pytest.raises(ContextOverflow, match="107 tokens are 7 more than the context of 100 holds") as caught:
        model.forward(ids[60:107], 1)
    assert (caught.value.n_tokens, caught.value.context, caught.value.over) == (107, 100, 7)
    assert model.length == 60
    np.testing.assert_array_equal(model.forward(ids[60:100], 40), expected[60:100])
    with pytest.raises(ContextOverflow):
        model.forward(ids[100:101], 1)
    model.truncate(99)
    np.testing.assert_array_equal(model.forward(ids[99:100], 1), expected[99:100])


@pytest.mark.parametrize("bad", [-1, 515, 1 << 31])
def test_ids_outside_the_vocabulary_are_refused(load, at_once, bad):
    ids, expected = at_once("odd sizes", 8)
    model = load()
    with pytest.raises(ValueError, match=r"token ids must be within 0 \.\. 514"):
        model.forward(np.array([1, bad, 2], np.int64), 1)
    assert model.length == 0
    np.testing.assert_array_equal(model.forward(ids[:3], 3), expected[:3])


@pytest.mark.parametrize(("tokens", "n_logits", "message"), [
    (0, 0, "0 tokens in a step of at most 256"), (257, 1, "257 tokens in a step of at most 256"),
    (3, 4, "3 tokens and 4 logits in a row"), (3, -1, "3 tokens and -1 logits in a row"),
])
def test_steps_of_impossible_size_are_refused(load, tokens, n_logits, message):
    model = load()
    with pytest.raises(ValueError, match=message):
        model.forward(random_ids(tokens), n_logits)
    assert model.length == 0


def test_rows_of_one_sequence_or_of_too_many_are_refused(load):
    model, ids = load(), random_ids(1)
    for rows in ([], [Row(model.sequence, ids, 0)] * 2, [Row(Sequence(model.pool), ids, 0) for _ in range(MAX_ROWS + 1)]):
        with pytest.raises(ValueError, match=f"a step takes 1 to {MAX_ROWS} rows, each of another sequence"):
            model.step(rows)


# ---- many rows -----------------------------------------------------------------------------------------------------------

@seed(2)
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_rows_change_no_bit_of_each_other(blob_paths, at_once, data):
    """Any mix of chunks, single tokens and drafts, with forks and cuts: every row gets the logits that it gets alone."""
    name, kv_bits = data.draw(st.sampled_from(list(MODELS))), data.draw(st.sampled_from(KV_BITS))
    ids, expected = at_once(name, kv_bits)
    model = Transformer(Blob.open(blob_paths[name]), kv_bits=kv_bits, threads=data.draw(st.integers(1, 3)))
    sequences = [Sequence(model.pool) for _ in range(data.draw(st.integers(1, 6)))]
    for _ in range(data.draw(st.integers(1, 8))):
        rows, left = [], model.chunk
        for sequence in sequences:
            n = data.draw(st.one_of(st.just(1), st.integers(0, 100)))
            n = min(n, 150 - sequence.length, left)
            if n:
                at, n_logits = sequence.length, data.draw(st.integers(0, n))
                rows.append((at, Row(sequence, ids[at : at + n], n_logits)))
                left -= n
        if rows:
            logits = model.step([row for _, row in rows])
            wanted = [expected[at + len(row.ids) - row.n_logits : at + len(row.ids)] for at, row in rows]
            np.testing.assert_array_equal(logits, np.concatenate(wanted))
        which = data.draw(st.integers(0, len(sequences) - 1))
        length = sequences[which].continuable(data.draw(st.integers(0, sequences[which].length)))
        if data.draw(st.booleans()):
            sequences.append(sequences[which].fork(length))
        else:
            sequences[which].cut(length)
    model.close()


def test_forks_go_their_own_ways_behind_full_segments(load):
    """Past two segments, so that forks share one and copy the other."""
    model, ids, other = load(context=512), random_ids(420), random_ids(60, seed=9)
    expected = load(context=512).forward_all(ids)
    model.forward_all(ids[:400])
    fork = model.sequence.fork(380)
    assert fork.addresses[0] == model.sequence.addresses[0] and fork.addresses[1] != model.sequence.addresses[1]
    model.step([Row(fork, other, 1), Row(model.sequence, ids[400:401], 1)])
    model.truncate(400)
    fork.cut(300)
    again = model.step([Row(fork, ids[300:420], 120)]).copy()
    np.testing.assert_array_equal(again, expected[300:420])
    np.testing.assert_array_equal(model.forward(ids[400:], 20), expected[400:])
    fork.cut(100)                                   # into the shared segment: it is copied before it is written
    model.step([Row(fork, other, 0)])
    model.truncate(256)
    np.testing.assert_array_equal(model.forward(ids[256:400], 144), expected[256:400])


@pytest.mark.parametrize("options", [{"context": 513}, {"context": 0}, {"context": -1}, {"kv_bits": 5}])
def test_options_that_the_model_cannot_have(blob_paths, options):
    blob = Blob.open(blob_paths["odd sizes"])
    with pytest.raises(BadRequest) as caught:
        Transformer(blob, **options)
    assert caught.value.field == next(iter(options))
    blob.close()


def test_a_context_of_one(load, at_once):
    ids, expected = at_once("odd sizes", 8)
    model = load(context=1, threads=2)
    np.testing.assert_array_equal(model.forward(ids[:1], 1), expected[:1])
    with pytest.raises(ContextOverflow):
        model.forward(ids[1:2], 1)


def test_an_interrupted_call_appends_nothing(load, at_once, monkeypatch):
    ids, expected = at_once("odd sizes", 8)
    model = load(threads=2)
    model.forward(ids[:30], 0)
    wait = model._team.wait

    def interrupted():
        if model._team._calls:                       # as if Ctrl-C came before any thread had started
            raise KeyboardInterrupt
        wait()

    with monkeypatch.context() as patch:
        patch.setattr(model._team, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.forward(random_ids(40, seed=3), 1)
    assert model.length == 30
    np.testing.assert_array_equal(model.forward(ids[30:], 120), expected[30:])


# ---- memory ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_kernels_write_only_where_they_may(load, at_once, guards, name):
    """At the longest calls; `test_sharing_a_long_cache_changes_no_bit` has longer sequences."""
    ids, expected = at_once(name, 8)
    for kv_bits in KV_BITS:
        model = load(name, threads=2, kv_bits=kv_bits, context=300)
        longest = random_ids(256, name)
        model.forward(longest, 256)
        for n in (1, 2, 3, 37):
            model.forward(longest[:n], n)
    model = load(name, context=150)
    many = [Row(Sequence(model.pool), longest[: 4 if n else 3], 1) for n in range(MAX_ROWS)]     # the most query rows
    model.step([*many[1:], many[0]._replace(ids=longest[:4])])
    np.testing.assert_array_equal(model.forward(ids, 150), expected)
    assert len(guards) > 60
    assert all((guard == FILL).all() for guard in guards)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_planned_workspace_is_what_is_taken(load, monkeypatch, threads):
    taken, allocate = 0, module._aligned

    def counted(n, dtype):
        nonlocal taken
        array = allocate(n, dtype)
        taken += array.base.nbytes
        assert array.ctypes.data % 64 == 0
        return array

    workspace = module._workspace
    monkeypatch.setattr(module, "_workspace", lambda *sizes: workspace(*sizes[:2], counted))
    config = load(threads=threads).config
    monkeypatch.undo()
    assert workspace_bytes(config, threads) == taken


# ---- every instruction set -------------------------------------------------------------------------------------------------

def digest_of_logits(folder):
    """SHA-256 over the logits of all models with all KV widths: one prompt, then single tokens."""
    digest = hashlib.sha256()
    for name in MODELS:
        for kv_bits in KV_BITS:
            model, ids = OneSequence(Blob.open(folder / f"{name}.safetensors"), kv_bits=kv_bits), random_ids(150, name)
            digest.update(logits_in_chunks(model, ids, [140] + [1] * 10).tobytes())
            model.close()
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(("simd_name", "cpu"), LOWERINGS)
def test_every_lowering_gives_the_same_bits(blob_paths, simd_name, cpu):
    folder, root = blob_paths["odd sizes"].parent, Path(__file__).parents[2]
    code = (
        f"import sys; sys.path[:0] = [{str(root)!r}]; from pathlib import Path;"
        f"from tests.runtime import test_transformer as t; print(t.digest_of_logits(Path({str(folder)!r})))"
    )
    command, environment = [sys.executable, "-c", code], settings_for(simd_name, cpu)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == digest_of_logits(folder), done.stderr
