"""Prompt lookup: finds the last few tokens earlier in the text, and guesses that the same tokens follow again.

Answers that quote or edit their prompt repeat long parts of it. A guess costs nothing, one step verifies several positions,
and only tokens that the sampler draws anyway are kept: the answer is the same (Saxena 2023, "Prompt Lookup Decoding";
Leviathan et al. 2023, arXiv:2211.17192).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemistral.generate.pace import Pace

N = 3                  # tokens that must match an earlier place
LONGEST = 32           # tokens compared to choose between places: the longest match counts
PLACES = 8             # places remembered for each n-gram, the newest ones
MOST = 7               # tokens of a guess: with the token before them they fill a step of 8
GAIN = 1.05            # a guess must promise this many times the tokens per second
INTEREST = 0.01        # share of the steps that trials may cost while guesses do not pay
MEMORY = 0.8           # weight of the past in the share of right guesses


class Lookup:
    """The n-grams of one history, and how well guessing has done in it."""

    def __init__(self, history: NDArray[np.int32], length: int) -> None:
        """history: it may grow after `length`; each guess reads the new part."""
        self._followed: dict[tuple[int, ...], list[int]] = {}      # n-gram -> positions of the token after it
        self._seen = N - 1
        self._right = 0.5                                    # share of guessed tokens, lately
        self._credit = 0.0
        self._index(history, length)

    def guess(self, history: NDArray[np.int32], most: int, pace: Pace, others: int = 0) -> tuple[int, ...]:
        """Ids that may follow `history`: as many as pay at the speed of this machine.

        others: tokens that the step computes beside these and the one before them. What a guess costs depends on them, and it
        must pay for all who wait for the step.
        """
        length = len(history)
        self._credit += INTEREST
        places = list(self._followed.get(tuple(history[length - N :].tolist()), ())) if length >= N else []
        self._index(history, length)
        if not places:
            return ()
        at = places[-1] if len(places) == 1 else max(places, key=lambda place: (_common_end(history, place), place))
        n = self._worth(min(most, MOST, length - at), pace, others)
        return tuple(history[at : at + n].tolist())

    def learn(self, guessed: int, accepted: int) -> None:
        """Note how many of the guessed ids were right."""
        for n in range(min(accepted + 1, guessed)):
            self._right = MEMORY * self._right + (1 - MEMORY) * (n < accepted)

    def _worth(self, most: int, pace: Pace, others: int) -> int:
        """The length with the most tokens per second in the whole step; now and then a short trial if none seems to pay."""
        best, speed = 0, GAIN
        without = others + 1
        expected, power = float(without), 1.0
        for n in range(1, most + 1):
            power *= self._right
            expected += power
            gained = expected / without / pace.cost(without + n, without)
            if gained > speed:
                best, speed = n, gained
        if best or not most:
            return best
        trial = min(most, 3)
        price = pace.cost(without + trial, without) - 1
        if self._credit < price:
            return 0
        self._credit -= price
        return trial

    def _index(self, history: NDArray[np.int32], length: int) -> None:
        """Note every n-gram that has a next token."""
        if length > self._seen + 1:
            ids = history[self._seen - N + 1 : length].tolist()
            for i in range(N, len(ids)):
                places = self._followed.setdefault(tuple(ids[i - N : i]), [])
                places.append(self._seen - N + 1 + i)
                del places[:-PLACES]
            self._seen = length - 1


def _common_end(history: NDArray[np.int32], place: int) -> int:
    """How many tokens before `place` match those at the end, up to LONGEST."""
    n = min(LONGEST, place)
    differ = np.flatnonzero(history[place - n : place][::-1] != history[len(history) - n :][::-1])
    return int(differ[0]) if len(differ) else n
