"""Merges a LoRA adapter in PEFT's format into the tensors of its base model, a strip of rows at a time.

    W' = W + s B A, with s = lora_alpha / r (or / sqrt(r): rsLoRA); DoRA scales each row of W' to its stored length

Sources: https://arxiv.org/abs/2106.09685, 2312.03732, 2402.09353, and PEFT's own layers. Only the factors of the tensor
that is being read are in memory: A, and B's rows of the strip.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import BadCheckpoint
from edgemistral.files.bf16 import widen
from edgemistral_quantize import recognise
from edgemistral_quantize.sources.folder import list_tensors, read_object
from edgemistral_quantize.sources.names import HUGGING_FACE, WRAPPERS
from edgemistral_quantize.sources.tensor import DTYPES, StoredTensor, Strip, Tensor, check_finite

WEIGHTS = "adapter_model.safetensors"
PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?(\.weight)?")
SAVED = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.weight")
CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda")   # values of init_lora_weights that also changed the base's weights
UNUSED = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "trainable_token_indices", "lora_bias")


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the base with the product of an adapter's factors added; its strips are float32."""

    base: Tensor
    a: StoredTensor                    # (r, cols); for embeddings (r, rows)
    b: StoredTensor                    # (rows, r); for embeddings (cols, r)
    scale: float
    magnitude: StoredTensor | None     # DoRA: the length of each row
    of_embeddings: bool

    def __str__(self) -> str:
        return str(self.base)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<f4")

    @property
    def held_bytes(self) -> int:
        """Bytes of the factors as float32, plus their stored form while they are widened."""
        return self.base.held_bytes + 8 * (int(np.prod(self.a.shape)) + int(np.prod(self.b.shape)))

    def read(self, begin: int, end: int) -> Strip:
        strip = widen(self.base.read(begin, end))
        if self.of_embeddings:
            columns, rows = widen(self.b.read(0, self.b.shape[0])), widen(self.a.read(0, self.a.shape[0]))[:, begin:end].T
        else:
            columns, rows = widen(self.a.read(0, self.a.shape[0])).T, widen(self.b.read(begin, end))
        with np.errstate(over="ignore", invalid="ignore"):   # the result is checked
            merged: NDArray[np.float32] = strip + np.float32(self.scale) * (rows @ columns.T)
            if self.magnitude is not None:
                lengths = np.linalg.norm(merged, axis=1)
                merged *= (self._lengths[begin:end] / np.where(lengths > 0, lengths, np.float32(1)))[:, None]
        check_finite(merged, begin, f"{self.b} merged into {self.base}")
        return merged

    @cached_property
    def _lengths(self) -> NDArray[np.float32]:
        assert self.magnitude is not None
        rows = self.magnitude.shape[0] if len(self.magnitude.shape) == 2 else 1
        return np.ravel(widen(self.magnitude.read(0, rows)))


def merge(tensors: Mapping[str, Tensor], adapter: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """The base's tensors by our names with the adapter merged, and the adapter's files.

    BadCheckpoint: the folder is not a LoRA adapter, does not fit these tensors, or is of a kind that cannot be merged. No
    part of an adapter is ever ignored silently.
    """
    config_file, weights_file = adapter / recognise.ADAPTER_CONFIG, adapter / WEIGHTS
    if adapter.is_file():
        raise BadCheckpoint(f"{adapter}: a file; --lora takes the adapter's folder, {adapter.parent}")
    if not config_file.is_file():
        what = "no such directory" if not adapter.exists() else f"no {recognise.ADAPTER_CONFIG}, so not a LoRA adapter"
        raise BadCheckpoint(f"{adapter}: {what}")
    config = read_object(config_file, BadCheckpoint)
    _check_kind(config, config_file)
    if not weights_file.exists():
        pickle = next((f"; {path.name} is a pickle, which can run code and is not read" for path in
                       recognise.visible(adapter) if path.name.startswith("adapter_model.")), "")
        raise BadCheckpoint(f"{adapter}: no {WEIGHTS}{pickle}{recognise.unfinished(adapter)}")
    stored = list_tensors([weights_file])
    if not stored:
        raise BadCheckpoint(f"{weights_file}: holds no tensors")
    for tensor in stored.values():
        if tensor.entry.dtype not in DTYPES:
            raise BadCheckpoint(f"{tensor} has dtype {tensor.entry.dtype}; supported: {', '.join(DTYPES)}")
    factors: dict[str, dict[str, StoredTensor]] = {}
    merged = dict(tensors)
    for name, tensor in stored.items():
        if match := PART.fullmatch(name):
            parts = factors.setdefault(match[1], {})
            if match[2] in parts:
                raise BadCheckpoint(f"{tensor} occurs twice, also under another name")
            parts[match[2]] = tensor
        elif match := SAVED.fullmatch(name):   # of modules_to_save: replaces the base's
            ours = _ours(match[1], tensors, tensor)
            _check_shape(tensor, tensors[ours].shape)
            merged[ours] = tensor
        else:
            raise BadCheckpoint(f"{tensor} is not a factor of LoRA; such adapters are not merged here")
    for module, parts in factors.items():
        first = next(iter(parts.values()))
        ours = _ours(module, tensors, first)
        merged[ours] = _merged(merged[ours], parts, config, module, first, ours)
    if "output" in tensors and tensors["output"] is tensors["tok_embeddings"]:   # tied
        if merged["output"] is tensors["output"]:
            merged["output"] = merged["tok_embeddings"]
        elif merged["tok_embeddings"] is tensors["tok_embeddings"]:
            merged["tok_embeddings"] = merged["output"]
    return merged, [config_file, weights_file]


def _check_kind(config: Mapping[str, Any], where: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BadCheckpoint(f"{where}: peft_type is {str(kind)[:40]!r}; only adapters of type LORA are merged")
    if config.get("fan_in_fan_out"):
        raise BadCheckpoint(f"{where}: fan_in_fan_out is set; a Mistral or Llama model has no such layers")
    if config.get("bias", "none") != "none":
        raise BadCheckpoint(f"{where}: bias is {str(config['bias'])[:40]!r}; supported: models without biases")
    for name in UNUSED:
        if config.get(name):
            raise BadCheckpoint(f"{where}: {name} is set; such adapters are not merged here")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_THE_BASE):
        raise BadCheckpoint(f"{where}: init_lora_weights is {start[:40]!r}, which changed the base model's weights too; "
                            "convert the adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)")


def _ours(module: str, tensors: Mapping[str, Tensor], tensor: StoredTensor) -> str:
    """`base_model.model.model.layers.0.self_attn.q_proj` -> `layers.0.wq`."""
    short = WRAPPERS.sub("", module + ".")[:-1]
    for ours, theirs in HUGGING_FACE.names.items():
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", short)
        name = ours.format(layer[1] if layer else "")
        end = theirs.format(layer[1] if layer else "").removeprefix("model.")
        if (short == end or short.endswith("." + end)) and name in tensors:
            return name
    raise BadCheckpoint(f"{tensor} belongs to {short[-80:]}, which the base model does not have; is it the adapter's base?")


def _merged(
    base: Tensor, parts: Mapping[str, StoredTensor], config: Mapping[str, Any], module: str, first: StoredTensor, ours: str
) -> MergedTensor:
    of_embeddings = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    kinds = ("lora_embedding_A", "lora_embedding_B") if of_embeddings else ("lora_A", "lora_B")
    for kind in kinds:
        if kind not in parts:
            raise BadCheckpoint(f"{first.path}: tensor {module[-80:]}.{kind} is missing")
    magnitude = parts.get("lora_magnitude_vector")
    if extra := set(parts) - {*kinds, "lora_magnitude_vector"}:
        raise BadCheckpoint(f"{parts[extra.pop()]} is of another kind than the other factors of its layer")
    if (magnitude is not None) != bool(config.get("use_dora")) or (magnitude is not None and of_embeddings):
        raise BadCheckpoint(f"{magnitude or first}: use_dora in {recognise.ADAPTER_CONFIG} and the tensors contradict")
    a, b = (parts[kind] for kind in kinds)
    rank = a.shape[0]
    rows, cols = base.shape if len(base.shape) == 2 else (0, 0)
    if len(base.shape) != 2 or len(a.shape) != 2:
        raise BadCheckpoint(f"{a}: a factor of a layer that is not a matrix")
    for tensor, shape in ((a, (rank, rows if of_embeddings else cols)), (b, (cols if of_embeddings else rows, rank))):
        _check_shape(tensor, shape)
    if magnitude is not None and int(np.prod(magnitude.shape)) != rows:
        raise BadCheckpoint(f"{magnitude} has shape {list(magnitude.shape)} for {rows} rows")
    said = _pattern(config, "rank_pattern", module, config.get("r"))
    if said != rank:
        raise BadCheckpoint(f"{a} has rank {rank}, but {recognise.ADAPTER_CONFIG} says {str(said)[:40]}")
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    if type(alpha) not in (int, float):
        raise BadCheckpoint(f"{first.path.parent / recognise.ADAPTER_CONFIG}: lora_alpha is {str(alpha)[:40]!r}")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return MergedTensor(base, a, b, scale, magnitude, of_embeddings)


def _pattern(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """The value that a pattern gives a module: PEFT matches the end of its name as a regular expression."""
    patterns = config.get(field) or {}
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise BadCheckpoint(f"{field} in {recognise.ADAPTER_CONFIG} has the pattern {pattern[:80]!r}") from None
    return default


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise BadCheckpoint(f"{tensor} has shape {list(tensor.shape)}, the base model asks for {list(shape)}")
