"""Reads GGUF files of the llama architecture, as written by llama.cpp's converter: config, tokenizer and tensors.

Rotary pairs are neighbours there, as in Mistral's layout. The `gguf` package (the extra `gguf`) dequantizes all types other
than plain floats, a strip at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.errors import BadCheckpoint, BadConfig, BadInput
from edgemistral_quantize.recognise import numbered_gap
from edgemistral_quantize.sources.gguf_header import GgufEntry, GgufHeader, read_gguf_header
from edgemistral_quantize.sources.gguf_text import read_text
from edgemistral_quantize.sources.names import GGUF, expected_tensors, match
from edgemistral_quantize.sources.opened import Opened
from edgemistral_quantize.sources.tensor import HalvedPairs, Strip, Tensor, check_finite, read_into

FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
PIECE = 1 << 18   # values dequantized at a time: the library's temporary arrays are several times as large
NAMES = {         # ours by theirs, after "llama."
    "embedding_length": "dim", "block_count": "n_layers", "attention.head_count": "n_heads",
    "feed_forward_length": "hidden_dim", "context_length": "context", "attention.layer_norm_rms_epsilon": "norm_eps",
}
ROPE_THETA = 10000.0   # llama.cpp's value if the field is missing
ROPE_FACTORS = "rope_freqs.weight"
OTHER_KINDS = {   # by general.type
    "mmproj": "the part of a model that reads images (mmproj)", "adapter": "a LoRA adapter as a GGUF file, which is not merged "
    "here; get it in PEFT's format, for --lora", "imatrix": "an importance matrix", "vocab": "a vocabulary without weights",
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file."""

    name: str
    path: Path
    entry: GgufEntry

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return FLOATS.get(self.entry.type.name, np.dtype("<f4"))

    held_bytes = 0

    def read(self, begin: int, end: int) -> Strip:
        kind, cols = self.entry.type, self.shape[-1]
        row_bytes = cols // kind.block * kind.n_bytes
        stored = np.empty((end - begin, row_bytes), np.uint8)
        read_into(stored, self.path, self.entry.offset + begin * row_bytes, str(self))
        if kind.name in FLOATS:
            strip: Strip = stored.view(FLOATS[kind.name])
        else:
            strip = _dequantize(stored, kind.name, cols)
        check_finite(strip, begin, str(self))
        if len(self.shape) == 1 and strip.size and not strip.any():
            raise BadCheckpoint(f"{self} is nothing but zeros; was the download finished?")
        return strip


def open_gguf(path: Path, chat_template: Path | None = None) -> Opened:
    """Check everything about a GGUF file, or the first of several, except the values of its weights.

    Raises BadConfig for an unsupported model, BadCheckpoint for everything else.
    """
    paths = _parts(path)
    headers = [read_gguf_header(part) for part in paths]
    metadata, found = headers[0].metadata, _collect(paths, headers)
    try:
        check_kind(metadata)
        text = read_text(metadata, path, chat_template)
        config = read_config(metadata, found, text.eos_id if text.bos_id is None else text.bos_id, text.eos_id)
        tokenizer = text.spec.tokenizer(text.data, config.vocab_size, "its tokenizer", text.eos_id)
    except BadConfig as problem:
        raise BadConfig(f"{path}: {problem}") from None
    except BadInput as problem:
        raise BadCheckpoint(str(problem) if str(path) in str(problem) else f"{path}: {problem}") from None
    tied = GGUF.names["output"] + ".weight" not in found
    matched = match(expected_tensors(config, GGUF, tied), found, "", path)
    matrices = [tensor for tensor in matched.values() if len(tensor.shape) == 2]
    types = sorted({t.entry.type.name for t in matrices if t.entry.type.name not in FLOATS})
    if types:
        _import_gguf(path, types)
    tensors: dict[str, Tensor] = dict(matched)
    for name, tensor in matched.items():
        if name.endswith((".wq", ".wk")):
            tensors[name] = HalvedPairs(tensor, config.head_dim)
    distinct = {tensor.name: tensor for tensor in matrices}.values()   # a tied head is the embeddings
    bits = 8 * sum(t.entry.n_bytes for t in distinct) / sum(t.shape[0] * t.shape[1] for t in distinct)
    return Opened(config, text, tokenizer, paths, tensors, " and ".join(types) if types else None, bits if types else None)


def check_kind(metadata: Mapping[str, Any]) -> None:
    """BadConfig for a file that does not contain a model of the llama architecture."""
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if architecture == "clip" or kind in OTHER_KINDS:
        raise BadConfig(f"{OTHER_KINDS.get(kind, OTHER_KINDS['mmproj'])}; give the model's own file")
    if architecture != "llama":
        said = f"is {architecture[:80]!r}" if isinstance(architecture, str) else "is missing"
        raise BadConfig(f"general.architecture {said}; supported: 'llama', which Mistral is too")


def read_config(
    metadata: Mapping[str, Any], found: Mapping[str, GgufTensor], bos_id: int, eos_id: int
) -> ModelConfig:
    """The config, from the metadata and two tensors: the embeddings (size of the vocabulary) and the rotary factors."""
    def get(name: str, default: Any = None) -> Any:
        return metadata.get("llama." + name, default)

    for name in ("expert_count", "leading_dense_block_count", "attention.clamp_kqv", "pooling_type"):
        if get(name):
            raise BadConfig(f"llama.{name} is {str(get(name))[:80]}; supported: the plain architecture")
    if get("attention.causal", True) is not True:
        raise BadConfig("llama.attention.causal is false; supported: models that write text")
    if missing := [name for name in NAMES if get(name) is None]:
        raise BadConfig(f"{', '.join('llama.' + name for name in missing)} missing")
    ours = {name: _plain(get(theirs)) for theirs, name in NAMES.items()}
    heads, dim = ours["n_heads"], ours["dim"]
    if type(heads) is not int or type(dim) is not int or not 0 < heads <= dim:
        raise BadConfig(f"llama.attention.head_count is {str(heads)[:80]} with llama.embedding_length {str(dim)[:80]}")
    head_dim = get("attention.key_length", get("rope.dimension_count", dim // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if not np.array_equal(get(name, head_dim), head_dim):
            raise BadConfig(f"llama.{name} is {str(get(name))[:80]}, but heads have {head_dim} dimensions")
    embeddings = found.get(GGUF.names["tok_embeddings"] + ".weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise BadCheckpoint(f"tensor {GGUF.names['tok_embeddings']}.weight is missing")
    theta = _plain(get("rope.freq_base", ROPE_THETA))
    return ModelConfig(
        **ours, n_kv_heads=_plain(get("attention.head_count_kv", heads)), head_dim=head_dim,
        vocab_size=embeddings.shape[0], rope_theta=theta, sliding_window=get("attention.sliding_window") or None,
        bos_id=bos_id, eos_id=eos_id, rope_factors=_rope_factors(metadata, found.get(ROPE_FACTORS), head_dim),
    )


def _rope_factors(metadata: Mapping[str, Any], stored: GgufTensor | None, head_dim: Any) -> tuple[float, ...] | None:
    """The divisors of the rotary frequencies: linear scaling is in the metadata, Llama 3's is a tensor."""
    kind = metadata.get("llama.rope.scaling.type", "linear" if "llama.rope.scale_linear" in metadata else "none")
    if kind not in ("none", "linear"):
        raise BadConfig(f"llama.rope.scaling.type is {str(kind)[:80]!r}; supported: none, linear and Llama 3's table")
    factor = metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear", 1.0))
    if kind == "none" or not isinstance(factor, int | float) or not factor > 0:
        factor = 1.0
    if stored is None:
        return None if factor == 1.0 or type(head_dim) is not int else (float(factor),) * (head_dim // 2)
    if stored.entry.type.name != "F32" or len(stored.shape) != 1:
        raise BadCheckpoint(f"tensor {ROPE_FACTORS} has type {stored.entry.type.name} and shape {list(stored.shape)}")
    return tuple(float(factor * each) for each in stored.read(0, 1)[0])


def _parts(path: Path) -> list[Path]:
    """All files of a model that is split into ...-00001-of-0000N.gguf."""
    match_ = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not match_:
        return [path]
    paths = sorted(path.parent.glob(f"{_escaped(match_[1])}-?????-of-{match_[2]}.gguf"))
    if gap := numbered_gap(paths):
        raise BadCheckpoint(f"{path.parent}: {gap}; is the download complete?")
    return paths


def _escaped(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


def _collect(paths: list[Path], headers: list[GgufHeader]) -> dict[str, GgufTensor]:
    found: dict[str, GgufTensor] = {}
    for part, header in zip(paths, headers, strict=True):
        for name, entry in header.tensors.items():
            if name in found:
                raise BadCheckpoint(f"{part}: tensor {name[:80]} is in {found[name].path.name} too")
            found[name] = GgufTensor(name, part, entry)
    return found


def _plain(value: Any) -> Any:
    """One value for a list of equal values (one for each layer); a float32 becomes its shortest decimal, such as 1e-5."""
    if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
        return value[0].item()
    if isinstance(value, float):   # stored as float32
        return float(str(np.float32(value)))
    return value if not isinstance(value, np.ndarray) else value.tolist()[:4]


def _import_gguf(path: Path, types: list[str]) -> None:
    try:
        import gguf.quants  # noqa: F401
    except ImportError:
        raise BadCheckpoint(f"{path}: is quantized as {' and '.join(types)}, which needs the package gguf: "
                            "pip install 'edgemistral[gguf]'") from None


def _dequantize(stored: NDArray[np.uint8], kind: str, cols: int) -> NDArray[np.float32]:
    """Rows (n, bytes of a row) -> (n, cols), in pieces so that the library's temporaries stay small."""
    import gguf

    values = np.empty((len(stored), cols), np.float32)
    step = max(1, PIECE // cols)
    with np.errstate(over="ignore", invalid="ignore"):   # damaged scales: the result is checked
        for begin in range(0, len(stored), step):
            values[begin : begin + step] = gguf.dequantize(
                stored[begin : begin + step], gguf.GGMLQuantizationType[kind]
            )
    return values
