"""The interface of all tokenizers, and the checks of incoming text.

    Tokenizer
    ├── SentencePieceTokenizer    tokenizer.model (text/sentencepiece.py)
    └── BPETokenizer              tokenizer.json (text/bpe.py)

There are three kinds of ids: words of the vocabulary, added tokens with a text, and padding without a name in any file. Control
tokens (<s>, <|im_end|>, ...) and added words (<tool_call>, ...: decoding shows them) never come from users' text: `encode`
spells their text in ordinary tokens. Only `encode_markup`, for a chat template's own text, gives them. Some vocabularies store
indentation as added tokens of white space; these are treated as ordinary words.
"""

from __future__ import annotations

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsIndex

from edgemistral.errors import BadRequest

if TYPE_CHECKING:
    from edgemistral.text.chat import ChatTemplate

Messages = Sequence[Mapping[str, Any]]   # {"role": "system" | "user" | "assistant", "content": str, ...} each


BOUNDARY = "\x02"   # a control character, so part of no learnt piece


class Tokenizer(ABC):
    """Text <-> token ids of one model. Immutable after construction, so threads may share it.

    vocab_size: the model's (rows of its embedding). n_words: ids below it may have a text; higher ids are padding.
    bos_id: begins a text; None if the model has none. eos_id: ends a text; turn_end_id: ends a turn in the model's own
    template; end_ids: all ids that end an answer.
    adds_bos: whether a text without a template begins with bos_id. defaults: the model's own sampling parameters.
    answers_begin_with_space: whether the first token of an answer begins with a space that decoding drops.
    bytes_split_characters: whether any token may end in the middle of a character.
    """

    vocab_size: int
    n_words: int
    bos_id: int | None
    eos_id: int
    turn_end_id: int
    adds_bos: bool = True
    end_ids: frozenset[int] = frozenset()
    defaults: Mapping[str, Any] = {}
    chat: ChatTemplate
    control: Mapping[int, str]      # id -> text of the control tokens
    added_words: Mapping[int, str] = {}     # id -> text of the added tokens that decoding shows, except white space
    answers_begin_with_space: bool = False
    bytes_split_characters: bool = False

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text without bos_id. Never a control id or an added word, even if the text contains its name.

        BadRequest: not valid Unicode.
        """

    @abstractmethod
    def _encode_within(self, text: str) -> list[int]:
        """`encode` of a text that follows a control token."""

    @abstractmethod
    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of ids: control ids and padding ids give nothing, bytes that are not valid UTF-8 give U+FFFD.

        Raises BadRequest for an id outside the vocabulary.
        """

    @abstractmethod
    def piece(self, token_id: SupportsIndex) -> str:
        """The piece as the model spells it, such as `▁the`, `<0x0A>` or `</s>`; "" for a padding id."""

    @abstractmethod
    def byte(self, token_id: SupportsIndex) -> int | None:
        """The byte that a byte-fallback id stands for, None for any other id."""

    @abstractmethod
    def surface(self, token_id: SupportsIndex) -> str:
        """The text that an id adds in the middle of a text; "" for a control id."""

    @abstractmethod
    def first_surface(self, token_id: SupportsIndex) -> str:
        """The text that an id adds at the beginning of a text, where a leading space is dropped."""

    def token_bytes(self, token_id: SupportsIndex) -> bytes:
        """The bytes that an id adds in the middle of a text; none for a control id or padding."""
        byte = self.byte(token_id)
        return self.surface(token_id).encode() if byte is None else bytes([byte])

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text in the middle of another one, without the space that `encode` may put in front."""
        before = self.encode(BOUNDARY)
        return self.encode(BOUNDARY + text)[len(before):]

    def encode_markup(self, text: str, ordinary: Mapping[str, str]) -> list[int]:
        """Ids of a template's text with its markup recognised; each key of `ordinary` is replaced by text without markup."""
        ids: list[int] = []
        for at, part in enumerate(self._markup_pattern.split(text)):
            if at % 2:
                ids.append(self._markup_ids[part])
            elif part:
                for stand_in, meant in ordinary.items():
                    part = part.replace(stand_in, meant)
                ids += self._encode_within(part) if ids else self.encode(part)
        return ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """The ids of a conversation in the form of the chat template; the model's answer follows them.

        A message has a `role` and a `content`, a str. If the last message is the assistant's and not empty, it is continued.
        Raises BadRequest, whose `field` says for example `messages[2].role`.
        """
        return self.chat.encode(self, messages, tools)

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self.chat.name != "none"

    @cached_property
    def markup(self) -> dict[int, str]:
        """Id -> text of all tokens that only a template's own text may contain."""
        return {**self.added_words, **self.control}

    @cached_property
    def _markup_ids(self) -> dict[str, int]:
        return {text: token_id for token_id, text in self.markup.items()}

    @cached_property
    def _markup_pattern(self) -> re.Pattern[str]:
        texts = sorted(filter(None, self._markup_ids), key=len, reverse=True)     # the longest of several counts
        return re.compile("(" + "|".join(map(re.escape, texts)) + ")" if texts else "((?!))")

    def _checked(self, token_id: SupportsIndex) -> int:
        try:
            index = operator.index(token_id)
        except TypeError:
            raise BadRequest(f"a token id is {token_id!r}, which is not an integer", "ids") from None
        if not 0 <= index < self.vocab_size:
            raise BadRequest(f"token id {index} is outside the vocabulary of {self.vocab_size}", "ids")
        return index


def is_blank(text: str) -> bool:
    """Whether a token's text is white space, in any spelling."""
    return not text.replace("▁", " ").strip()


def check_text(text: object, field: str) -> str:
    """The text if it is a str that UTF-8 can encode (JSON may contain half a surrogate pair), else BadRequest."""
    if not isinstance(text, str):
        raise BadRequest(f"{field} must be a string, not {type(text).__name__}", field)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(f"{field} has half a surrogate pair at character {error.start}", field) from None
    return text
