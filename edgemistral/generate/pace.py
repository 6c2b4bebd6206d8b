"""Measures how long steps take on this machine, and chooses how many prompt tokens a step computes.

Readers are generations that wait for their next token. While another prompt is read, a step computes one token of each reader
and some tokens of the prompt: reading the weights leaves time for a dozen tokens or more. Steps of two sizes alternate, so that
readers keep their share of the time. The small step takes s seconds, the large one l, and a fraction x of the steps is large:

    x l + (1 - x) s = SLOWER r        where r is a step of the readers alone

Of all measured sizes, the pair that computes the most prompt tokens is used.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from edgemistral.errors import BadRequest

LEAST_DUTY = 0.01
LEAST_STEP = 64   # tokens of a step at the lowest duty: its maximum number of rows
SLOWER = 1.97     # factor by which readers may slow down while another prompt is read; what surrounds a step counts too
LONGEST = 12      # a step counts as at most this many r: the machine may have slept or been busy
TRIAL = 32        # one of this many steps with a prompt tries another size, to measure it: trials cost some speed
FEW = 4           # tokens that a step computes for little more than the time of one: it waits for memory
NEWEST = 0.2      # weight of the last measurement


class Pace:
    """Times of the steps so far. sizes: numbers of tokens that a kernel uses best, ascending."""

    def __init__(self, sizes: Sequence[int] = (8,)) -> None:
        self._sizes = sizes
        self._alone: dict[int, float] = {}       # tokens of a step without a prompt -> seconds
        self._mixed: dict[int, float] = {}       # the same with a prompt
        self._spare = 0.0                        # seconds that readers could still be made to wait
        self._steps = 0

    def prompt_tokens(self, readers: int) -> int:
        """How many prompt tokens the next step should compute with this many readers; 0: only the readers."""
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
        """Note the seconds of a step with these numbers of generated and prompt tokens."""
        if not prompt_tokens:
            _blend(self._alone, decoded, seconds)
        elif decoded:
            _blend(self._mixed, decoded + prompt_tokens, seconds)
        alone = self._alone.get(decoded)
        if alone is not None:
            self._spare += SLOWER * alone - min(seconds, LONGEST * alone)
            self._spare = min(self._spare, SLOWER * alone)       # limited: readers must not pay later for a long time alone

    def cost(self, tokens: int, fewer: int = 1) -> float:
        """The time of a step of this many tokens, relative to one of fewer: measured, or typical of most machines."""
        small, large = self._alone.get(fewer), self._alone.get(tokens)
        if small is None or large is None:
            small, large = _typical(fewer), _typical(tokens)
        return max(1.0, large / small)


def best_pair(steps: Sequence[tuple[int, float]], mean: float) -> tuple[int, int]:
    """The tokens of the small and the large step that compute the most per second, if the mean step takes `mean` seconds.

    steps: (tokens, seconds). If no step takes longer than the mean, both are the same step.
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


def _typical(tokens: int) -> float:
    """The time of a step of this many tokens on most machines; that of one token is 1."""
    return 1 + 0.03 * (tokens - 1) if tokens <= FEW else 1 + 0.1 * tokens


def _blend(times: dict[int, float], tokens: int, seconds: float) -> None:
    """A moving average; a step that was held up counts only in part."""
    before = times.get(tokens, seconds)
    times[tokens] = before + NEWEST * (min(seconds, 2 * before) - before)


class Duty:
    """The share of the time that may be spent computing: each step is followed by a rest, and prompt steps are shorter."""

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
        """Note the seconds of a step."""
        if self._share < 1:
            self._rest_until = time.monotonic() + seconds * (1 / self._share - 1)

    def left(self) -> float:
        """Seconds of rest before the next step; 0 or less: none."""
        return self._rest_until - time.monotonic() if self._rest_until else 0.0

    def most(self, tokens: int) -> int:
        """The most tokens of a step; `tokens` at full duty, fewer at less: a short step needs only a short rest."""
        return max(min(LEAST_STEP, tokens), int(tokens * self._share))
