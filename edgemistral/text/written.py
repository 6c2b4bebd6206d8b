"""The ids of answers that the model wrote, for when their text comes back.

A text can be spelled in several ways, and a model does not always write the one that its tokenizer would choose. A client sends
an answer back as text; encoded anew it may differ from what stands in the KV cache, and everything behind it would be computed
again. So the ids of such answers are kept, and put in the place of the text's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

import numpy as np

from edgemistral.text.tokenizer import Messages, Tokenizer

MOST_IDS = 1 << 20      # of all texts that are kept


class WrittenTexts:
    """Texts and the ids they were written in, where those are not the tokenizer's own. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: OrderedDict[str, tuple[int, ...]] = OrderedDict()     # the least recently written first
        self._size = 0

    def __len__(self) -> int:
        return len(self._ids)

    def get(self, text: str) -> tuple[int, ...] | None:
        return self._ids.get(text)

    def remember(self, text: str, ids: Iterable[int]) -> bool:
        """Keep the ids that a text was written in, if they spell it and the tokenizer would choose others; True if so."""
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
        """The ids of a conversation, with every answer of it that was written here as it was written.

        An answer is found as its own ids with an id that ends a turn behind them, which no text gives.
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
    """Where `part` stands in `ids`, at `start` or behind it, with one of `end_ids` after it; -1 if it does not."""
    if not part:
        return -1
    array, n = np.asarray(ids, np.int64), len(part)
    ends = np.flatnonzero(np.isin(array, list(end_ids)))
    for end in ends[ends >= start + n].tolist():
        if ids[end - n : end] == part:
            return int(end) - n
    return -1
