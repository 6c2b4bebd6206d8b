"""Keeps users' text from becoming markup while a template is rendered."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from edgemistral.errors import BadRequest

PRIVATE_USE = range(0xE000, 0xF900)


class Hidden:
    """Replaces markup by private-use characters, in upper or lower case, because a template may change the case.

    A part of markup at the start or end of a text is replaced too: the template or another text may complete it.
    """

    def __init__(self, markup: Iterable[str], free: Iterator[str]) -> None:
        texts = sorted({text.lower() for text in markup if text.strip()}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)), re.IGNORECASE) if texts else None
        self._beginnings = {text[:n] for text in texts for n in range(1, len(text))}
        self._ends = {text[n:] for text in texts for n in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)
        self._free, self._marks = free, dict[str, str]()
        self.meanings: dict[str, str] = {}      # character -> the text that it stands for

    def in_all(self, value: Any) -> Any:
        """A copy of JSON-like data without markup."""
        if isinstance(value, str):
            return self._in_text(value)
        if isinstance(value, Mapping):
            return {self.in_all(key): self.in_all(item) for key, item in value.items()}
        return [self.in_all(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _in_text(self, text: str) -> str:
        if self._pattern is None:
            return text
        text = self._pattern.sub(lambda match: self._mark(match[0]), text)
        core = text.strip()
        if not core:
            return text
        before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
        for n in range(min(self._longest - 1, len(core)), 0, -1):
            if core[-n:].lower() in self._beginnings:
                core = core[:-n] + self._mark(core[-n:])
                break
        for n in range(min(self._longest - 1, len(core)), 0, -1):
            if core[:n].lower() in self._ends:
                core = self._mark(core[:n]) + core[n:]
                break
        return before + core + after

    def _mark(self, meaning: str) -> str:
        if meaning not in self._marks:
            mark = next(self._free, None)
            if mark is None:
                raise BadRequest("messages contain too many different spellings of markup", "messages")
            self._marks[meaning], self.meanings[mark] = mark, meaning
        return self._marks[meaning]
