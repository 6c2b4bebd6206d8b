"""Text <-> token ids by a SentencePiece model (tokenizer.model). The reference is mistral-common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

from edgemistral.errors import BadInput
from edgemistral.text.chat import ChatTemplate, MistralTemplate
from edgemistral.text.tokenizer import Tokenizer, check_text, is_blank

AddedTokens = Mapping[int, tuple[str, bool]]    # id -> text, and whether it is a control token


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model given as the bytes of its file.

    `vocab_size` may exceed the pieces of the tokenizer, because checkpoints add tokens (`added`) and pad their embeddings; all
    other ids have no text. legacy: a text after a control token begins with a space, as in transformers' older Llama
    tokenizers. `name` appears in error messages.
    Raises BadInput if the bytes are not such a model, lack <s> or </s>, or hold more pieces than `vocab_size`.
    """

    def __init__(
        self,
        model: bytes,
        vocab_size: int | None = None,
        name: str = "tokenizer.model",
        added: AddedTokens | None = None,
        legacy: bool = True,
        chat: ChatTemplate | None = None,
    ) -> None:
        from sentencepiece import SentencePieceProcessor  # here, so that importing the package stays fast

        if not model:   # sentencepiece would load nothing, without an error
            raise BadInput(f"{name} is empty")
        try:
            self._model = SentencePieceProcessor(model_proto=bytes(model))
            self._n_pieces: int = self._model.vocab_size()
            self._pieces: list[str] = self._model.id_to_piece(list(range(self._n_pieces)))   # all of them are valid UTF-8
            self._unk_id: int = self._model.unk_id()
            self._unk_text: str = self._model.decode([self._unk_id])
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadInput(f"{name} is not a SentencePiece model") from error
        # Files list the model's own pieces among the added ones; only the missing ones are added.
        self._added = {i: text for i, (text, _) in (added or {}).items() if i >= self._n_pieces and text}
        self.n_words = max(self._n_pieces, *(i + 1 for i in self._added)) if self._added else self._n_pieces
        self.vocab_size = self.n_words if vocab_size is None else vocab_size
        if self._n_pieces > self.vocab_size:
            raise BadInput(f"{name} has {self._n_pieces} pieces, but the model's vocabulary only {self.vocab_size}")
        bos_id, eos_id = self._model.bos_id(), self._model.eos_id()
        if bos_id < 0 or eos_id < 0:
            raise BadInput(f"{name} has no <s> or no </s>")
        self.bos_id, self.eos_id, self.turn_end_id, self.end_ids = bos_id, eos_id, eos_id, frozenset({eos_id})
        special = {i: text for i, text in self._added.items() if (added or {})[i][1]}
        words = {i: text for i, text in self._added.items() if i not in special}
        self.added_words = {i: text for i, text in words.items() if not is_blank(text)}
        self._blanks = {text: i for i, text in words.items() if is_blank(text)}
        controls = {i: self._pieces[i] for i in range(self._n_pieces) if self._model.is_control(i)}
        self.control = {**controls, **special}
        self._legacy = legacy
        begin, end = (self._model.piece_to_id(piece) for piece in ("[INST]", "[/INST]"))
        self.inst_ids = (begin, end) if self._model.is_control(begin) and self._model.is_control(end) else None
        system = self._model.piece_to_id("[SYSTEM_PROMPT]")
        own: ChatTemplate = MistralTemplate(self.control.values(), 7 if self._model.is_control(system) else None)
        self.chat = chat or own
        self.answers_begin_with_space = isinstance(self.chat, MistralTemplate)

    def encode(self, text: str) -> list[int]:
        check_text(text, "text")
        if not any(blank in text for blank in self._blanks):
            ids: list[int] = self._model.encode(text)
            return ids
        return self._split(text, self._model.encode)

    def _encode_within(self, text: str) -> list[int]:
        return self._split(text, self._model.encode if self._legacy else self.encode_inside)

    def _split(self, text: str, encode: Any) -> list[int]:
        """Cut at added tokens that are white space."""
        for blank, token_id in self._blanks.items():
            before, found, after = text.partition(blank)
            if found:
                later = self._encode_within(after) if after else []
                return [*(self._split(before, encode) if before else []), token_id, *later]
        ids: list[int] = encode(text)
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        text, run = "", []
        for token_id in [self._checked(token_id) for token_id in ids]:
            if token_id < self._n_pieces:
                run.append(token_id)
            elif token_id in self._added and token_id not in self.control:
                text += self._run(run, text) + self._added[token_id]
                run = []
        return text + self._run(run, text)

    def _run(self, ids: list[int], before: str) -> str:
        """The text of pieces of the model. Only at the very beginning does it lose its space."""
        if not before:
            text: str = self._model.decode(ids)
            return text
        inner: str = self._model.decode([self._unk_id, *ids])
        return inner[len(self._unk_text):] if ids else ""

    def first_surface(self, token_id: SupportsIndex) -> str:
        return self.decode([token_id])

    def piece(self, token_id: SupportsIndex) -> str:
        checked = self._checked(token_id)
        return self._pieces[checked] if checked < self._n_pieces else self._added.get(checked, "")

    def byte(self, token_id: SupportsIndex) -> int | None:
        checked = self._checked(token_id)
        if checked >= self._n_pieces or not self._model.is_byte(checked):
            return None
        return int(self._pieces[checked][3:5], 16)   # <0xE2>

    def surface(self, token_id: SupportsIndex) -> str:
        """The text that an id adds in the middle of a text, where no leading space is dropped; "" for a control id."""
        checked = self._checked(token_id)
        if checked >= self._n_pieces:
            return "" if checked in self.control else self._added.get(checked, "")
        return self.decode([self._unk_id, token_id])[len(self._unk_text):]
