"""Text <-> token ids over a SentencePiece model. The reference is mistral-common: the same ids for the same text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import SupportsIndex

from edgemistral.errors import BadInput
from edgemistral.text.chat import chat_template
from edgemistral.text.settings import TextSettings
from edgemistral.text.tokenizer import Tokenizer, any_of, check_text, restore

BOUNDARY = "\x02"   # a control character, so part of no learnt piece


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model given as the bytes of its file, with the added tokens that `settings` names.

    `name` appears in error messages. Raises BadInput when the bytes are no such model, lack <s> or </s>, or hold more
    pieces than `vocab_size`, and when an added token lies outside it.
    """

    def __init__(
        self, model: bytes, vocab_size: int | None = None, name: str = "tokenizer.model",
        settings: TextSettings | None = None,
    ) -> None:
        from sentencepiece import SentencePieceProcessor  # here, so that importing the package stays fast

        if not model:   # sentencepiece takes this for "nothing to load yet"
            raise BadInput(f"{name} is empty")
        try:
            self._model = SentencePieceProcessor(model_proto=bytes(model))
            self._n_pieces: int = self._model.vocab_size()
            self._pieces: list[str] = self._model.id_to_piece(list(range(self._n_pieces)))   # all of them are valid UTF-8
            self._unk_id: int = self._model.unk_id()
            self._unk_text: str = self._model.decode([self._unk_id])
        except (RuntimeError, ValueError) as error:
            raise BadInput(f"{name} is not a SentencePiece model") from error
        self.settings = settings or TextSettings()
        self._added = {
            token_id: token for token_id, token in self.settings.added.items()
            if token_id >= self._n_pieces or self._pieces[token_id] != token[0]
        }
        self.n_words = max([self._n_pieces, *(token_id + 1 for token_id in self._added)])
        self.vocab_size = self.n_words if vocab_size is None else vocab_size
        if self._n_pieces > self.vocab_size:
            raise BadInput(f"{name} has {self._n_pieces} pieces, but the model's vocabulary only {self.vocab_size}")
        if self.n_words > self.vocab_size:
            text = self._added[self.n_words - 1][0]
            raise BadInput(
                f"the added token {text[:80]!r} has id {self.n_words - 1}, but the model's vocabulary is {self.vocab_size}"
            )
        self.bos_id = self._model.bos_id()
        self.eos_id = self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise BadInput(f"{name} has no <s> or no </s>")
        self.controls = {
            self._pieces[i]: i for i in range(self._n_pieces) if self._model.is_control(i) or self._model.is_unknown(i)
        } | {text: token_id for token_id, (text, _) in self.settings.added.items()}
        self._pattern = any_of(self.controls)
        self.byte_fallback = True
        self.chat = chat_template(self)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(check_text(text, "text"))
        return ids

    def encode_rendered(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        ids: list[int] = []
        begin = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            ids += self._segment(restore(text[begin : match.start()], stand_ins), begin == 0)
            ids.append(self.controls[match[0]])
            begin = match.end()
        return ids + self._segment(restore(text[begin:], stand_ins), begin == 0)

    def _segment(self, text: str, first: bool) -> list[int]:
        """Ids of a text between two added tokens."""
        if not text:
            return []
        if first or self.settings.legacy:
            return self.encode(text)
        return self.encode(BOUNDARY + text)[len(self.encode(BOUNDARY)) :]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        checked = [self._checked(token_id) for token_id in ids]
        if self._added and any(token_id in self._added for token_id in checked):
            return super().decode(checked)
        text: str = self._model.decode([token_id for token_id in checked if token_id < self._n_pieces])
        return text

    def piece(self, token_id: SupportsIndex) -> str:
        checked = self._checked(token_id)
        if checked in self._added:
            return self._added[checked][0]
        return self._pieces[checked] if checked < self._n_pieces else ""

    def byte(self, token_id: SupportsIndex) -> int | None:
        """The byte that a byte-fallback id stands for, None for any other id."""
        checked = self._checked(token_id)
        if checked in self._added or checked >= self._n_pieces or not self._model.is_byte(checked):
            return None
        return int(self._pieces[checked][3:5], 16)   # <0xE2>

    def token_bytes(self, token_id: SupportsIndex, first: bool = False) -> bytes | None:
        checked = self._checked(token_id)
        if checked in self._added:
            text, special = self._added[checked]
            return b"" if special else text.encode()
        if checked >= self._n_pieces:
            return None
        byte = self.byte(checked)
        if byte is not None:
            return bytes([byte])
        decoded: str = self._model.decode([checked] if first else [self._unk_id, checked])
        return (decoded if first else decoded[len(self._unk_text) :]).encode()
