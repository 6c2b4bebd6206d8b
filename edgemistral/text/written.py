"""Keeps the ids of answers that the model wrote, for prompts that contain their text again.

A text can be written as different ids, and a model does not always write those that its tokenizer would choose. A client sends
an answer back as text. Its new ids may differ from those in the KV cache, and everything after them would be computed again. So
the ids of such answers are kept, and replace those of the tokenizer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

import numpy as np

from edgemistral.text.tokenizer import Messages, Tokenizer

MOST_IDS = 1 << 20      # of all kept texts together


class WrittenTexts:
    """Texts and the ids that the model wrote for them, if the tokenizer would choose others. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: OrderedDict[str, tuple[int, ...]] = OrderedDict()     # the least recently written first
        self._size = 0

    def __len__(self) -> int:
        return len(self._ids)

    def get(self, text: str) -> tuple[int, ...] | None:
        return self._ids.get(text)

    def remember(self, text: str, ids: Iterable[int]) -> bool:
        """Keep the ids of a written text if they decode to it and the tokenizer would choose others; True if kept."""
        written = tuple(ids)
        if not text or len(written) > MOST_IDS or list(written) == self._tokenizer.encode(text):
            return False
        if self._tokenizer.decode(written) != text:
            return False
        self._size += len(written) - len(self._ids.pop(text, ()))
        self._ids[text] = written
        while self._size > MOST_IDS:
            self._size -= len(self._ids.popitem(last=False)[1])
        return True

    def restore(self, ids: list[int], messages: Messages, end_ids: Collection[int]) -> list[int]:
        """The ids of a conversation, with the kept ids of every answer that was written here.

        An answer is found by its tokenizer's ids, followed by an id that ends a turn, which no text contains.
        """
        if not self._ids:
            return ids
        at, made = 0, list(ids)
        for message in messages:
            text = message.get("content")
            if message["role"] != "assistant" or not isinstance(text, str) or (written := self._ids.get(text)) is None:
                continue
            for plain in {text: 0, text.rstrip(" "): 0}:                 # some templates drop spaces at the end
                own = self._tokenizer.encode(plain)
                found = _find(made, own, at, end_ids)
                if found >= 0:
                    made[found : found + len(own)] = written
                    at = found + len(written)
                    break
        return made


def _find(ids: list[int], part: list[int], start: int, end_ids: Collection[int]) -> int:
    """The position of `part` in `ids`, from `start` on, followed by one of `end_ids`; -1 if there is none."""
    if not part:
        return -1
    array, n = np.asarray(ids, np.int64), len(part)
    ends = np.flatnonzero(np.isin(array, list(end_ids)))
    for end in ends[ends >= start + n].tolist():
        if ids[end - n : end] == part:
            return int(end) - n
    return -1
