"""A disk that remembers what was written to it, and what is left of it when the power fails at any moment."""

from __future__ import annotations

import random

import numpy as np

from edgemistral.files.disk import Disk

SECTOR = 512


class Recorder:
    """Stands for a `Disk` and passes everything on to it. Stores into mappings are told to it with `store`."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.begin = disk.path.read_bytes()
        self.events = []                 # (kind, offset, bytes)
        self._offsets = {}               # of mappings

    def __getattr__(self, name):
        return getattr(self._disk, name)

    def write(self, offset, data):
        self.events.append(("write", offset, bytes(data)))
        self._disk.write(offset, data)

    def store(self, mapping, start, data):
        self.events.append(("store", self._offsets[id(mapping)] + start, bytes(data)))

    def map(self, offset, size):
        mapping = self._disk.map(offset, size)
        self._offsets[id(mapping)] = offset
        return mapping

    def flush(self, mapping):
        self.events.append(("flush", self._offsets[id(mapping)], b"\0" * len(mapping)))
        self._disk.flush(mapping)

    def sync(self):
        self.events.append(("sync", 0, b""))
        self._disk.sync()

    def grow(self, size):
        if size > self._disk.size:
            self.events.append(("grow", size, b""))
        self._disk.grow(size)

    def shrink(self, size):
        self.events.append(("shrink", size, b""))
        self._disk.shrink(size)

    def image(self, at: int, chance: random.Random) -> bytes:
        """What may be on the disk if the power fails before event number `at`.

        Writes are there when a sync followed them, stores when a flush and then a sync did. Of all others any sectors may be.
        """
        events, durable = self.events[:at], set()
        flushed: set[int] = set()
        pending: list[int] = []
        for n, (kind, offset, data) in enumerate(events):
            if kind == "flush":
                flushed |= {m for m in pending if events[m][0] == "store" and offset <= events[m][1] < offset + len(data)}
            elif kind == "sync":
                done = {m for m in pending if events[m][0] != "store" or m in flushed}
                durable |= done
                pending = [m for m in pending if m not in done]
            else:
                pending.append(n)
        image = bytearray(self.begin)
        share = chance.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        for n, (kind, offset, data) in enumerate(events):
            if kind in ("flush", "sync"):
                continue
            if kind == "grow":
                if n in durable or chance.random() < share:
                    image.extend(bytes(max(0, offset - len(image))))
            elif kind == "shrink":
                if n in durable or chance.random() < share:
                    del image[offset:]
            else:
                start = offset
                while start < offset + len(data):
                    end = min(offset + len(data), start - start % SECTOR + SECTOR)
                    if n in durable or chance.random() < share:
                        image.extend(bytes(max(0, end - len(image))))
                        image[start:end] = data[start - offset : end - offset]
                    start = end
        return bytes(image)


def content(ids, size) -> np.ndarray:
    """Bytes that stand for the keys and values behind `ids`: (size,)."""
    seed = np.frombuffer(np.asarray(ids, np.int32).tobytes(), np.uint8).astype(np.uint64)
    key = int((seed * (np.arange(1, len(seed) + 1, dtype=np.uint64) * np.uint64(2654435761))).sum())
    return np.random.default_rng(key % 2**63).integers(0, 256, size, np.uint8)
