"""Blobs without weights of a model: recognizable bytes in the place of each tensor."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgemistral.files.blob_writer import BlobWriter
from edgemistral.files.layout import Recipe
from tests.checkpoints import small_config

CONFIG = small_config(n_layers=1, vocab_size=50)
RECIPE = Recipe(4, 8)
TOKENIZER = b"no real tokenizer" * 5   # of an odd size
SOURCE = "5" * 64


def content(writer: BlobWriter, name: str) -> bytes:
    """Recognizable bytes of the right size."""
    if name == "tokenizer":
        return TOKENIZER
    n_bytes = writer.tensors[name].n_bytes
    return (hashlib.sha256(name.encode()).digest() * (n_bytes // 32 + 1))[:n_bytes]


def write(path: Path, **options: bool) -> Path:
    with BlobWriter(path, CONFIG, RECIPE, len(TOKENIZER), **options) as writer:
        for name in writer.tensors:
            if not writer.done(name):
                whole = content(writer, name)
                writer.write(name, [whole[:100], whole[100:]], lambda: SOURCE)
        return writer.finish()
