"""How long steps take here, and what follows from that for what a step should bring.

While a prompt is read beside readers (generations that wait for their next token), a step brings one token of each reader and
some of the prompt. A step that reads all weights has time for a dozen tokens and more; of the sizes that were measured, the one
that reads the prompt fastest is taken. Steps without the prompt come between, as many as keep the readers' speed:

    a step of t seconds, steps of r seconds without a prompt:  m = max(0, t - SLOWER r) / (SLOWER - 1) r  of those for each
    seconds for a token of the prompt:                         (t + m r) / (tokens - readers)
"""

from __future__ import annotations

from collections import defaultdict

SLOWER = 1.95     # a reader's tokens may come so many times as slowly while another's prompt is read
FIRST = 12        # tokens of the smallest step that is tried
MOST = 96         # tokens of the largest
LONGEST = 4       # times as long as a step without a prompt: no longer, if it can be, for that is a pause
TRIAL = 16        # of so many steps with a prompt one brings the next smaller or larger number of tokens, to measure it
FEW = 4           # tokens that a step brings for little more than the price of one: it waits for memory
NEWEST = 0.2      # weight of the last measurement


class Pace:
    """Times of the steps so far. tile: tokens that a kernel takes at once, so a step should bring a multiple of it."""

    def __init__(self, tile: int = 6) -> None:
        first = -(-FIRST // tile) * tile
        self._sizes = list(range(first, max(MOST, first + tile) + 1, tile))
        self._alone: dict[int, float] = {}       # seconds of a step of so many tokens without a prompt
        self._mixed: dict[int, float] = {}       # the same with a prompt
        self._spare = 0.0                        # seconds that readers could still be made to wait
        self._steps = 0

    def prompt_tokens(self, readers: int) -> int:
        """How many tokens of prompts the next step should bring beside so many readers; 0: it is the readers' turn."""
        alone = self._alone.get(readers)
        if alone is None or self._spare < 0:
            return 0
        self._steps += 1
        return self._size(readers, alone) - readers

    def note(self, decoded: int, prompt_tokens: int, seconds: float) -> None:
        """A step of so many tokens of generations and of prompts took so long."""
        if not prompt_tokens:
            _blend(self._alone, decoded, seconds)
        elif decoded:
            _blend(self._mixed, decoded + prompt_tokens, seconds)
        alone = self._alone.get(decoded)
        if alone is not None:
            self._spare += SLOWER * alone - min(seconds, 3 * LONGEST * alone)
            self._spare = min(self._spare, SLOWER * alone)       # a long time alone is no reason for a long wait

    def cost(self, tokens: int) -> float:
        """A step of so many tokens in terms of one of one token: measured, or what it is on most machines."""
        one, several = self._alone.get(1), self._alone.get(tokens)
        if one is not None and several is not None:
            return max(1.0, several / one)
        return 1 + 0.03 * (tokens - 1) if tokens <= FEW else 1 + 0.1 * tokens

    def _size(self, readers: int, alone: float) -> int:
        """The tokens of the next step."""
        sizes = [size for size in self._sizes if size > 2 * readers] or self._sizes[-1:]
        costs = defaultdict(lambda: float("inf"))
        for size in sizes:
            seconds = self._mixed.get(size)
            if seconds is not None and (seconds <= LONGEST * alone or size == sizes[0]):
                waits = max(0.0, seconds / alone - SLOWER) / (SLOWER - 1)
                costs[size] = (seconds + waits * alone) / (size - readers)
        at = min(range(len(sizes)), key=lambda i: costs[sizes[i]])
        around = [sizes[i] for i in (at + 1, at - 1) if 0 <= i < len(sizes)]
        new = [size for size in (sizes[at], *around) if size not in self._mixed]
        if new:
            return new[0]
        if around and self._steps % TRIAL == 0:
            return around[self._steps // TRIAL % len(around)]
        return sizes[at]


def _blend(times: dict[int, float], tokens: int, seconds: float) -> None:
    """Follow the machine's speed, and ignore most of a step that something else held up."""
    before = times.get(tokens, seconds)
    times[tokens] = before + NEWEST * (min(seconds, 2 * before) - before)
