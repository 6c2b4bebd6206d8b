"""How long steps take here, and what follows from that for what a step should bring.

While a prompt is read beside readers (generations that wait for their next token), a step brings one token of each reader and
some of the prompt. A step that reads all weights has time for a dozen tokens and more. Steps of two sizes alternate so that the
readers keep their share of the time: a small one of s seconds and a large one of l, a part x of them large,

    x l + (1 - x) s = SLOWER r        where r is a step of the readers alone

and the two are those of all measured sizes that bring the most of the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from edgemistral.errors import BadRequest

LEAST_DUTY = 0.01
LEAST_STEP = 64   # tokens of a step at the lowest duty: as many as it may have rows
SLOWER = 1.98     # a reader's tokens may come so many times as slowly while another's prompt is read
LONGEST = 12      # times r that a step counts at most: the machine slept, or something else held it up
TRIAL = 16        # of so many steps with a prompt one brings another number of tokens, to measure it
FEW = 4           # tokens that a step brings for little more than the price of one: it waits for memory
NEWEST = 0.2      # weight of the last measurement


class Pace:
    """Times of the steps so far. sizes: numbers of tokens, upwards, of which a kernel makes the most."""

    def __init__(self, sizes: Sequence[int] = (8,)) -> None:
        self._sizes = sizes
        self._alone: dict[int, float] = {}       # seconds of a step of so many tokens without a prompt
        self._mixed: dict[int, float] = {}       # the same with a prompt
        self._spare = 0.0                        # seconds that readers could still be made to wait
        self._steps = 0

    def prompt_tokens(self, readers: int) -> int:
        """How many tokens of prompts the next step should bring beside so many readers; 0: it is the readers' turn."""
        alone = self._alone.get(readers)
        if alone is None:
            return 0
        known = [(0, alone)]                     # tokens of the prompt, seconds of the step
        for size in self._sizes:
            if size > readers:
                if size not in self._mixed:
                    return size - readers if self._spare >= 0 else known[0][0]
                known.append((size - readers, self._mixed[size]))
                if known[-1][1] > SLOWER * alone:
                    break
        self._steps += 1
        if self._steps % TRIAL == 0:
            return known[self._steps // TRIAL % len(known)][0]
        small, large = best_pair(known, SLOWER * alone)
        return large if self._spare >= 0 else small

    def note(self, decoded: int, prompt_tokens: int, seconds: float) -> None:
        """A step of so many tokens of generations and of prompts took so long."""
        if not prompt_tokens:
            _blend(self._alone, decoded, seconds)
        elif decoded:
            _blend(self._mixed, decoded + prompt_tokens, seconds)
        alone = self._alone.get(decoded)
        if alone is not None:
            self._spare += SLOWER * alone - min(seconds, LONGEST * alone)
            self._spare = min(self._spare, SLOWER * alone)       # a long time alone is no reason for a long wait

    def cost(self, tokens: int) -> float:
        """A step of so many tokens in terms of one of one token: measured, or what it is on most machines."""
        one, several = self._alone.get(1), self._alone.get(tokens)
        if one is not None and several is not None:
            return max(1.0, several / one)
        return 1 + 0.03 * (tokens - 1) if tokens <= FEW else 1 + 0.1 * tokens


def best_pair(steps: Sequence[tuple[int, float]], mean: float) -> tuple[int, int]:
    """The numbers of tokens of a small and a large step that bring the most a second, where steps may take `mean` seconds.

    steps: (tokens, seconds). Where no step takes longer than that, the two are the same one.
    """
    best, most = (0, 0), -1.0
    for small, short in steps:
        if short > mean:
            continue
        if small / short > most:
            best, most = (small, small), small / short
        for large, long in steps:
            if long > mean:
                part = (mean - short) / (long - short)
                speed = (part * large + (1 - part) * small) / mean
                if speed > most:
                    best, most = (small, large), speed
    return best


def _blend(times: dict[int, float], tokens: int, seconds: float) -> None:
    """Follow the machine's speed, and ignore most of a step that something else held up."""
    before = times.get(tokens, seconds)
    times[tokens] = before + NEWEST * (min(seconds, 2 * before) - before)


class Duty:
    """What share of the time may be spent computing: a rest follows each step, and long prompts are read in shorter steps."""

    def __init__(self) -> None:
        self._share, self._rest_until = 1.0, 0.0

    @property
    def share(self) -> float:
        return self._share

    @share.setter
    def share(self, share: float) -> None:
        """Raises BadRequest. Threads may set it at any time."""
        if isinstance(share, bool) or not isinstance(share, int | float) or not LEAST_DUTY <= share <= 1:
            raise BadRequest(f"duty is {share!r}: it must be a number from {LEAST_DUTY} to 1", "duty")
        self._share = float(share)
        if share == 1:
            self._rest_until = 0.0

    def note(self, seconds: float) -> None:
        """A step took so long."""
        if self._share < 1:
            self._rest_until = time.monotonic() + seconds * (1 / self._share - 1)

    def left(self) -> float:
        """Seconds of rest before the next step; 0 or less: none."""
        return self._rest_until - time.monotonic() if self._rest_until else 0.0

    def most(self, tokens: int) -> int:
        """Tokens of a step that may have so many at full duty: a short step needs a short rest only."""
        return max(min(LEAST_STEP, tokens), int(tokens * self._share))
