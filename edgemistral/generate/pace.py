"""How long steps take here, and what follows from that for what a step should bring."""

from __future__ import annotations

LEAST, MOST = 8, 64
SLOWER = 2.0      # a reader's tokens may come so many times as slowly while another's prompt is read
STEP = 4          # tokens
FEW = 4           # tokens that a step brings for little more than the price of one: it waits for memory


class Pace:
    """Times of the steps so far."""

    def __init__(self) -> None:
        self.prompt_tokens = 16
        self._decoding: dict[int, float] = {}     # seconds of a step of so many tokens without a prompt

    def note(self, decoded: int, prompt_tokens: int, seconds: float) -> None:
        """A step of so many tokens of generations and of prompts took so long.

        A step that reads all weights has time for some prompt tokens: more would hold up the readers, fewer the prompt.
        """
        if not prompt_tokens:
            before = self._decoding.get(decoded, seconds)
            self._decoding[decoded] = before + 0.2 * (min(seconds, 2 * before) - before)
        elif decoded in self._decoding and prompt_tokens >= self.prompt_tokens:
            ratio = seconds / self._decoding[decoded]
            if ratio > SLOWER:
                self.prompt_tokens = max(LEAST, self.prompt_tokens - STEP)
            elif ratio < 0.85 * SLOWER:
                self.prompt_tokens = min(MOST, self.prompt_tokens + STEP)

    def cost(self, tokens: int) -> float:
        """A step of so many tokens in terms of one of one token: measured, or what it is on most machines."""
        one, several = self._decoding.get(1), self._decoding.get(tokens)
        if one is not None and several is not None:
            return max(1.0, several / one)
        return 1 + 0.03 * (tokens - 1) if tokens <= FEW else 1 + 0.1 * tokens
