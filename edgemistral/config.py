"""ModelConfig: every hyperparameter of a Mistral-family or Llama-family model, validated, with no hidden defaults.

Foreign names are translated here, once: `from_hf` reads a Hugging Face config.json, `from_mistral` a params.json,
`from_dict` our own blob. Everything behind this file uses the names of the fields below.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import BadConfig

MAX_DIMENSION = 1 << 20   # limit of each size: the product of two sizes fits easily into int64
MAX_CONTEXT = 1 << 24

HF_ARCHITECTURES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}   # by model_type
LLAMA_ROPE_THETA = 10000.0   # the config.json of the first Llama models has no rope_theta
HF_NAMES = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size", "vocab_size": "vocab_size",
    "context": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "bos_id": "bos_token_id", "eos_id": "eos_token_id",
}
MISTRAL_NAMES = {   # params.json uses our names
    "dim": "dim", "n_layers": "n_layers", "n_heads": "n_heads", "n_kv_heads": "n_kv_heads", "head_dim": "head_dim",
    "hidden_dim": "hidden_dim", "vocab_size": "vocab_size", "norm_eps": "norm_eps", "rope_theta": "rope_theta",
}
ROPE_SCALINGS = {   # by rope_type: the parameters that each needs
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
MISTRAL_CONTEXT = 32768   # tokens, if params.json does not give the context


@dataclass(frozen=True)
class ModelConfig:
    """The blueprint of one model. Sizes are counts, not bytes."""

    dim: int                     # width of the residual stream (hidden_size)
    n_layers: int
    n_heads: int                 # query heads
    n_kv_heads: int              # key/value heads; n_heads is a multiple of it
    head_dim: int                # multiple of 32
    hidden_dim: int              # width of the feed-forward (intermediate_size)
    vocab_size: int
    context: int                 # the model's longest context in tokens
    norm_eps: float
    rope_theta: float
    sliding_window: int | None   # how many of the last positions a token attends to; None: all
    bos_id: int
    eos_id: int
    rope_factors: tuple[float, ...] | None = None   # head_dim / 2 divisors of the rotary frequencies; None: all 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in ("norm_eps", "rope_theta"):
                ok = type(value) in (int, float) and math.isfinite(value) and value > 0
                if ok:
                    object.__setattr__(self, name, float(value))
            elif name == "sliding_window" and value is None:
                ok = True
            elif name == "rope_factors":
                ok = value is None or self._take_rope_factors(value)
            else:
                low = 0 if name in ("bos_id", "eos_id") else 1
                high = MAX_CONTEXT if name in ("context", "sliding_window") else MAX_DIMENSION
                ok = type(value) is int and low <= value <= high
            if not ok:
                raise BadConfig(f"{name} is {value!r}: out of range or of the wrong type")
        if self.n_heads % self.n_kv_heads:
            raise BadConfig(f"n_heads ({self.n_heads}) is not a multiple of n_kv_heads ({self.n_kv_heads})")
        for name, step, high in (("dim", 32, 1 << 16), ("hidden_dim", 32, 1 << 18), ("head_dim", 32, 512)):
            size = getattr(self, name)
            if size % step or size > high:
                raise BadConfig(f"{name} is {size}; supported: multiples of {step} up to {high}")
        for name in ("bos_id", "eos_id"):
            if getattr(self, name) >= self.vocab_size:
                raise BadConfig(f"{name} ({getattr(self, name)}) is outside the vocabulary of {self.vocab_size}")

    def _take_rope_factors(self, values: Any) -> bool:
        """Store `values` as a tuple of floats, if they are one positive number for each rotary pair."""
        if not isinstance(values, list | tuple) or type(self.head_dim) is not int or len(values) != self.head_dim // 2:
            return False
        if not all(type(value) in (int, float) and math.isfinite(value) and value > 0 for value in values):
            return False
        object.__setattr__(self, "rope_factors", tuple(map(float, values)))
        return True

    @property
    def q_dim(self) -> int:
        """Width of all query heads side by side."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads side by side."""
        return self.n_kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, as stored in a blob. A field equal to its default is left out."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or getattr(self, field.name) != field.default
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; an unknown field, or a missing one without a default, is a BadConfig."""
        names = {field.name for field in dataclasses.fields(cls)}
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if not isinstance(fields, Mapping):
            raise BadConfig("the config is not a JSON object")
        if missing := sorted(required - set(fields)):
            raise BadConfig(f"the config lacks {', '.join(missing)}")
        if unknown := sorted(set(fields) - names):
            raise BadConfig(f"the config has unknown fields: {', '.join(unknown)}")
        return cls(**fields)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """From the content of a Hugging Face config.json, of transformers 4 or 5.

        BadConfig: a field is missing, or asks for something that is not supported (another architecture, biases,
        rotary positions scaled by YaRN, an already quantized checkpoint).
        """
        is_llama = _hf_architecture(fields) == "llama"
        _refuse_unless(fields, "hidden_act", "silu")
        _refuse_quantized(fields)
        kinds = fields.get("layer_types")
        if isinstance(kinds, list) and any(kind != kinds[0] for kind in kinds):
            raise BadConfig(f"layer_types mixes {' and '.join(sorted({str(kind)[:40] for kind in kinds}))}; supported: "
                            "models whose layers are all of one type")
        for name in ("attention_bias", "mlp_bias"):
            if fields.get(name):
                raise BadConfig(f"{name} is {str(fields[name])[:80]}; supported: models without biases")
        if is_llama and fields.get("num_key_value_heads") is None:   # the first Llama models: one for each query head
            fields = {**fields, "num_key_value_heads": fields.get("num_attention_heads")}
        ours = _translate(fields, HF_NAMES)
        head_dim = fields.get("head_dim")
        if head_dim is None:
            if not _divides(ours["n_heads"], ours["dim"]):
                raise BadConfig("head_dim is missing and hidden_size is not a multiple of num_attention_heads")
            head_dim = ours["dim"] // ours["n_heads"]
        rope_theta, scaling = _hf_rope(fields, LLAMA_ROPE_THETA if is_llama else None)
        return cls(
            **ours,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_factors=None if scaling is None else rope_factors(scaling, rope_theta, head_dim),
            sliding_window=None if is_llama else fields.get("sliding_window"),   # transformers' Llama has none
        )

    @classmethod
    def from_mistral(cls, fields: Mapping[str, Any], bos_id: int, eos_id: int) -> ModelConfig:
        """From the content of Mistral's own params.json, which leaves the ids of <s> and </s> to the tokenizer.

        The context is `max_seq_len` or `max_position_embeddings`. Most files have neither: then it is 32768, as in all
        Mistral 7B models. BadConfig: as in `from_hf`.
        """
        # "lora" is accepted: it describes the training. LoRA tensors that are not merged are refused by name.
        for name in ("moe", "quantization", "yarn", "llama_4_scaling", "multimodal", "vision_encoder"):
            if fields.get(name):
                raise BadConfig(f"{name} is set; supported: the plain Mistral architecture")
        _refuse_unless(fields, "model_type", "transformer")
        _refuse_unless(fields, "activation", "silu")
        if fields.get("rope_theta") is None:   # v0.1 has 10000, later versions 1000000; a wrong one gives fluent nonsense
            raise BadConfig("rope_theta is missing; add it: 10000.0 for Mistral 7B v0.1, 1000000.0 for v0.2 and v0.3")
        window = fields.get("sliding_window")
        if isinstance(window, str) and window.isdecimal() and len(window) < 10:   # some files have it as a string
            window = int(window)
        context = fields.get("max_seq_len", fields.get("max_position_embeddings", MISTRAL_CONTEXT))
        return cls(
            **_translate(fields, MISTRAL_NAMES), context=context, sliding_window=window, bos_id=bos_id, eos_id=eos_id
        )


def _translate(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Values by our names; `names` maps ours to theirs."""
    if missing := [theirs for theirs in names.values() if fields.get(theirs) is None]:
        raise BadConfig(f"{', '.join(missing)} missing")
    return {ours: fields[theirs] for ours, theirs in names.items()}


def _refuse_unless(fields: Mapping[str, Any], name: str, supported: Any) -> None:
    if (value := fields.get(name, supported)) != supported:
        raise BadConfig(f"{name} is {str(value)[:80]!r}; supported: {supported!r}")


def _refuse_quantized(fields: Mapping[str, Any]) -> None:
    """Refuse a config that another program wrote for quantized weights; `quantization` is MLX's field."""
    for name in ("quantization_config", "compression_config", "quantization"):
        value = fields.get(name)
        if value is not None:
            details = value if isinstance(value, Mapping) else {}
            method = details.get("quant_method", details.get("quant_type", "MLX" if name == "quantization" else None))
            bits = details.get("bits", 4 if details.get("load_in_4bit") else 8 if details.get("load_in_8bit") else None)
            what = ", ".join([*([str(method)[:40]] if method else []), *([f"{str(bits)[:10]} bits"] if bits else [])])
            raise BadConfig(f"{name} says that the weights are already quantized{f' ({what})' if what else ''}; "
                            "get the original model, whose weights are BF16, F16 or F32")


def _divides(divisor: Any, number: Any) -> bool:
    return isinstance(divisor, int) and isinstance(number, int) and divisor > 0 and number % divisor == 0


def _hf_architecture(fields: Mapping[str, Any]) -> str:
    """The model_type. BadConfig: it is not supported."""
    kind, names = fields.get("model_type"), fields.get("architectures")
    if not isinstance(kind, str) or kind not in HF_ARCHITECTURES or (names and names != [HF_ARCHITECTURES[kind]]):
        supported = " and ".join(f"{kind!r}, [{name!r}]" for kind, name in HF_ARCHITECTURES.items())
        raise BadConfig(f"model_type is {f'{kind!r}, architectures {names!r}'[:160]}; supported: {supported}")
    return kind


def _hf_rope(fields: Mapping[str, Any], default_theta: float | None) -> tuple[Any, Mapping[str, Any] | None]:
    """rope_theta, and the description of its scaling or None.

    transformers 4 has `rope_theta` and `rope_scaling` at the top level; 5 has both under `rope_parameters`.
    """
    _refuse_unless(fields, "partial_rotary_factor", 1.0)
    found = [fields["rope_theta"]] if fields.get("rope_theta") is not None else []
    scalings: list[Mapping[str, Any]] = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else None
        if kind not in ("default", *ROPE_SCALINGS):
            supported = ", ".join(ROPE_SCALINGS)
            raise BadConfig(f"{name} is {str(rope)[:120]}; supported: unscaled rotary positions and {supported}")
        _refuse_unless(rope, "partial_rotary_factor", 1.0)
        if rope.get("rope_theta") is not None:
            found.append(rope["rope_theta"])
        if kind != "default":
            scalings.append({"type": kind, **{part: rope.get(part) for part in ROPE_SCALINGS[kind]}})
    if not found:
        if default_theta is None:
            raise BadConfig("rope_theta is missing")
        found.append(default_theta)
    if any(value != found[0] for value in found):
        raise BadConfig(f"rope_theta is given twice, as {' and '.join(map(str, found))}")
    if any(scaling != scalings[0] for scaling in scalings):
        raise BadConfig("rope_scaling and rope_parameters contradict each other")
    return found[0], scalings[0] if scalings else None


def rope_factors(scaling: Mapping[str, Any], theta: Any, head_dim: Any) -> tuple[float, ...] | None:
    """The divisor of each rotary frequency, (head_dim / 2,), for one of the ROPE_SCALINGS.

    None if theta or head_dim is invalid: ModelConfig raises the error. BadConfig: a parameter of the scaling is missing
    or out of range. Source: transformers' modeling_rope_utils.py.
    """
    kind = scaling["type"]
    for name in ROPE_SCALINGS[kind]:
        value: Any = scaling.get(name)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise BadConfig(f"the rotary scaling {kind!r} has {name} {str(value)[:80]!r}; it must be a positive number")
    if type(theta) not in (int, float) or not theta > 0 or type(head_dim) is not int or not 0 < head_dim <= 512:
        return None
    factor = float(scaling["factor"])
    if kind == "linear":
        return (factor,) * (head_dim // 2)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    if low >= high:
        raise BadConfig(f"the rotary scaling 'llama3' has low_freq_factor {low}, not below high_freq_factor {high}")
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)   # in the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)   # 0: slow pairs, divided by factor; 1: fast ones, kept
    return tuple(map(float, 1 / ((1 - smooth) / factor + smooth)))


def rope_frequencies(config: ModelConfig) -> NDArray[np.float64]:
    """Radians by which each rotary pair (i, i + head_dim / 2) turns from one position to the next: (head_dim / 2,)."""
    frequencies: NDArray[np.float64] = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    return frequencies if config.rope_factors is None else frequencies / np.array(config.rope_factors)
