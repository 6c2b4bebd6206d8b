"""Text <-> token ids over a tokenizer.json, by Hugging Face's `tokenizers`: byte-level BPE, and BPE as SentencePiece does it.

Two encoders are made of one file. The full one knows all added tokens and reads what templates wrote; the plain one
knows none, so that what people wrote stays text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, SupportsIndex

from edgemistral.errors import BadInput
from edgemistral.files import strict_json
from edgemistral.text.chat import chat_template
from edgemistral.text.settings import TextSettings
from edgemistral.text.tokenizer import Tokenizer, check_text, restore

SPACE = "▁"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json given as bytes, with the further added tokens that `settings` names.

    `name` begins messages. Raises BadInput when the bytes are no tokenizer.json with a BPE model, or when an id lies
    outside `vocab_size`.
    """

    def __init__(
        self, model: bytes, vocab_size: int | None = None, name: str = "tokenizer.json",
        settings: TextSettings | None = None,
    ) -> None:
        self.settings = settings = settings or TextSettings(kind="tokenizers")
        fields = strict_json.parse(model, name, BadInput)
        kind = fields.get("model", {}).get("type", "BPE") if isinstance(fields, dict) and "model" in fields else None
        if kind != "BPE":
            raise BadInput(f"{name} holds {f'a {kind} model' if kind else 'no model'}; supported is BPE")
        vocabulary = fields["model"].get("vocab")
        own_added = fields.get("added_tokens") or []
        if not isinstance(vocabulary, dict) or not all(type(i) is int and i >= 0 for i in vocabulary.values()):
            raise BadInput(f"{name} has no vocabulary of pieces and ids")
        if not isinstance(own_added, list) or not all(map(_is_added_token, own_added)):
            raise BadInput(f"{name} has added_tokens of another form")
        known = {token["content"] for token in own_added}
        added = own_added + [
            {"id": token_id, "content": text, "special": special, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False}
            for token_id, (text, special) in sorted(settings.added.items()) if text not in known
        ]
        self._pieces: dict[int, str] = {i: piece for piece, i in vocabulary.items()}
        self._added = {token["id"]: (token["content"], bool(token.get("special"))) for token in added}
        self._pieces |= {token_id: text for token_id, (text, _) in self._added.items()}
        self.n_words = max(self._pieces, default=-1) + 1
        self.vocab_size = self.n_words if vocab_size is None else vocab_size
        if self.n_words > self.vocab_size:
            piece = self._pieces[self.n_words - 1][:80]
            raise BadInput(f"{name} gives {piece!r} the id {self.n_words - 1}, but the model's vocabulary is {self.vocab_size}")
        # White space as an added token is how some vocabularies store indentation: text like any other.
        self.controls = {text: token_id for token_id, (text, _) in self._added.items() if text.strip()}
        kept = [token for token in added if not token["content"].strip() and not token.get("special")]
        types = {part.get("type") for part in _parts([fields.get("pre_tokenizer"), fields.get("decoder")])}
        self._byte_level = "ByteLevel" in types
        self.byte_fallback = not self._byte_level and bool(fields["model"].get("byte_fallback"))
        self._drops_space = any(
            (part.get("type") == "Strip" and part.get("start", 0) > 0)
            or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
            for part in _parts(fields.get("decoder"))
        )
        self._full = _Encoder(fields, added, name)
        self._plain = _Encoder(fields, kept, name)
        inner = _without_first_space(fields)
        self._plain_inside = self._plain if inner is None else _Encoder(inner, kept, name)
        self._control_ids = frozenset(self.controls.values())
        self.bos_id = self._id_of("bos_token", "<s>", "<|begin_of_text|>", "<|startoftext|>")
        self.eos_id = self._id_of("eos_token", "</s>", "<|end_of_text|>", "<|endoftext|>")
        self.chat = chat_template(self)

    def _id_of(self, role: str, *usual: str) -> int:
        """The id of a token that the settings name, else of one that is usual for it; -1 if there is none."""
        for text in (self.settings.names.get(role), *usual):
            if text is not None and text in self.controls:
                return self.controls[text]
        return -1

    def encode(self, text: str) -> list[int]:
        return self._ordinary(check_text(text, "text"), self._plain)

    def encode_rendered(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        whole = self._full.encode(text)
        if not stand_ins:
            return [token_id for token_id, _, _ in whole]
        ids: list[int] = []
        end = 0   # of the last control text
        for token_id, begin, after in whole:
            if token_id in self._control_ids:
                ids += self._segment(restore(text[end:begin], stand_ins), end == 0)
                ids.append(token_id)
                end = after
        return ids + self._segment(restore(text[end:], stand_ins), end == 0)

    def _segment(self, text: str, first: bool) -> list[int]:
        return self._ordinary(text, self._plain if first else self._plain_inside) if text else []

    def _ordinary(self, text: str, encoder: _Encoder) -> list[int]:
        """Ids of a text, none of them a control id."""
        tokens = encoder.encode(text)
        for token_id, begin, end in tokens:
            # Some models look up whole words before they merge, and so find control tokens in their vocabulary.
            if token_id in self._control_ids and end - begin > 1 and self._added[token_id][0] == text[begin:end]:
                middle = (begin + end) // 2
                return self._ordinary(text[:middle], encoder) + self._ordinary(text[middle:], self._plain_inside)
        return [token_id for token_id, _, _ in tokens]

    def piece(self, token_id: SupportsIndex) -> str:
        return self._pieces.get(self._checked(token_id), "")

    def byte(self, token_id: SupportsIndex) -> int | None:
        if self._byte_level:
            return super().byte(token_id)
        checked = self._checked(token_id)
        return None if checked in self._added else _fallback_byte(self._pieces.get(checked, ""))

    def token_bytes(self, token_id: SupportsIndex, first: bool = False) -> bytes | None:
        checked = self._checked(token_id)
        if checked in self._added:
            text, special = self._added[checked]
            return b"" if special else text.encode()
        piece = self._pieces.get(checked)
        if piece is None:
            return None
        if self._byte_level:
            table = _byte_of_character()
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
        byte = _fallback_byte(piece) if self.byte_fallback else None
        if byte is not None:
            return bytes([byte])
        text = piece.replace(SPACE, " ")
        return (text.removeprefix(" ") if first and self._drops_space else text).encode()


class _Encoder:
    """`tokenizers` over one description, with ids as the files name them."""

    def __init__(self, fields: Mapping[str, Any], added: list[dict[str, Any]], name: str) -> None:
        from tokenizers import Tokenizer as Library

        described = {**fields, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
        try:
            self._library = Library.from_str(json.dumps(described))
        except Exception as problem:   # the library raises Exception itself
            raise BadInput(f"{name} is not a tokenizer.json that can be read: {' '.join(str(problem).split())[:200]}") from None
        # The library numbers added tokens that its vocabulary lacks one after another, whatever the file says.
        given = ((self._library.token_to_id(token["content"]), token["id"]) for token in added)
        self._renamed = {theirs: ours for theirs, ours in given if theirs is not None and theirs != ours}

    def encode(self, text: str) -> list[tuple[int, int, int]]:
        """(id, begin, end) of each token; begin and end count characters of the text."""
        encoded = self._library.encode(text, add_special_tokens=False)
        renamed = self._renamed
        return [
            (renamed.get(token_id, token_id), begin, end)
            for token_id, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True)
        ]


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A pre-tokenizer or decoder and all that it is made of."""
    if isinstance(part, list):
        for each in part:
            yield from _parts(each)
    elif isinstance(part, dict):
        yield part
        for name in ("pretokenizers", "decoders", "normalizers"):
            yield from _parts(part.get(name))


def _without_first_space(fields: dict[str, Any]) -> dict[str, Any] | None:
    """The same tokenizer for a text behind another one; None if that makes no difference."""
    if not any(part.get("prepend_scheme") == "first" for part in _parts(fields.get("pre_tokenizer"))):
        return None
    changed = {**fields, "pre_tokenizer": copy.deepcopy(fields["pre_tokenizer"])}
    for part in _parts(changed["pre_tokenizer"]):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    return changed


def _is_added_token(token: Any) -> bool:
    return (
        isinstance(token, dict) and type(token.get("id")) is int and token["id"] >= 0
        and isinstance(token.get("content"), str) and bool(token["content"])
    )


def _fallback_byte(piece: str) -> int | None:
    """<0xE2> -> 0xE2."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


@cache
def _byte_of_character() -> dict[str, int]:
    """How byte-level BPE spells bytes (GPT-2's encoder.py): printable ones as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
