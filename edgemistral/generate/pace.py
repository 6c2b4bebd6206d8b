"""How much of a prompt to read beside the tokens of others."""

from __future__ import annotations

LEAST, MOST = 8, 64
SLOWER = 2.0      # a reader's tokens may come so many times as slowly while another's prompt is read
STEP = 4          # tokens


class Pace:
    """Prompt tokens for a step that also brings tokens to readers, learned from how long steps take here.

    A step that reads all weights has time for some prompt tokens; more of them would hold up the readers, fewer the prompt.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 16
        self._alone: dict[int, float] = {}     # seconds of a step of so many single tokens

    def note(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step of `decoding` single tokens and so many tokens of prompts took so long."""
        if not prompt_tokens:
            before = self._alone.get(decoding, seconds)
            self._alone[decoding] = before + 0.2 * (min(seconds, 2 * before) - before)
        elif decoding and decoding in self._alone and prompt_tokens >= self.prompt_tokens:
            ratio = seconds / self._alone[decoding]
            if ratio > SLOWER:
                self.prompt_tokens = max(LEAST, self.prompt_tokens - STEP)
            elif ratio < 0.85 * SLOWER:
                self.prompt_tokens = min(MOST, self.prompt_tokens + STEP)
