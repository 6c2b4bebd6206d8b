"""The sequences that are kept: whoever comes with ids that begin like one of them computes only the rest.

An edited message, another answer to the same prompt, a title for a chat, agents that fork a conversation: all are a prefix of a
kept sequence and something new. A sequence that is continued from its very end is continued in place, unless somebody else
is still writing to it; any other gets a fork, and the original stays for the next who comes.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.kernels.kv_layout import SEGMENT
from edgemistral.runtime.segments import SegmentPool, Sequence


class KeptSequences:
    """All sequences of a pool, the least recently used first. Not thread-safe: the engine holds a lock."""

    def __init__(self, pool: SegmentPool) -> None:
        self.pool = pool
        self._owners: dict[Sequence, weakref.ref[Any] | None] = {}   # who writes to it; in the order of use

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def newest(self) -> Sequence | None:
        """The one that was used last."""
        return next(reversed(self._owners), None)

    def longest_prefix(self, ids: NDArray[np.int32]) -> tuple[Sequence | None, int]:
        """The sequence that shares the most leading ids with `ids`, and how many.

        Of several the one that ends there, for it need not be forked; else the one that was used last.
        """
        best, most = None, (0, False)
        for sequence in self._owners:
            common = common_prefix(sequence.ids, ids)
            merit = common, common == sequence.length and self._is_free(sequence)
            if common and merit >= most:
                best, most = sequence, merit
        return best, most[0]

    def take(self, owner: object, ids: NDArray[np.int32], in_use: Collection[Sequence] = ()) -> Sequence:
        """A sequence that holds as many of the leading `ids` as any does, for `owner` to continue."""
        for empty in [one for one in self._owners if one.length == 0 and self._is_free(one)]:
            self._evict(empty)
        best, common = self.longest_prefix(ids)
        if best is not None and common == best.length and self._is_free(best):
            made = best
        elif best is None:
            made = Sequence(self.pool)
        elif not common % SEGMENT or self.make_room(1, {*in_use, best}):
            made = best.fork(common)
        elif self._is_free(best):
            made = best                    # no room for two: it goes another way from here
            made.cut(common)
        else:
            made = Sequence(self.pool)
        self._owners[made] = weakref.ref(owner)
        self.touch(made)
        return made

    def new(self, owner: object) -> Sequence:
        """An empty sequence for `owner`."""
        made = Sequence(self.pool)
        self._owners[made] = weakref.ref(owner)
        return made

    def touch(self, sequence: Sequence) -> None:
        """It was used now."""
        self._owners[sequence] = self._owners.pop(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Nobody writes to it any more; it is kept."""
        self._owners[sequence] = None

    def make_room(self, segments: int, in_use: Collection[Sequence]) -> bool:
        """Evict until the pool's budget has room for so many more segments; False: what is in use takes too much.

        The least recently used go first. An evicted one's owner computes it anew when it goes on: the same bits.
        """
        for sequence in [one for one in self._owners if one not in in_use]:
            if self.pool.used + segments <= self.pool.capacity:
                break
            self._evict(sequence)
        return self.pool.used + segments <= self.pool.capacity

    def evict_all(self, but: Collection[Sequence] = ()) -> None:
        """Let go of every sequence that is not in use."""
        for sequence in [one for one in self._owners if one not in but]:
            self._evict(sequence)

    def _evict(self, sequence: Sequence) -> None:
        owner = self._owner(sequence)
        if owner is not None:
            owner.sequence = None
        del self._owners[sequence]
        sequence.close()

    def _is_free(self, sequence: Sequence) -> bool:
        return self._owner(sequence) is None

    def _owner(self, sequence: Sequence) -> Any:
        reference = self._owners[sequence]
        owner = reference() if reference is not None else None
        return None if owner is None or owner.done or owner.error is not None else owner


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many leading ids two sequences share."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
