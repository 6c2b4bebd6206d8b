"""The result of opening any source."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgemistral.config import ModelConfig
from edgemistral.text.tokenizer import Tokenizer
from edgemistral_quantize.sources.tensor import Tensor
from edgemistral_quantize.text_files import TextFiles


@dataclass(frozen=True)
class Opened:
    """A source whose config, tokenizer, tensor names, shapes and dtypes are checked; no weight is read yet."""

    config: ModelConfig
    text: TextFiles                # the tokenizer's bytes, and the other facts about text
    tokenizer: Tokenizer           # made from them
    files: list[Path]              # everything that was or will be read
    tensors: dict[str, Tensor] = field(repr=False)   # by our names: layers.0.wq, ...; rotary pairs (i, i + head_dim / 2)
    quantized_as: str | None = None   # a GGUF's types, such as "Q4_1 and Q8_0", if its weights are not floats
    bits: float | None = None      # a quantized source's bits per weight
