"""What every tokenizer can do, whatever its file: text <-> ids, the bytes of an id, and the prompt of a conversation.

`sentencepiece.py` reads SentencePiece models, `bpe.py` a tokenizer.json of Hugging Face; `open_tokenizer` picks one.
"""

from __future__ import annotations

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from edgemistral.errors import BadRequest
from edgemistral.text.settings import TextSettings

if TYPE_CHECKING:
    from edgemistral.text.chat import ChatTemplate

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(ABC):
    """Text <-> token ids. Immutable after construction, so threads may share it.

    `vocab_size` is the model's (rows of its embedding); it may exceed the `n_words` ids that the files name, because
    checkpoints pad their embeddings: the other ids stand for no text.
    """

    vocab_size: int
    n_words: int
    bos_id: int               # -1: the tokenizer has none
    eos_id: int               # -1: the tokenizer has none
    end_ids: tuple[int, ...] = ()   # of the model; the first one ends what a grammar describes; (): eos_id
    settings: TextSettings
    chat: ChatTemplate        # how conversations become prompts
    controls: Mapping[str, int]   # the texts that are one id when a template writes them, and ordinary text otherwise
    byte_fallback: bool       # SentencePiece-like: bytes that no piece holds have ids of their own

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text without <s>; never a control id, whatever the text spells. BadRequest: not valid Unicode."""

    @abstractmethod
    def encode_rendered(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Ids of a rendered template, in which the texts of `controls` become their ids.

        stand_ins: character -> the ordinary text that it stands for, which may spell a control.
        """

    @abstractmethod
    def token_bytes(self, token_id: SupportsIndex, first: bool = False) -> bytes | None:
        """The bytes that an id adds to a text: b"" for a control id, None for a padding id.

        first: at the beginning of a text, where many tokenizers drop the space that they put there.
        """

    @abstractmethod
    def piece(self, token_id: SupportsIndex) -> str:
        """The id as the tokenizer's file spells it, such as `▁the`, `<0x0A>` or `</s>`; "" for a padding id."""

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of ids: control ids and padding ids give nothing, bytes that are no UTF-8 give U+FFFD each.

        Raises BadRequest for an id outside the vocabulary.
        """
        from edgemistral.text.stream import StreamDecoder

        decoder = StreamDecoder(self)
        pieces = [decoder.push(token_id) for token_id in ids]
        return "".join(pieces) + decoder.flush()

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids after which the model writes its answer to a conversation, in the model's own template.

        A message has a `role` and a `content`. An assistant message at the end is continued: its turn stays open.
        `tools` are JSON descriptions of functions; `chat.takes_tools` says whether the template knows them.
        Raises BadRequest, whose `field` says for example `messages[2].role`.
        """
        return self.chat.encode(messages, tools, add_generation_prompt)

    def byte(self, token_id: SupportsIndex) -> int | None:
        """The byte that an id stands for which is no text by itself (byte fallback), None for any other id."""
        data = self.token_bytes(token_id)
        if data is not None and len(data) == 1 and data[0] >= 0x80:
            return data[0]
        return None

    def surface(self, token_id: SupportsIndex) -> str:
        """The text that an id adds in the middle of a text; "" for a control id."""
        return (self.token_bytes(token_id) or b"").decode("utf-8", "replace")

    def is_padding(self, token_id: SupportsIndex) -> bool:
        """Whether no file names the id."""
        return self.token_bytes(token_id) is None

    def _checked(self, token_id: SupportsIndex) -> int:
        try:
            index = operator.index(token_id)
        except TypeError:
            raise BadRequest(f"a token id is {token_id!r}, which is not an integer", "ids") from None
        if not 0 <= index < self.vocab_size:
            raise BadRequest(f"token id {index} is outside the vocabulary of {self.vocab_size}", "ids")
        return index


def open_tokenizer(
    model: bytes, settings: TextSettings, vocab_size: int | None = None, name: str = "tokenizer",
    end_ids: Sequence[int] = (),
) -> Tokenizer:
    """The tokenizer of a blob or a checkpoint; `name` begins messages. Raises BadInput for bytes of another kind."""
    opened: Tokenizer
    if settings.kind == "tokenizers":
        from edgemistral.text.bpe import HuggingFaceTokenizer

        opened = HuggingFaceTokenizer(model, vocab_size, name, settings)
    else:
        from edgemistral.text.sentencepiece import SentencePieceTokenizer

        opened = SentencePieceTokenizer(model, vocab_size, name, settings)
    opened.end_ids = tuple(end_ids) or (opened.eos_id,)
    return opened


def restore(text: str, stand_ins: Mapping[str, str]) -> str:
    """The text with every stand-in replaced by what it stands for."""
    return text.translate({ord(mark): meant for mark, meant in stand_ins.items()}) if stand_ins else text


def any_of(texts: Iterable[str], flags: int = 0) -> re.Pattern[str] | None:
    """A pattern that finds any of these texts, the longest first; None if there are none."""
    ordered = sorted({text for text in texts if text}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered)), flags) if ordered else None


def check_text(text: object, field: str) -> str:
    """The text if it is a str that UTF-8 can hold (JSON can smuggle in half a surrogate pair), else BadRequest."""
    if not isinstance(text, str):
        raise BadRequest(f"{field} must be a string, not {type(text).__name__}", field)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(f"{field} has half a surrogate pair at character {error.start}", field) from None
    return text
