"""What a blob says about text beside the bytes of its tokenizer: one JSON object in its metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgemistral.errors import BadInput

KINDS = ("sentencepiece", "tokenizers")
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")   # sampling arguments a model may bring


@dataclass(frozen=True)
class TextSettings:
    """How a model reads and writes text. All fields have defaults: those of a blob of format 1.

    kind: how the tokenizer's bytes are read: a SentencePiece model, or a tokenizer.json of Hugging Face.
    added: id -> (text, special) of added tokens that the tokenizer's own bytes do not have.
    chat_template: Jinja; None means Mistral's own template.
    names: what a template calls bos_token, eos_token and so on; those that are missing come from the ids.
    add_bos: whether a raw text begins with <s>.
    legacy: SentencePiece only: every text between two added tokens begins with a space, and not just the first.
    defaults: the model's own sampling arguments, used where a caller gives none.
    """

    kind: Literal["sentencepiece", "tokenizers"] = "sentencepiece"
    added: Mapping[int, tuple[str, bool]] = field(default_factory=dict)
    chat_template: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    add_bos: bool = True
    legacy: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "added": {str(token_id): list(token) for token_id, token in sorted(self.added.items())},
            "names": dict(self.names), "defaults": dict(self.defaults),
        }

    @classmethod
    def from_dict(cls, fields: Any) -> TextSettings:
        """The inverse of `to_dict`; a missing field has its default. BadInput names what is unknown or wrong."""
        if not isinstance(fields, dict):
            raise BadInput("text is not a JSON object")
        if unknown := sorted(set(fields) - {f.name for f in dataclasses.fields(cls)}):
            raise BadInput(f"text has unknown fields: {', '.join(unknown)[:200]}")
        checks = {
            "kind": lambda v: v in KINDS,
            "added": lambda v: isinstance(v, dict) and all(map(_is_added, v.items())),
            "chat_template": lambda v: v is None or isinstance(v, str),
            "names": lambda v: isinstance(v, dict) and all(isinstance(name, str) for name in v.values()),
            "add_bos": lambda v: isinstance(v, bool),
            "legacy": lambda v: isinstance(v, bool),
            "defaults": lambda v: isinstance(v, dict),
        }
        for name, value in fields.items():
            if not checks[name](value):
                raise BadInput(f"text has {name} {str(value)[:80]!r}")
        values = dict(fields)
        if "added" in values:
            values["added"] = {int(token_id): (token[0], token[1]) for token_id, token in values["added"].items()}
        if "defaults" in values:
            check_defaults(values["defaults"])
        return cls(**values)


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Raise BadInput for a default that no sampler takes."""
    from edgemistral.generate.sampler import SamplingParams

    if unknown := sorted(set(defaults) - set(DEFAULTS)):
        raise BadInput(f"defaults has unknown names: {', '.join(unknown)[:200]}")
    SamplingParams(**defaults)


def _is_added(item: tuple[str, Any]) -> bool:
    key, value = item
    return (
        key.isdecimal() and len(key) < 10 and isinstance(value, list) and len(value) == 2
        and isinstance(value[0], str) and bool(value[0]) and isinstance(value[1], bool)
    )
