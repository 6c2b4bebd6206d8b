"""Token ids that arrive one by one -> text that may be shown at once: whole characters, no part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import SupportsIndex

from edgemistral.errors import BadRequest
from edgemistral.text.tokenizer import Tokenizer, check_text

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder:
    """Decodes one text id by id: all pieces joined are exactly `tokenizer.decode` of all ids.

    A character that spans several byte-fallback ids is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")   # for tokenizers whose tokens may end inside a character
        self._held = bytearray()   # the beginning of a character
        self._started = False      # decode() drops the space that encode() put before a text, so the first id differs

    def push(self, token_id: SupportsIndex) -> str:
        """The text that is certain after one more id. Raises BadRequest for an id outside the vocabulary."""
        if self._tokenizer.bytes_split_characters:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        if not self._tokenizer.piece(token_id):   # padding, which decode() skips
            return ""
        byte = self._tokenizer.byte(token_id)
        if byte is not None:
            self._started = True
            self._held.append(byte)
            return self._characters(final=False)
        surface = self._tokenizer.surface(token_id)
        if surface and not self._started:
            self._started = True
            return self._tokenizer.first_surface(token_id)
        # An id that adds no text (a control id) still ends a run of bytes, as it does in decode().
        return self.flush() + surface

    def flush(self) -> str:
        """The rest at the end of the text: one U+FFFD for each byte that does not belong to a character."""
        return self._utf8.decode(b"", final=True) or self._characters(final=True)

    def _characters(self, final: bool) -> str:
        """Take the complete characters from the held bytes, and if `final` the rest too."""
        text, held = "", self._held
        while held:
            size = _utf8_size(held[0])
            if len(held) < size and not final:
                break
            try:
                text += held[:size].decode("utf-8")
            except UnicodeDecodeError:   # SentencePiece replaces one byte and continues with the next
                text, size = text + REPLACEMENT, 1
            del held[:size]
        return text


class StopStrings:
    """Cuts a streamed text before the stop string that is complete first, and never emits a part of it.

    If several end at the same character, the longest counts. Each character is examined once, for any number and length of
    stop strings (Aho & Corasick, "Efficient string matching", CACM 18(6), 1975).
    Raises BadRequest if `stops` is not a string or a list of strings, or one of them is empty.
    """

    def __init__(self, stops: str | Iterable[str] = ()) -> None:
        self.stopped = False   # a stop string was found: the text has ended
        self.found: str | None = None
        self._held = ""        # the longest end of the text so far that begins a stop string
        self._state = 0
        # A state is a prefix of a stop string; state 0 is the empty prefix.
        self._children: list[dict[str, int]] = [{}]
        self._length = [0]
        self._shorter = [0]    # the state of the longest proper suffix of this prefix that is also a prefix
        self._match = [0]      # the length of the longest stop string that ends here
        for stop in _checked_stops(stops):
            self._insert(stop)
        self._link()

    def push(self, piece: str) -> str:
        """The text that is safe to emit after one more piece; "" once stopped."""
        if self.stopped:
            return ""
        text = self._held + piece
        for end, char in enumerate(piece, len(self._held) + 1):
            self._state = self._step(self._state, char)
            if match := self._match[self._state]:
                self.stopped, self._held, self.found = True, "", text[end - match : end]
                return text[:end - match]
        safe = len(text) - self._length[self._state]
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """The rest of a text that ended inside an incomplete stop string."""
        text, self._held, self._state = self._held, "", 0
        return text

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._children[state]:
                self._children[state][char] = len(self._children)
                self._children.append({})
                self._length.append(self._length[state] + 1)
                self._shorter.append(0)
                self._match.append(0)
            state = self._children[state][char]
        self._match[state] = len(stop)

    def _link(self) -> None:
        """Fill `_shorter` and the matches that follow from it, shorter prefixes first."""
        queue = list(self._children[0].values())
        for state in queue:   # grows while it is read
            for char, child in self._children[state].items():
                shorter = self._step(self._shorter[state], char)
                self._shorter[child] = shorter
                self._match[child] = self._match[child] or self._match[shorter]
                queue.append(child)

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._children[state]:
            state = self._shorter[state]
        return self._children[state].get(char, 0)


def _utf8_size(lead: int) -> int:
    """How many bytes a character has that begins with this byte; 1 if there is none."""
    if 0xC2 <= lead <= 0xDF:
        return 2
    if 0xE0 <= lead <= 0xEF:
        return 3
    return 4 if 0xF0 <= lead <= 0xF4 else 1


def _checked_stops(stops: str | Iterable[str]) -> list[str]:
    if isinstance(stops, str):
        stops = [stops]
    if not isinstance(stops, Iterable):
        raise BadRequest(f"stop must be a string or a list of strings, not {type(stops).__name__}", "stop")
    checked = []
    for i, stop in enumerate(stops):
        checked.append(check_text(stop, f"stop[{i}]"))
        if not stop:
            raise BadRequest(f"stop[{i}] is empty", f"stop[{i}]")
    return checked
