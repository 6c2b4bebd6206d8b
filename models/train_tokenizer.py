"""Train the demo model's tokenizer: a small sibling of Mistral's, with the same ids 0..258 and handling of text.

    python models/train_tokenizer.py BOOKS.txt edgemistral/demo/tokenizer.model

BOOKS.txt (or .txt.xz) is prose, one paragraph a line. Needs the package `sentencepiece` only. The same text and the
same version of sentencepiece give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import lzma
import string
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

BYTE_ORDER_MARK = "\ufeff"   # joined e-books carry some in the middle
TEMPLATE_EVERY = 8   # one paragraph in so many is dressed as a chat turn: "INST" becomes one piece, as in Mistral's
REQUIRED = string.printable.strip() + "—–…“”‘’£éèêàçñôöüä"   # characters that must not need several byte ids each


def sentences(path: Path, step: int) -> Iterator[str]:
    """Every `step`-th paragraph; some dressed as user turns of the chat template."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        paragraphs = filter(None, (line.replace(BYTE_ORDER_MARK, "").strip() for line in file))
        for i, paragraph in enumerate(itertools.islice(paragraphs, 0, None, step)):
            yield f"[INST] {paragraph} [/INST]" if i % TEMPLATE_EVERY == 0 else paragraph


def train(path: Path, vocab_size: int, step: int) -> bytes:
    """The trained model as the bytes of a tokenizer.model; settings are those inside Mistral's own file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(path, step),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="prose, .txt or .txt.xz")
    parser.add_argument("model", type=Path, help="the tokenizer.model to write")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--step", type=int, default=20, help="take every so many paragraphs (default: %(default)s)")
    args = parser.parse_args()
    args.model.write_bytes(train(args.text, args.vocab_size, args.step))


if __name__ == "__main__":
    main()
