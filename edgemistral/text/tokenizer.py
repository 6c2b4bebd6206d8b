"""Text <-> token ids over SentencePiece, and the chat template of the Mistral Instruct models.

The reference is mistral-common: the same ids for the same text and the same conversation. Two templates exist, and the
tokenizer model itself says which one its weights were trained on:

    v1      32000 pieces, Mistral-7B-Instruct v0.1 and v0.2: [INST] and [/INST] are ordinary text
            <s> {[INST] user [/INST]} {assistant} </s> {[INST] user [/INST]} ...     each {} encoded on its own
            a system text and a blank line stand before the first user text
    v2, v3  32768 pieces, v0.3: [INST] and [/INST] are control ids
            <s> [INST] {user} [/INST] {assistant} </s> [INST] {user} [/INST] ...
            a system text and a blank line stand before the last user text; assistant texts lose their trailing spaces
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

from edgemistral.errors import BadInput, BadRequest

Messages = Sequence[Mapping[str, Any]]   # {"role": "system" | "user" | "assistant", "content": str} each
BLANK_LINE = "\n\n"
ROLES = ("system", "user", "assistant")


class Tokenizer:
    """A SentencePiece model given as the bytes of its file.

    `vocab_size` is the model's (rows of its embedding); it may exceed the `n_words` pieces of the tokenizer, because
    checkpoints pad their embeddings: the ids between stand for no text. `name` appears in error messages.
    Raises BadInput when the bytes are no such model, lack <s> or </s>, or hold more pieces than `vocab_size`.
    Immutable after construction, so threads may share it.
    """

    def __init__(self, model: bytes, vocab_size: int | None = None, name: str = "tokenizer.model") -> None:
        from sentencepiece import SentencePieceProcessor  # here, so that importing the package stays fast

        if not model:   # sentencepiece takes this for "nothing to load yet"
            raise BadInput(f"{name} is empty")
        try:
            self._model = SentencePieceProcessor(model_proto=bytes(model))
            self.n_words: int = self._model.vocab_size()
            self._pieces: list[str] = self._model.id_to_piece(list(range(self.n_words)))   # all of them are valid UTF-8
            self._unk_id: int = self._model.unk_id()
            self._unk_text: str = self._model.decode([self._unk_id])
        except (RuntimeError, ValueError) as error:
            raise BadInput(f"{name} is not a SentencePiece model") from error
        self.vocab_size = self.n_words if vocab_size is None else vocab_size
        if self.n_words > self.vocab_size:
            raise BadInput(f"{name} has {self.n_words} pieces, but the model's vocabulary only {self.vocab_size}")
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise BadInput(f"{name} has no <s> or no </s>")
        begin, end = (self._model.piece_to_id(piece) for piece in ("[INST]", "[/INST]"))
        self._inst_ids = (begin, end) if self._model.is_control(begin) and self._model.is_control(end) else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text without <s>; never a control id, whatever the text spells. BadRequest: not valid Unicode."""
        ids: list[int] = self._model.encode(check_text(text, "text"))
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of ids: control ids and padding ids give nothing, bytes that are no UTF-8 give U+FFFD each.

        Raises BadRequest for an id outside the vocabulary.
        """
        checked = [self._checked(token_id) for token_id in ids]
        text: str = self._model.decode([token_id for token_id in checked if token_id < self.n_words])
        return text

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids, from <s> on, after which the model writes its answer to a conversation.

        A message has a `role` (system, user or assistant) and a `content`, a str; other keys are ignored. As in
        mistral-common, consecutive messages of one role become one, with a blank line between the texts that are not
        empty, and an empty user turn stands before a conversation that has only a system text or that the assistant
        opens. Stricter than it: a system message may only stand at the beginning (it would move it there silently).
        An assistant message at the end gets no </s>: the model goes on writing it (its `prefix`). An empty one earlier
        gives just </s>, which is what a model that answered nothing has written.

        Raises BadRequest, whose `field` says for example `messages[2].role`.
        """
        system, turns = chat_turns(messages)
        last_user = max(i for i, (role, _) in enumerate(turns) if role == "user")
        system_at = last_user if self._inst_ids else 0
        ids = [self.bos_id]
        for i, (role, text) in enumerate(turns):
            if role == "user":
                ids += self._user_turn(system + BLANK_LINE + text if system and i == system_at else text)
            else:
                ids += self.encode(text.rstrip(" ") if self._inst_ids else text)
                if i + 1 < len(turns):
                    ids.append(self.eos_id)
        return ids

    def piece(self, token_id: SupportsIndex) -> str:
        """The piece as the model spells it, such as `▁the`, `<0x0A>` or `</s>`; "" for a padding id."""
        checked = self._checked(token_id)
        return self._pieces[checked] if checked < self.n_words else ""

    def byte(self, token_id: SupportsIndex) -> int | None:
        """The byte that a byte-fallback id stands for, None for any other id."""
        checked = self._checked(token_id)
        if checked >= self.n_words or not self._model.is_byte(checked):
            return None
        return int(self._pieces[checked][3:5], 16)   # <0xE2>

    def surface(self, token_id: SupportsIndex) -> str:
        """The text that an id adds in the middle of a text, where no leading space is dropped; "" for a control id."""
        return self.decode([self._unk_id, token_id])[len(self._unk_text):]

    def _user_turn(self, text: str) -> list[int]:
        if self._inst_ids is None:
            return self.encode(f"[INST] {text} [/INST]")
        begin, end = self._inst_ids
        return [begin, *self.encode(text), end]

    def _checked(self, token_id: SupportsIndex) -> int:
        try:
            index = operator.index(token_id)
        except TypeError:
            raise BadRequest(f"a token id is {token_id!r}, which is not an integer", "ids") from None
        if not 0 <= index < self.vocab_size:
            raise BadRequest(f"token id {index} is outside the vocabulary of {self.vocab_size}", "ids")
        return index


def check_text(text: object, field: str) -> str:
    """The text if it is a str that UTF-8 can hold (JSON can smuggle in half a surrogate pair), else BadRequest."""
    if not isinstance(text, str):
        raise BadRequest(f"{field} must be a string, not {type(text).__name__}", field)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(f"{field} has half a surrogate pair at character {error.start}", field) from None
    return text


def chat_turns(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
    """Messages -> the system text and turns (role, text) that alternate and begin with the user.

    Raises BadRequest, whose `field` says for example `messages[2].role`.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise BadRequest(f"messages must be a list of messages, not {type(messages).__name__}", "messages")
    if not messages:
        raise BadRequest("messages is empty: a conversation needs a message", "messages")
    merged: list[tuple[str, list[str]]] = []
    for i, message in enumerate(messages):
        field = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise BadRequest(f"{field} must be an object with role and content, not {type(message).__name__}", field)
        for key in ("role", "content"):
            if key not in message:
                raise BadRequest(f"{field}.{key} is missing", f"{field}.{key}")
        role, content = message["role"], check_text(message["content"], f"{field}.content")
        if role not in ROLES:
            raise BadRequest(f"{field}.role is {role!r:.40}: must be system, user or assistant", f"{field}.role")
        if role == "system" and merged and merged[-1][0] != "system":
            raise BadRequest(f"{field}.role is 'system', which may only come first", f"{field}.role")
        if not merged or merged[-1][0] != role:
            merged.append((role, []))
        if content:
            merged[-1][1].append(content)
    turns = [(role, BLANK_LINE.join(texts)) for role, texts in merged]
    if len(turns) == 1 and turns[0][0] == "assistant":
        raise BadRequest("messages[0].role is 'assistant', and nobody speaks to it", "messages[0].role")
    system = turns.pop(0)[1] if turns[0][0] == "system" else ""
    if not turns or turns[0][0] != "user":
        turns.insert(0, ("user", ""))
    return system, turns
