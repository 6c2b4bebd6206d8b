"""Text <-> token ids by a tokenizer.json, through Hugging Face's `tokenizers` library.

Two styles exist among models of this architecture. Byte-level BPE (Llama 3, SmolLM) spells bytes as visible characters, and
a token may end inside a character. SentencePiece-like BPE (what transformers makes of a tokenizer.model) spells a space as ▁
and a byte as <0x0A>.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, SupportsIndex

from edgemistral.errors import BadInput, EdgeMistralError
from edgemistral.extras import missing
from edgemistral.text.chat import ChatTemplate, MistralTemplate
from edgemistral.text.sentencepiece import AddedTokens
from edgemistral.text.tokenizer import Tokenizer, check_text, is_blank

MARK = "\uf8fe"    # a private-use character that stands for the control token before a text
SPACE = "▁"


class BPETokenizer(Tokenizer):
    """A tokenizer.json given as the bytes of its file.

    added: tokens from other files (id -> text, whether it is a control token); they override those of this file.
    bos_id, eos_id: from the checkpoint. mistral_version: see `TextSpec`.
    Raises BadInput if the bytes are not such a tokenizer, or hold more ids than `vocab_size`.
    """

    def __init__(
        self,
        data: bytes,
        vocab_size: int | None = None,
        name: str = "tokenizer.json",
        added: AddedTokens | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        adds_bos: bool = False,
        chat: ChatTemplate | None = None,
        mistral_version: int | None = None,
    ) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ModuleNotFoundError as error:
            raise EdgeMistralError(missing(error) or str(error)) from None

        try:
            fields = json.loads(data)
            kind = fields["model"].get("type", "BPE")
            if kind != "BPE":
                raise BadInput(f"a model of type {kind!r:.20}; supported: BPE")
            known = {int(t["id"]): (str(t["content"]), bool(t["special"])) for t in fields.get("added_tokens") or []}
            whole = Library.from_str(json.dumps(fields))
            self._plain = Library.from_str(json.dumps(_without_markup(fields)))
        except Exception as error:     # the library raises bare Exceptions
            raise BadInput(f"{name} is not a tokenizer.json: {' '.join(str(error).split())[:120]}") from None
        self._ids: dict[str, int] = whole.get_vocab(with_added_tokens=True)
        if vocab_size is not None:     # added tokens without a row in the embeddings
            beyond = {text for token_id, (text, _) in known.items() if token_id >= vocab_size}
            known = {token_id: token for token_id, token in known.items() if token_id < vocab_size}
            self._ids = {piece: token_id for piece, token_id in self._ids.items() if piece not in beyond}
        pieces = {token_id: piece for piece, token_id in self._ids.items()}
        added = {**known, **{i: t for i, t in (added or {}).items() if i not in pieces or i in known}}
        for token_id, (text, _) in added.items():
            pieces[token_id] = text
            self._ids.setdefault(text, token_id)
        self._pieces = pieces
        self.n_words = max(pieces, default=-1) + 1
        self.vocab_size = self.n_words if vocab_size is None else vocab_size
        if self.n_words > self.vocab_size:
            raise BadInput(f"{name} has {self.n_words} tokens, but the model's vocabulary only {self.vocab_size}")
        self.control = {i: text for i, (text, special) in added.items() if special}
        self._words = {i: text for i, (text, special) in added.items() if not special}
        self.added_words = {i: text for i, text in self._words.items() if not is_blank(text)}
        self.bos_id, self.adds_bos = bos_id, adds_bos and bos_id is not None
        if eos_id is None:
            raise BadInput(f"{name}: no file says which token ends a turn (eos_token)")
        self.eos_id, self.turn_end_id, self.end_ids = eos_id, eos_id, frozenset({eos_id})
        self.bytes_split_characters = "ByteLevel" in json.dumps([fields.get("pre_tokenizer"), fields.get("decoder")])
        self._drops_space = _drops_space(fields)
        begin, end = self._ids.get("[INST]"), self._ids.get("[/INST]")
        self.inst_ids = (begin, end) if begin in self.control and end in self.control else None
        others = self.bytes_split_characters and mistral_version is None
        own: ChatTemplate = NoTemplate() if others else MistralTemplate(self.control.values(), mistral_version)
        self.chat = chat or own
        self.answers_begin_with_space = isinstance(self.chat, MistralTemplate) and self._drops_space

    def encode(self, text: str) -> list[int]:
        return self._spelled(check_text(text, "text"), 0)

    def _encode_within(self, text: str) -> list[int]:
        return self._spelled(text, 0) if MARK in text else self._spelled(MARK + text, 1)

    def _spelled(self, text: str, skip: int, whole: bool = True) -> list[int]:
        tokens: list[str] = self._plain.encode(text, add_special_tokens=False).tokens[skip:]
        ids = [self._ids[token] for token in tokens if token in self._ids]
        if not self.markup.keys() & set(ids):
            return ids
        # If the vocabulary's merges lead to an added token's text, that text is encoded letter by letter.
        if not whole:
            return [token_id for token_id in ids if token_id not in self.markup]
        return [i for token, token_id in zip(tokens, ids, strict=True) for i in (
            [each for letter in token for each in self._spelled(MARK + letter, 1, False)]
            if token_id in self.markup and len(token) > 1 else [token_id]
        )]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        checked = [self._checked(token_id) for token_id in ids]
        if self.bytes_split_characters:
            return b"".join(map(self.token_bytes, checked)).decode("utf-8", "replace")
        from edgemistral.text.stream import StreamDecoder

        decoder = StreamDecoder(self)
        return "".join([*map(decoder.push, checked), decoder.flush()])

    def first_surface(self, token_id: SupportsIndex) -> str:
        return self.surface(token_id).removeprefix(" " if self._drops_space else "")

    def piece(self, token_id: SupportsIndex) -> str:
        return self._pieces.get(self._checked(token_id), "")

    def byte(self, token_id: SupportsIndex) -> int | None:
        piece = self.piece(token_id)
        if self.bytes_split_characters or len(piece) != 6 or not piece.startswith("<0x") or piece[-1] != ">":
            return None
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None

    def surface(self, token_id: SupportsIndex) -> str:
        if self.bytes_split_characters:
            return self.token_bytes(token_id).decode("utf-8", "replace")
        checked = self._checked(token_id)
        if checked in self.control:
            return ""
        return self._words.get(checked) or self.piece(checked).replace(SPACE, " ")

    def token_bytes(self, token_id: SupportsIndex) -> bytes:
        if not self.bytes_split_characters:
            return super().token_bytes(token_id)
        checked = self._checked(token_id)
        if checked in self.control:
            return b""
        if checked in self._words:
            return self._words[checked].encode()
        return b"".join(BYTES.get(character, character.encode()) for character in self.piece(checked))


class NoTemplate:
    """For a model without a chat template that is not Mistral's."""

    name, takes_tools = "none", False
    text: str | None = None

    def encode(self, tokenizer: Any, messages: Any, tools: Any = None) -> list[int]:
        from edgemistral.errors import BadRequest

        raise BadRequest(
            "this model has no chat template: use it for completions (run --raw, /v1/completions), or add a template with "
            "`quantize --chat-template FILE`", "messages",
        )


def _without_markup(fields: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without its added tokens, except white space, and with MARK as a control token."""
    kept = [token for token in fields.get("added_tokens") or [] if not token["special"] and is_blank(token["content"])]
    last = max((int(token["id"]) for token in fields.get("added_tokens") or []), default=0)
    mark = {"id": last + (1 << 20), "content": MARK, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}
    return {**fields, "added_tokens": [*kept, mark], "post_processor": None, "truncation": None, "padding": None}


def _drops_space(fields: dict[str, Any]) -> bool:
    """Whether decoding drops the space that encoding puts before a text."""
    decoder = fields.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return any(
        (step.get("type") == "Strip" and step.get("start")) or
        (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never") for step in steps
    )


def _visible_bytes() -> dict[str, bytes]:
    """GPT-2's spelling of bytes: printable bytes are unchanged, the others are characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}
    return {character: bytes([byte]) for byte, character in spelled.items()}


BYTES = _visible_bytes()
