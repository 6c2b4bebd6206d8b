"""The sequences that are kept. A task whose ids begin like a kept sequence computes only the rest.

An edited message, another answer to the same prompt, a title for a chat, agents that fork a conversation: all are a prefix of a
kept sequence and something new. A task that continues a sequence from its end writes to it directly, unless another task still
does; otherwise it gets a fork, and the original stays. A pinned sequence (of a session) is never evicted, and only tasks that
name it write to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.kernels.kv_layout import SEGMENT
from edgemistral.runtime.segments import SegmentPool, Sequence, segments_of

WORTH_COPYING = 16       # positions that another sequence must have more than the session
WITH_OWN_BLOCKS = 4      # idle sequences that keep a copy of their last block; the others compute it again


class KeptSequences:
    """All sequences of a pool, the least recently used first. Not thread-safe: the engine holds a lock."""

    def __init__(self, pool: SegmentPool) -> None:
        self.pool = pool
        self._owners: dict[Sequence, weakref.ref[Any] | None] = {}   # the task that writes to it; in order of use

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def newest(self) -> Sequence | None:
        """The sequence that was used last."""
        return next(reversed(self._owners), None)

    def longest_prefix(self, ids: NDArray[np.int32]) -> tuple[Sequence | None, int]:
        """The sequence that shares the most leading ids with `ids`, and how many.

        Of several, the one that ends there, because it needs no fork; else the one that was used last.
        """
        best, most = None, (0, False)
        for sequence in self._owners:
            common = sequence.continuable(common_prefix(sequence.ids, ids))
            merit = common, common == sequence.length and self._is_free(sequence)
            if common and merit >= most:
                best, most = sequence, merit
        return best, most[0]

    def take(self, owner: object, ids: NDArray[np.int32], in_use: Collection[Sequence] = ()) -> Sequence:
        """A sequence with the longest kept prefix of `ids`, for `owner` to continue."""
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
            made = best                    # no room for a fork: cut it and use it
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

    def take_home(self, owner: object, home: Sequence, ids: NDArray[np.int32], active: Collection[object],
                  in_use: Collection[Sequence] = ()) -> bool:
        """Give a pinned sequence the longest kept prefix of `ids`, for `owner` to continue.

        False: one of the `active` owners still writes to it. Any other owner loses it, and computes again if it continues.
        Raises SessionFailed.
        """
        current = self._owner(home)
        if current is not None and current is not owner:
            if current in active:
                return False
            current.sequence = None
        own = home.continuable(common_prefix(home.ids, ids))
        best, common = self.longest_prefix(ids)
        if own < home.length:
            self._part(home, own // SEGMENT, {*in_use, *([best] if best is not None else [])})
            home.cut(own)
        if best is not None and best is not home and best in self._owners and common >= own + WORTH_COPYING and (
            self.make_room(segments_of(common) - len(home.segments), {*in_use, best, home})
        ):
            home.adopt(best, common)
        self._owners[home] = weakref.ref(owner)
        self.touch(home)
        return True

    def add(self, sequence: Sequence) -> None:
        """Keep a sequence that was made elsewhere."""
        self._owners[sequence] = None

    def pin(self, sequence: Sequence) -> None:
        """Keep a sequence that was made elsewhere, until `unpin`."""
        self._owners[sequence] = None

    def unpin(self, sequence: Sequence) -> None:
        """Remove a pinned sequence; sequences that share its segments get copies."""
        owner = self._owner(sequence)
        if owner is not None:
            owner.sequence = None
        self._part(sequence, 0, ())
        del self._owners[sequence]

    @property
    def pinned(self) -> list[Sequence]:
        return [one for one in self._owners if one.pinned]

    def cut_home(self, home: Sequence, length: int) -> None:
        """Cut a pinned sequence to `length`; a task that writes to it computes again."""
        owner = self._owner(home)
        if owner is not None:
            owner.sequence, self._owners[home] = None, None
        length = home.continuable(length)
        self._part(home, length // SEGMENT, ())
        home.cut(length)

    def is_written(self, sequence: Sequence) -> bool:
        """Whether a task writes to a sequence now."""
        return sequence in self._owners and self._owner(sequence) is not None

    def is_pinned(self, sequence: Sequence) -> bool:
        return sequence.pinned and sequence in self._owners

    def touch(self, sequence: Sequence) -> None:
        """Mark a sequence as the last used."""
        self._owners[sequence] = self._owners.pop(sequence)

    def leave(self, sequence: Sequence) -> None:
        """End the writing to a sequence; it is kept. Others that it contains are not: the same prompt often comes again."""
        self._owners[sequence] = None
        if not sequence.pinned:
            for one in [one for one in self._owners if one is not sequence and self._is_free(one)]:
                if one.length <= sequence.length and np.array_equal(one.ids, sequence.ids[: one.length]):
                    self._evict(one)
        idle = [one for one in self._owners if self._owner(one) is None]
        for one in idle[:-WITH_OWN_BLOCKS]:
            one.drop_own_blocks()

    def make_room(self, segments: int, in_use: Collection[Sequence]) -> bool:
        """Evict until the pool's budget has room for `segments` more. False: the sequences in use take too much.

        The least recently used go first. The owner of an evicted sequence computes it again, with the same bits.
        """
        for sequence in [one for one in self._owners if one not in in_use and not one.pinned]:
            if self.pool.used + segments <= self.pool.capacity:
                break
            self._evict(sequence)
        return self.pool.used + segments <= self.pool.capacity

    def evict_all(self, but: Collection[Sequence] = ()) -> None:
        """Evict every sequence that is not in use or pinned."""
        for sequence in [one for one in self._owners if one not in but and not one.pinned]:
            self._evict(sequence)

    def _part(self, home: Sequence, first: int, in_use: Collection[Sequence]) -> None:
        """End the sharing of a pinned sequence's segments from number `first` on: they will be overwritten.

        Sequences in use get copies, the others too if there is room.
        """
        for number in range(first, len(home.segments)):
            segment = home.segments[number]
            sharers = [one for one in self._owners if one is not home and one.shares(number, segment)]
            if not sharers:
                continue
            if not self.make_room(1, {*in_use, *sharers, home}):
                for sharer in [one for one in sharers if one not in in_use and self._is_free(one)]:
                    self._evict(sharer)
                    sharers.remove(sharer)
            if sharers:
                copied = self.pool.copy(segment, SEGMENT)
                for sharer in sharers:
                    sharer.replace(number, copied)
                self.pool.release(copied)

    def _evict(self, sequence: Sequence) -> None:
        owner = self._owner(sequence)
        if owner is not None:
            owner.sequence = None
        del self._owners[sequence]
        sequence.close()

    def _is_free(self, sequence: Sequence) -> bool:
        """Whether any task may write to it."""
        return not sequence.pinned and self._owner(sequence) is None

    def _owner(self, sequence: Sequence) -> Any:
        reference = self._owners[sequence]
        owner = reference() if reference is not None else None
        return None if owner is None or owner.done or owner.error is not None else owner


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many leading ids two sequences share."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
