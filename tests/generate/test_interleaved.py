"""Ten conversations on a small real model, in any order and at once: each gets the bits of a model that did nothing else."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest

from edgemistral.errors import Cancelled
from edgemistral.files import records
from edgemistral.files.blob import Blob
from edgemistral.files.kv_store import KVStore
from edgemistral.files.layout import Recipe
from edgemistral.files.session import SessionFile
from edgemistral.generate.engine import Engine
from edgemistral.generate.lookup import Lookup
from edgemistral.generate.pace import Pace
from edgemistral.generate.sampler import SamplingParams
from edgemistral.runtime.session import FileSequence, geometry_of
from edgemistral.runtime.transformer import Transformer
from tests import blobs

CONFIG = blobs.config(context=700)
BINDING = {"blob": "b" * 64, "tokenizer": "t", "template": "", "kv_bits": 8, "kv_version": 1}
ANSWER = 24       # tokens: long enough to repeat itself, so that guesses are made


@pytest.fixture(autouse=True)
def many_guesses(monkeypatch):
    """Steps of so small a model do not wait for memory, and its answers seldom quote: guesses would hardly ever pay."""
    monkeypatch.setattr(Lookup, "_worth", lambda self, most, pace, others: min(most, 4))


@pytest.fixture(scope="module")
def blob(tmp_path_factory):
    return blobs.write_blob(tmp_path_factory.mktemp("interleaved") / "blob", CONFIG, Recipe(4, 8))


@pytest.fixture(scope="module")
def fresh(blob):
    """Answers of a model that keeps nothing and guesses nothing."""
    engines = {}

    def answer(prompt, params, kv_bits=8):
        if kv_bits not in engines:
            engines[kv_bits] = Engine(Transformer(Blob.open(blob), threads=2, kv_bits=kv_bits), lookup=False)
            engines[kv_bits].end_ids = frozenset()
        engine = engines[kv_bits]
        engine._kept.evict_all()
        generation = engine.generate(prompt, params, ANSWER)
        return list(generation), generation.logprobs

    yield answer
    for engine in engines.values():
        engine.close()


class Interleaved:
    """An engine with sessions, a store and little room, and ten conversations at random points."""

    def __init__(self, blob, folder, fresh, seed):
        self.blob, self.folder, self.fresh, self.chance = blob, folder, fresh, random.Random(seed)
        self.kv_bits = (8, 4)[seed % 2]
        self.chats = [[1, 10 + n, *[3 + i % (9 + n) for i in range(60 * n)], 7, 8, 9] for n in range(10)]
        self.running, self.sessions, self.ended, self.guessed, self.cached = [], [], 0, 0, 0
        self.start()

    def start(self):
        transformer = Transformer(Blob.open(self.blob), threads=1, kv_bits=self.kv_bits)
        transformer.pool.capacity = self.chance.randint(3, 12)
        self.engine = Engine(transformer)
        self.engine.end_ids = frozenset()
        geometry = geometry_of(transformer.pool)
        store = KVStore(self.folder / "store", records.root_of(BINDING), geometry, 6 * geometry.stride)
        self.engine.use_store(store)
        self.sessions = [self.pin(n) for n in range(2)]

    def pin(self, n):
        def make(pool):
            path = self.folder / f"{n}.session"
            return FileSequence(pool, SessionFile.open(path, BINDING, geometry_of(pool), CONFIG.context, "tiny"))

        return self.engine.pin(make)

    def begin(self):
        which = self.chance.randrange(10)
        params = SamplingParams(temperature=self.chance.choice([0.0, 0.7]), seed=which, top_logprobs=2)
        home = self.sessions[which] if which < 2 and self.chance.random() < 0.7 else None
        stops = self.chance.choice([None, None, None, self.chance.randrange(1, 12)])
        asked = []

        def cancel():
            asked.append(1)
            return stops is not None and len(asked) > stops

        prompt = list(self.chats[which])
        self.running.append((which, params, self.engine.generate(prompt, params, ANSWER, cancel=cancel, home=home)))

    def step(self):
        for _ in range(self.chance.choice([1, 5, 20])):
            going = [one for _, _, one in self.running if not one.done and one.error is None]
            if going:
                self.engine.step(going)

    def pull(self):
        if self.running:
            with contextlib.suppress(Cancelled):
                next(self.chance.choice(self.running)[2], None)

    def abandon(self):
        if self.running:
            self.running.pop(self.chance.randrange(len(self.running)))

    def edit(self):
        chat = self.chats[self.chance.randrange(10)]
        del chat[max(1, len(chat) - self.chance.choice([1, 10, 40, 400])) :]
        chat += [self.chance.randint(3, 6) for _ in range(self.chance.randint(1, 4))]

    def fork(self):
        source, to = self.chance.sample(range(10), 2)
        self.chats[to] = [*self.chats[source][: self.chance.randint(1, len(self.chats[source]))], to + 20]

    def lengthen(self):
        chat = self.chats[self.chance.randrange(10)]
        chat += [self.chance.randint(3, 40) for _ in range(20)] * self.chance.randint(2, 9)
        del chat[640:]

    def evict(self):
        self.engine._kept.evict_all(but=[one.sequence for _, _, one in self.running if one.sequence is not None])

    def reopen(self):
        n = self.chance.randrange(2)
        self.engine.unpin(self.sessions[n])
        self.sessions[n] = self.pin(n)

    def restart(self):
        self.running = []
        self.engine.close()
        self.start()

    def check(self):
        """Compare what has ended, and forget it."""
        for which, params, one in self.running:
            if not one.done and one.error is None:
                continue
            assert one.error is None or isinstance(one.error, Cancelled)
            self.guessed, self.cached = self.guessed + one.usage.guessed_tokens, self.cached + one.usage.cached_tokens
            self.ended += 1
            prompt = one.history[: one.usage.prompt_tokens].tolist()
            tokens, logprobs = self.fresh(prompt, params, self.kv_bits)
            made = one.history[len(prompt) : one.length].tolist()
            assert made == tokens[: len(made)] and (one.error is not None or len(made) == ANSWER)
            assert one.logprobs == logprobs[: len(made)]
            if self.chats[which] == prompt and len(prompt) < 600:
                self.chats[which] += [*made, 2, 30 + which, 7, 8, 9]     # the next turn
        self.running = [entry for entry in self.running if not entry[2].done and entry[2].error is None]

    def run(self, actions):
        kinds = [self.begin] * 6 + [self.step] * 8 + [self.pull, self.abandon, self.edit, self.fork, self.lengthen]
        kinds += [self.evict, self.reopen]
        for n in range(actions):
            self.chance.choice(kinds)()
            self.check()
            if n % 40 == 39:
                self.restart()
        while self.running:
            self.step()
            self.check()
        self.engine.close()


@pytest.fixture(autouse=True)
def guesses_are_free(monkeypatch):
    """Whether they pay depends on the machine; here they are to be made."""
    monkeypatch.setattr(Pace, "cost", lambda self, tokens, fewer=1: 1.0)


@pytest.mark.parametrize("seed", range(2))
def test_interleaved_conversations_get_the_bits_of_a_fresh_model(blob, fresh, tmp_path, seed):
    interleaved = Interleaved(blob, tmp_path, fresh, seed)
    interleaved.run(90)
    assert interleaved.ended > 5 and interleaved.cached > 300
    assert interleaved.guessed or seed > 0      # what the second one says repeats nothing when there is room for a guess


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_interleaved_conversations(blob, fresh, tmp_path, seed):
    Interleaved(blob, tmp_path, fresh, seed).run(150)


def test_several_that_quote_at_once_guess_and_get_the_same_bits(blob, fresh, tmp_path):
    """Guesses of four conversations share the steps, greedy and sampled."""
    engine = Engine(Transformer(Blob.open(blob), threads=2))
    engine.end_ids = frozenset()
    passage = np.random.default_rng(0).integers(3, 500, 30).tolist()
    asked = [([1, 20 + n, *passage * 4], SamplingParams(temperature=0.6 * (n % 2), seed=n, top_logprobs=1)) for n in range(4)]
    running = [engine.generate(prompt, params, ANSWER) for prompt, params in asked]
    while going := [one for one in running if not one.done]:
        engine.step(going)
    for (prompt, params), one in zip(asked, running, strict=True):
        assert (list(one), one.logprobs) == fresh(prompt, params)
    engine.close()
