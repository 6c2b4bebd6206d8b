"""A blob's facts about text: tokenizer, added tokens, chat template, ends of turn, sampling defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from edgemistral.errors import BadInput

if TYPE_CHECKING:
    from edgemistral.text.chat import JinjaTemplate
    from edgemistral.text.tokenizer import Tokenizer

KINDS = ("sentencepiece", "tokenizers")


@dataclass(frozen=True)
class TextSpec:
    """The blob's text metadata. Blobs of format 1 use the default of every field.

    kind: of the bytes in the tensor `tokenizer`: a SentencePiece model, or a tokenizer.json. added: (id, text, is control) of
    tokens that those bytes lack. chat_template, tool_template: Jinja texts; None means Mistral's own. special: the texts that a
    template may name. mistral_version: 3 or 7, of Mistral's own template, if the tokenizer is byte-level. end_ids: all ids that
    end a turn; turn_end_id: the id that the model's own template writes. adds_bos: whether a text without a template begins
    with bos_id. legacy: see `SentencePieceTokenizer`. defaults: `SamplingParams`.
    """

    kind: Literal["sentencepiece", "tokenizers"] = "sentencepiece"
    added: tuple[tuple[int, str, bool], ...] = ()
    chat_template: str | None = None
    tool_template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    mistral_version: int | None = None
    bos_id: int | None = None
    end_ids: tuple[int, ...] = ()
    turn_end_id: int | None = None
    adds_bos: bool = True
    legacy: bool = True
    defaults: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not at their defaults, as JSON values."""
        plain = TextSpec()
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: [list(item) for item in value] if name == "added" else list(value) if isinstance(value, tuple)
            else dict(value) if isinstance(value, Mapping) else value
            for name, value in found.items() if value != getattr(plain, name)
        }

    @classmethod
    def from_dict(cls, fields: Any) -> TextSpec:
        """The inverse of `to_dict`. BadInput, naming it: a field that is unknown or of another type."""
        if not isinstance(fields, Mapping):
            raise BadInput("text is not a JSON object")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise BadInput(f"text has unknown fields: {', '.join(unknown)}; a newer edgemistral wrote them")
        checked: dict[str, Any] = {}
        for name, value in fields.items():
            if not _CHECKS[name](value):
                raise BadInput(f"text.{name} is {str(value)[:60]!r}: invalid value")
            checked[name] = value
        if "added" in checked:
            checked["added"] = tuple((item[0], item[1], item[2]) for item in checked["added"])
        if "end_ids" in checked:
            checked["end_ids"] = tuple(checked["end_ids"])
        return cls(**checked)

    @property
    def template(self) -> JinjaTemplate | None:
        """The checkpoint's own chat template; None if a built-in one is used. BadInput: it is not a valid template."""
        from edgemistral.text.chat import JinjaTemplate

        return None if self.chat_template is None else JinjaTemplate(self.chat_template, self.special, self.tool_template)

    def tokenizer(self, data: bytes, vocab_size: int | None, name: str, eos_id: int | None = None) -> Tokenizer:
        """The tokenizer of these bytes. eos_id: for a tokenizer.json, which does not contain it."""
        made: Tokenizer
        added = {token_id: (text, control) for token_id, text, control in self.added}
        if self.kind == "tokenizers":
            from edgemistral.text.bpe import BPETokenizer

            made = BPETokenizer(
                data, vocab_size, name, added, self.bos_id, eos_id, self.adds_bos, self.template, self.mistral_version
            )
        else:
            from edgemistral.text.sentencepiece import SentencePieceTokenizer

            made = SentencePieceTokenizer(data, vocab_size, name, added, self.legacy, self.template)
            made.adds_bos = self.adds_bos
        for token_id in (*self.end_ids, *([] if self.turn_end_id is None else [self.turn_end_id])):
            made._checked(token_id)
        made.end_ids = made.end_ids | frozenset(self.end_ids)
        made.turn_end_id = made.eos_id if self.turn_end_id is None else self.turn_end_id
        made.defaults = dict(self.defaults)
        return made


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 24


def _is_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and isinstance(text, str) for key, text in value.items())


_CHECKS: dict[str, Any] = {
    "kind": lambda value: value in KINDS,
    "added": lambda value: isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 3 and _is_id(item[0]) and isinstance(item[1], str) and isinstance(item[2], bool)
        for item in value
    ),
    "chat_template": lambda value: isinstance(value, str),
    "tool_template": lambda value: isinstance(value, str),
    "special": _is_texts,
    "mistral_version": lambda value: type(value) is int and value in (3, 7),
    "bos_id": _is_id,
    "end_ids": lambda value: isinstance(value, list) and all(map(_is_id, value)),
    "turn_end_id": _is_id,
    "adds_bos": lambda value: isinstance(value, bool),
    "legacy": lambda value: isinstance(value, bool),
    "defaults": lambda value: isinstance(value, Mapping) and all(
        isinstance(key, str) and type(number) in (int, float) for key, number in value.items()
    ),
}
