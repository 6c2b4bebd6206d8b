"""A checkpoint as the source tensors of a blob: checked first, then read strip by strip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from edgemistral.config import ModelConfig
from edgemistral.text.spec import TextSpec
from edgemistral.text.tokenizer import Tokenizer
from edgemistral_quantize import fuse
from edgemistral_quantize.recognise import locate
from edgemistral_quantize.sources.folder import open_folder
from edgemistral_quantize.sources.names import HUGGING_FACE, expected_tensors
from edgemistral_quantize.sources.tensor import Strip

__all__ = ["HUGGING_FACE", "Checkpoint", "Strip", "expected_tensors"]


class Checkpoint:
    """A folder in Hugging Face or Mistral layout, or a GGUF file; with `lora`, a PEFT adapter's folder, merged.

    Config, tokenizer, tensor names, shapes and dtypes are checked; no weight is read yet. Raises BadConfig for the
    config, BadCheckpoint for everything else, naming file and tensor.
    """

    config: ModelConfig
    tokenizer: bytes            # the SentencePiece model, or the tokenizer.json
    text: TextSpec              # everything else about text
    tokenizer_of_text: Tokenizer
    files: list[Path]           # everything that was or will be read
    n_bytes: int                # of all weights, as they are streamed
    quantized_as: str | None    # the types of a source that is quantized already
    bits: float | None          # its bits per weight

    def __init__(self, source: Path, chat_template: Path | None = None, lora: Path | None = None) -> None:
        """chat_template: a file with the template to use instead of the checkpoint's."""
        place = locate(source)
        if place.is_file():
            from edgemistral_quantize.sources.gguf import open_gguf

            opened = open_gguf(place, chat_template)
        else:
            opened = open_folder(place, chat_template)
        if lora is not None:
            from edgemistral_quantize.lora import merge

            tensors, files = merge(opened.tensors, lora)
            opened = replace(opened, tensors=tensors, files=[*opened.files, *files])
        self.config, self.files = opened.config, opened.files
        self.tokenizer, self.text, self.tokenizer_of_text = opened.text.data, opened.text.spec, opened.tokenizer
        self.quantized_as, self.bits = opened.quantized_as, opened.bits
        self._tensors = opened.tensors
        self.n_bytes = fuse.fused_bytes(opened.tensors)

    @property
    def min_strip_bytes(self) -> int:
        """The smallest possible `strip_bytes`: the largest indivisible strip as float32, with the memory held for it."""
        return fuse.min_strip_bytes(self._tensors, self.config)

    def strips(self, name: str, strip_bytes: int) -> Iterator[Strip]:
        """The rows of blob tensor `name` (a matrix, a norm, the embeddings) in the order in which the blob stores them.

        Strips are (rows, cols) in the checkpoint's dtype, finite, and at most `strip_bytes` large when widened to
        float32 unless `min_strip_bytes` is more. All but the last have a multiple of 32 rows; a norm is one row.
        Raises BadCheckpoint for a NaN or an infinity, and if the file cannot be read or has become shorter.
        """
        return fuse.strips(self._tensors, self.config, name, strip_bytes)
