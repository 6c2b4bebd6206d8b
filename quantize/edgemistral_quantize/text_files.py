"""What a checkpoint says about text: its tokenizer, its added tokens, its chat template, its ends of turn, its defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TextFiles:
    """Everything about text that goes from a source into a blob, whatever kind of source it is.

    A folder gives it through `read_text_files`; a reader of another format fills it itself.
    """

    kind: Literal["sentencepiece", "tokenizers"]   # how `tokenizer` is read
    tokenizer: bytes                               # a tokenizer.model, or a tokenizer.json
    added: dict[int, tuple[str, bool]] = field(default_factory=dict)   # id -> (text, special) beyond `tokenizer` itself
    chat_template: str | None = None               # Jinja; None: Mistral's own, if the tokenizer is one of theirs
    bos_id: int | None = None                      # None: neither the files nor the tokenizer have one
    end_ids: tuple[int, ...] = ()                  # ids that end an answer; the first is the model's own end of text
    defaults: dict[str, Any] = field(default_factory=dict)   # sampling: temperature, top_p, top_k, repetition_penalty
    names: dict[str, str] = field(default_factory=dict)      # for the template: bos_token, eos_token; missing: from ids
    legacy: bool = True                            # SentencePiece: each text between two added tokens begins with a space
