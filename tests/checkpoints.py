"""Small random Mistral checkpoints on disk, in both layouts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from edgemistral_quantize import quantize
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.files.bf16 import to_bf16
from edgemistral.files.safetensors import make_header

TOKENIZER = Path(__file__).parent / "data" / "tokenizer.model"   # 2048 pieces

# Awkward on purpose: columns that are no multiple of a block, a vocabulary that is no multiple of a panel, padded w13.
SMALL = ModelConfig(
    dim=192, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=32, hidden_dim=448, vocab_size=2053, context=512,
    norm_eps=1e-5, rope_theta=1e6, sliding_window=None, bos_id=1, eos_id=2,
)

Weights = dict[str, NDArray[np.float32]]   # by our names: "layers.0.wq", ...; rotary pairs as (i, i + head_dim / 2)


def small_config(**changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Gaussian weights of standard deviation 0.7 / sqrt(columns), norms near 1; every value exact in bf16 and f16."""
    rng = np.random.default_rng(seed)
    c = config

    def matrix(rows: int, cols: int) -> NDArray[np.float32]:
        return _few_bits(rng.standard_normal((rows, cols), np.float32) * np.float32(0.7 / cols**0.5))

    def norm() -> NDArray[np.float32]:
        return _few_bits(1 + 0.1 * rng.standard_normal(c.dim).astype(np.float32))

    weights = {"tok_embeddings": matrix(c.vocab_size, c.dim)}
    for layer in range(c.n_layers):
        at = f"layers.{layer}."
        weights |= {
            at + "attention_norm": norm(), at + "ffn_norm": norm(),
            at + "wq": matrix(c.q_dim, c.dim), at + "wk": matrix(c.kv_dim, c.dim), at + "wv": matrix(c.kv_dim, c.dim),
            at + "wo": matrix(c.dim, c.q_dim),
            at + "w1": matrix(c.hidden_dim, c.dim), at + "w3": matrix(c.hidden_dim, c.dim),
            at + "w2": matrix(c.dim, c.hidden_dim),
        }
    return weights | {"norm": norm(), "output": matrix(c.vocab_size, c.dim)}


def _few_bits(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to 8 significant bits and to multiples of 2**-24, which bf16, f16 and f32 all hold exactly."""
    mantissa, exponent = np.frexp(values)
    rounded = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
    return np.where(np.abs(rounded) < 2.0**-14, 0, rounded).astype(np.float32)


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """A config.json as transformers 4 writes it."""
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": config.dim, "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.context, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "sliding_window": config.sliding_window, "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }


def mistral_fields(config: ModelConfig) -> dict[str, Any]:
    """A params.json; it says nothing of the ids of <s> and </s>."""
    fields = config.to_dict()
    del fields["bos_id"], fields["eos_id"]
    return {**fields, "max_seq_len": fields.pop("context")}


HF_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj", "w3": "mlp.up_proj",
}
MISTRAL_NAMES = {
    **{name: name for name in ("tok_embeddings", "norm", "output", "attention_norm", "ffn_norm")},
    **{name: f"attention.{name}" for name in ("wq", "wk", "wv", "wo")},
    **{name: f"feed_forward.{name}" for name in ("w1", "w2", "w3")},
}


def hf_name(name: str) -> str:
    """`layers.0.wq` -> `model.layers.0.self_attn.q_proj.weight`."""
    layer, _, part = name.rpartition(".")
    return (f"model.{layer}." if layer else "") + HF_NAMES[part] + ".weight"


def mistral_name(name: str) -> str:
    """`layers.0.wq` -> `layers.0.attention.wq.weight`."""
    layer, _, part = name.rpartition(".")
    return (f"{layer}." if layer else "") + MISTRAL_NAMES[part] + ".weight"


def save(path: Path, tensors: Mapping[str, NDArray[np.float32]], dtype: str) -> None:
    """Write a safetensors file; dtype: BF16, F16 or F32."""
    with path.open("wb") as file:
        file.write(make_header(((name, dtype, values.shape) for name, values in tensors.items()), {"format": "pt"}, 8))
        for values in tensors.values():
            file.write(to_bytes(values, dtype))


def to_bytes(values: NDArray[np.float32], dtype: str) -> bytes:
    """As stored in a safetensors file."""
    if dtype == "BF16":
        return to_bf16(values).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def write_hf(
    directory: Path, config: ModelConfig, weights: Weights, *,
    dtype: str = "BF16", shards: int = 1, index: bool = True, **fields: Any,
) -> Path:
    """A directory in Hugging Face layout; `fields` change its config.json. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", {**hf_fields(config), **fields})
    named = {hf_name(name): values for name, values in weights.items()}
    if shards == 1:
        save(directory / "model.safetensors", named, dtype)
    else:
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(named.items())[shard::shards])
            save(directory / file, part, dtype)
            weight_map |= dict.fromkeys(part, file)
        if index:
            _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    (directory / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    return directory


def write_mistral(
    directory: Path, config: ModelConfig, weights: Weights, *, dtype: str = "BF16", **fields: Any
) -> Path:
    """A directory in Mistral layout, its rotary pairs (2i, 2i + 1); `fields` change its params.json."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "params.json", {**mistral_fields(config), **fields})
    named = {}
    for name, values in weights.items():
        if name.endswith((".wq", ".wk")):
            heads = values.reshape(-1, 2, config.head_dim // 2, config.dim)
            values = heads.transpose(0, 2, 1, 3).reshape(values.shape)
        named[mistral_name(name)] = values
    save(directory / "consolidated.safetensors", named, dtype)
    (directory / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    return directory


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields), encoding="utf-8")


def babbler(directory: Path) -> Path:
    """The blob of a model with random weights, whose answers hardly ever end by themselves."""
    config = small_config(context=4096)
    source = write_hf(directory / "source", config, random_weights(config))
    return quantize(source, directory / "babbler.safetensors", progress=False)
