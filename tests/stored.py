"""Session files of the fake model, whose positions hold bytes that stand for all ids up to them."""

from __future__ import annotations

import numpy as np

from edgemistral.files.session import SessionFile
from edgemistral.generate.engine import Engine
from edgemistral.generate.sampler import SamplingParams
from edgemistral.runtime.session import FileSequence, geometry_of
from tests.crash import content
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


def make(path, pool, ids, notes=""):
    """A closed session of these ids."""
    sequence = FileSequence(pool, open_file(path, pool))
    compute(sequence, ids)
    sequence.save(notes)
    sequence.close()


def reopen(path, pool):
    file = open_file(path, pool)
    return FileSequence(pool, file), file


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
