"""ModelConfig: every hyperparameter of a Mistral-family model, validated, with no hidden defaults.

Foreign names are translated here, once: `from_hf` reads a Hugging Face config.json, `from_mistral` a params.json,
`from_dict` our own blob. Everything behind this file uses the names of the field below.
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
            if field.name in ("norm_eps", "rope_theta"):
                ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
                if ok:
                    object.__setattr__(self, name, float(value))
            elif name == "sliding_window" and value is None:
                ok = True
            else:
                low, high = (0 if name in ("bos_id", "eos_id") else 1), (MAX_CONTEXT if name == "context" else MAX_DIMENSION)
                if name == "sliding_window":
                    high = MAX_CONTEXT
                ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
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
