"""The demo model's tokenizer: a small sibling of Mistral's, with the same ids 0..258 and the same handling of text."""

from __future__ import annotations

import io
import string
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import sentencepiece

from training.batches import paragraphs
from training.conversations import conversations

STEP = 20                # of the paragraphs, one in so many is enough
CONVERSATIONS = 20_000
REQUIRED = string.printable.strip() + "—–…“”‘’£éèêàçñôöüä"   # characters that must not need several byte ids each


def sentences(prose: Path) -> Iterator[str]:
    """Prose, and messages dressed as the chat template does: "INST" becomes one piece, as in Mistral's."""
    yield from islice(paragraphs(prose), 0, None, STEP)
    for messages in islice(conversations(0), CONVERSATIONS):
        for message in messages:
            text = message["content"]
            yield from (text if message["role"] == "assistant" else f"[INST] {text} [/INST]").splitlines()


def train_tokenizer(prose: Path, vocab_size: int) -> bytes:
    """The bytes of a tokenizer.model; settings are those inside Mistral's own file.

    The same text and the same version of sentencepiece give the same bytes.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(prose),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.9999,
        required_chars=REQUIRED,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
