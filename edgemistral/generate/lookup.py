"""Prompt lookup: what followed the last few tokens when they stood there before is a guess at what follows now.

Answers that quote or edit what they were given repeat long runs of it. The guess costs nothing to make, several positions are
verified in one step, and only what the sampler would have drawn anyway is kept: the answer is the same (Saxena 2023, "Prompt
Lookup Decoding"; Leviathan et al. 2023, arXiv:2211.17192).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemistral.generate.pace import Pace

N = 3                  # tokens that must have stood there before
LONGEST = 32           # of several places, the one that matches furthest back counts, up to so many tokens
PLACES = 8             # that are remembered of an n-gram, the last ones
MOST = 7               # tokens of a guess: with the one before them they fill a step of 8
GAIN = 1.05            # times as many tokens a second that a guess must promise
INTEREST = 0.01        # steps that a trial may cost, with every step, where guesses promise nothing
MEMORY = 0.8           # of the share of right guesses


class Lookup:
    """The n-grams of one history, and how well guessing has done in it."""

    def __init__(self, history: NDArray[np.int32], length: int) -> None:
        """history: may grow behind `length`; it is looked at again at each guess."""
        self._followed: dict[tuple[int, ...], list[int]] = {}      # n-gram -> where it was followed
        self._seen = N - 1
        self._right = 0.5                                    # share of guessed tokens, lately
        self._credit = 0.0
        self._index(history, length)

    def guess(self, history: NDArray[np.int32], most: int, pace: Pace) -> tuple[int, ...]:
        """Ids that may follow `history`, so many as pay at the speed of this machine."""
        length = len(history)
        self._credit += INTEREST
        places = list(self._followed.get(tuple(history[length - N :].tolist()), ())) if length >= N else []
        self._index(history, length)
        if not places:
            return ()
        at = places[-1] if len(places) == 1 else max(places, key=lambda place: (_common_end(history, place), place))
        n = self._worth(min(most, MOST, length - at), pace)
        return tuple(history[at : at + n].tolist())

    def learn(self, guessed: int, accepted: int) -> None:
        """So many guessed ids were right."""
        for n in range(min(accepted + 1, guessed)):
            self._right = MEMORY * self._right + (1 - MEMORY) * (n < accepted)

    def _worth(self, most: int, pace: Pace) -> int:
        """The length that brings the most tokens a second; a short trial now and then where none seems to pay."""
        best, speed = 0, GAIN
        expected, power = 1.0, 1.0
        for n in range(1, most + 1):
            power *= self._right
            expected += power
            if expected / pace.cost(1 + n) > speed:
                best, speed = n, expected / pace.cost(1 + n)
        if best or not most:
            return best
        trial = min(most, 3)
        price = pace.cost(1 + trial) - 1
        if self._credit < price:
            return 0
        self._credit -= price
        return trial

    def _index(self, history: NDArray[np.int32], length: int) -> None:
        """Note every n-gram that something follows."""
        if length > self._seen + 1:
            ids = history[self._seen - N + 1 : length].tolist()
            for i in range(N, len(ids)):
                places = self._followed.setdefault(tuple(ids[i - N : i]), [])
                places.append(self._seen - N + 1 + i)
                del places[:-PLACES]
            self._seen = length - 1


def _common_end(history: NDArray[np.int32], place: int) -> int:
    """How many tokens before `place` are those at the end, up to LONGEST."""
    n = min(LONGEST, place)
    differ = np.flatnonzero(history[place - n : place][::-1] != history[len(history) - n :][::-1])
    return int(differ[0]) if len(differ) else n
