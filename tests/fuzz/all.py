"""All harnesses, by their names."""

from __future__ import annotations

from tests.fuzz.caches import Sessions, Stores
from tests.fuzz.files import Adapters, Blobs, Checkpoints
from tests.fuzz.gguf import Gguf
from tests.fuzz.harness import Harness
from tests.fuzz.page import Page
from tests.fuzz.server import Routes, Wire
from tests.fuzz.texts import Grammars, Samples, Templates, Tokenizers

HARNESSES: dict[str, type[Harness]] = {
    harness.name: harness for harness in (
        Blobs, Checkpoints, Adapters, Gguf, Sessions, Stores, Tokenizers, Templates, Grammars, Samples, Routes, Wire, Page,
    )
}
