"""ModelConfig: every hyperparameter of a Mistral-family model, validated, with no hidden defaults.

Foreign names are translated here, once: `from_hf` reads a Hugging Face config.json, `from_mistral` a params.json,
`from_dict` our own blob. Everything behind this file uses the names of the fields below.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgemistral.errors import BadConfig

MAX_DIMENSION = 1 << 20   # of any size in a config: keeps every product of two of them far inside int64
MAX_CONTEXT = 1 << 24

HF_ARCHITECTURE = ["MistralForCausalLM"]
HF_NAMES = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size", "vocab_size": "vocab_size",
    "context": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "bos_id": "bos_token_id", "eos_id": "eos_token_id",
}
MISTRAL_NAMES = {   # params.json and we use the same words
    "dim": "dim", "n_layers": "n_layers", "n_heads": "n_heads", "n_kv_heads": "n_kv_heads", "head_dim": "head_dim",
    "hidden_dim": "hidden_dim", "vocab_size": "vocab_size", "norm_eps": "norm_eps", "rope_theta": "rope_theta",
}
MISTRAL_CONTEXT = 32768   # tokens, where params.json does not say


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
    sliding_window: int | None   # attend to the last so many positions, or to all of them
    bos_id: int
    eos_id: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in ("norm_eps", "rope_theta"):
                ok = type(value) in (int, float) and math.isfinite(value) and value > 0
                if ok:
                    object.__setattr__(self, name, float(value))
            elif name == "sliding_window" and value is None:
                ok = True
            else:
                low = 0 if name in ("bos_id", "eos_id") else 1
                high = MAX_CONTEXT if name in ("context", "sliding_window") else MAX_DIMENSION
                ok = type(value) is int and low <= value <= high
            if not ok:
                raise BadConfig(f"{name} is {value!r}, which no Mistral model has")
        if self.n_heads % self.n_kv_heads:
            raise BadConfig(f"n_heads ({self.n_heads}) is not a multiple of n_kv_heads ({self.n_kv_heads})")
        for name, step, high in (("dim", 32, 1 << 16), ("hidden_dim", 32, 1 << 18), ("head_dim", 32, 512)):
            size = getattr(self, name)
            if size % step or size > high:
                raise BadConfig(f"{name} is {size}: supported are multiples of {step} up to {high}")
        for name in ("bos_id", "eos_id"):
            if getattr(self, name) >= self.vocab_size:
                raise BadConfig(f"{name} ({getattr(self, name)}) is outside the vocabulary of {self.vocab_size}")

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
        """The fields as plain JSON values, as stored in a blob."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; a missing or unknown field is a BadConfig."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, Mapping):
            raise BadConfig("the config is not a JSON object")
        if missing := sorted(names - set(fields)):
            raise BadConfig(f"the config lacks {', '.join(missing)}")
        if unknown := sorted(set(fields) - names):
            raise BadConfig(f"the config has unknown fields: {', '.join(unknown)}")
        return cls(**fields)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """From the content of a Hugging Face config.json, of transformers 4 or 5.

        BadConfig: a field is missing, or names what no kernel here computes (another architecture, scaled rotary
        positions, an already quantized checkpoint).
        """
        if fields.get("model_type") != "mistral" or (fields.get("architectures") or HF_ARCHITECTURE) != HF_ARCHITECTURE:
            found = f"{fields.get('model_type')!r}, architectures {fields.get('architectures')!r}"
            raise BadConfig(f"model_type is {found[:160]}; supported is 'mistral', {HF_ARCHITECTURE}")
        _refuse_unless(fields, "hidden_act", "silu")
        _refuse_unless(fields, "quantization_config", None)
        ours = _translate(fields, HF_NAMES)
        head_dim = fields.get("head_dim")
        if head_dim is None:
            if not _divides(ours["n_heads"], ours["dim"]):
                raise BadConfig("head_dim is missing and hidden_size is no multiple of num_attention_heads")
            head_dim = ours["dim"] // ours["n_heads"]
        return cls(
            **ours,
            head_dim=head_dim,
            rope_theta=_hf_rope_theta(fields),
            sliding_window=fields.get("sliding_window"),
        )

    @classmethod
    def from_mistral(cls, fields: Mapping[str, Any], bos_id: int, eos_id: int) -> ModelConfig:
        """From the content of Mistral's own params.json, which leaves the ids of <s> and </s> to the tokenizer.

        The context is `max_seq_len` or `max_position_embeddings`; most files state neither, and then it is the 32768
        that all Mistral 7B models share. BadConfig: as in `from_hf`.
        """
        for name in ("moe", "lora", "quantization", "yarn", "llama_4_scaling", "multimodal", "vision_encoder"):
            if fields.get(name):
                raise BadConfig(f"{name} is set; supported is the plain Mistral architecture")
        _refuse_unless(fields, "model_type", "transformer")
        _refuse_unless(fields, "activation", "silu")
        if fields.get("rope_theta") is None:   # 10000 in v0.1 and 1000000 since: the wrong one gives fluent nonsense
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
        raise BadConfig(f"{name} is {str(value)[:80]!r}; supported is {supported!r}")


def _divides(divisor: Any, number: Any) -> bool:
    return isinstance(divisor, int) and isinstance(number, int) and divisor > 0 and number % divisor == 0


def _hf_rope_theta(fields: Mapping[str, Any]) -> Any:
    """transformers 4 has it at the top level, with `rope_scaling` beside; 5 has all of it under `rope_parameters`."""
    found = [fields["rope_theta"]] if fields.get("rope_theta") is not None else []
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise BadConfig(f"{name} is {str(rope)[:120]}; supported are unscaled rotary positions")
        _refuse_unless(rope, "partial_rotary_factor", 1.0)
        if rope.get("rope_theta") is not None:
            found.append(rope["rope_theta"])
    if not found:
        raise BadConfig("rope_theta is missing")
    if any(value != found[0] for value in found):
        raise BadConfig(f"rope_theta is given twice, as {' and '.join(map(str, found))}")
    return found[0]
