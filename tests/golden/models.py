"""The checkpoints behind the golden logits: weights made from a seed, the same bits on every machine, without torch.

Matrices are N(0, 0.7 / sqrt(columns)), embeddings N(0, 1), norms near 1, all rounded to bfloat16. The numbers come
straight from the bits of a counter-based generator and only exact operations follow, because NumPy promises no stable
stream of its own normal numbers. `make_golden.py` feeds the same arrays to Hugging Face transformers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import serialize_file

from edgemistral.config import ModelConfig

HERE = Path(__file__).parent
TOKENIZER = HERE / "tokenizer.model"   # 400 pieces, fewer than any vocabulary below

BF16 = NDArray[np.uint16]


@dataclass(frozen=True)
class GoldenModel:
    """One small model; its golden logits are for `n_ids` random token ids."""

    name: str
    seed: int
    n_ids: int
    config: ModelConfig

    @property
    def path(self) -> Path:
        """The committed logits."""
        return HERE / f"{self.name}.npz"

    @property
    def ids(self) -> NDArray[np.int32]:
        """<s>, then random ids."""
        ids = _raw(self.seed, self.n_ids) % np.uint64(self.config.vocab_size)
        ids[0] = self.config.bos_id
        return ids.astype(np.int32)


def _config(**fields: Any) -> ModelConfig:
    common = {"context": 512, "norm_eps": 1e-5, "sliding_window": None, "bos_id": 1, "eos_id": 2}
    return ModelConfig(**{**common, **fields})


MODELS = [
    GoldenModel(
        "odd_sizes", seed=1, n_ids=220,   # nothing is a multiple of a panel or a block
        config=_config(dim=192, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=32, hidden_dim=448, vocab_size=515,
                       rope_theta=10000.0),
    ),
    GoldenModel(
        "sliding_window", seed=2, n_ids=150,
        config=_config(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=640, vocab_size=600,
                       rope_theta=10000.0, sliding_window=40),
    ),
    GoldenModel(
        "mistral_heads", seed=3, n_ids=200,   # 4 query heads a key/value head, 128 dimensions each
        config=_config(dim=256, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=128, hidden_dim=896, vocab_size=640,
                       rope_theta=1000000.0),
    ),
]


def _raw(seed: int, n: int) -> NDArray[np.uint64]:
    return np.random.Philox(key=seed).random_raw(n)


def _normal(seed: int, n: int) -> NDArray[np.float64]:
    """n numbers of mean 0 and variance 1: sums of 12 uniform ones (exact in float64, cut off at 6 sigma)."""
    uniform = _raw(seed, 3 * n).astype("<u8").view("<u2").reshape(n, 12)
    return (uniform.astype(np.int64).sum(axis=1) - 6 * 65535) / 65536


def to_bf16(x: NDArray[np.float64]) -> BF16:
    """Rounded to the nearest bfloat16, ties to even, as bits."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def tensors(model: GoldenModel, embedding_std: float = 1.0) -> dict[str, BF16]:
    """All tensors by their Hugging Face names, as bits of bfloat16."""
    c = model.config
    shapes = {"model.embed_tokens.weight": (c.vocab_size, c.dim)}
    for i in range(c.n_layers):
        at = f"model.layers.{i}."
        shapes |= {
            at + "self_attn.q_proj.weight": (c.q_dim, c.dim),
            at + "self_attn.k_proj.weight": (c.kv_dim, c.dim),
            at + "self_attn.v_proj.weight": (c.kv_dim, c.dim),
            at + "self_attn.o_proj.weight": (c.dim, c.q_dim),
            at + "mlp.gate_proj.weight": (c.hidden_dim, c.dim),
            at + "mlp.up_proj.weight": (c.hidden_dim, c.dim),
            at + "mlp.down_proj.weight": (c.dim, c.hidden_dim),
            at + "input_layernorm.weight": (c.dim,),
            at + "post_attention_layernorm.weight": (c.dim,),
        }
    shapes |= {"model.norm.weight": (c.dim,), "lm_head.weight": (c.vocab_size, c.dim)}
    made = {}
    for number, (name, shape) in enumerate(shapes.items()):
        x = _normal(1000 * model.seed + number, int(np.prod(shape))).reshape(shape)
        if name == "model.embed_tokens.weight":
            x *= embedding_std
        elif len(shape) == 1:
            x = 1 + x / 8
        else:
            x *= 0.7 / np.sqrt(shape[1])
        made[name] = to_bf16(x)
    return made


def sha256(bits: Mapping[str, BF16]) -> str:
    """Of all tensors in order: committed beside the logits, to tell a drifting generator from a wrong kernel."""
    digest = hashlib.sha256()
    for name, x in bits.items():
        digest.update(name.encode() + x.astype("<u2").tobytes())
    return digest.hexdigest()


# To the names that `naive.forward` takes.
_HF_TO_OURS = {
    "self_attn.q_proj": "wq", "self_attn.k_proj": "wk", "self_attn.v_proj": "wv", "self_attn.o_proj": "wo",
    "mlp.gate_proj": "w1", "mlp.up_proj": "w3", "mlp.down_proj": "w2",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output",
}   # fmt: skip


def our_name(hf_name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> layers.3.w3"""
    name = hf_name.removeprefix("model.").removesuffix(".weight")
    if not name.startswith("layers."):
        return _HF_TO_OURS[name]
    _, layer, rest = name.split(".", 2)
    return f"layers.{layer}.{_HF_TO_OURS[rest]}"


def mistral_name(hf_name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> layers.3.feed_forward.w3.weight"""
    *at, name = our_name(hf_name).split(".")
    part = {"w1": "feed_forward.", "w2": "feed_forward.", "w3": "feed_forward."}.get(name, "")
    part = part or ("attention." if name in ("wq", "wk", "wv", "wo") else "")
    return ".".join([*at, part + name, "weight"])


def interleave_pairs(x: BF16, head_dim: int) -> BF16:
    """Rows of wq or wk from Hugging Face's rotary pairs (i, i + D / 2) to Mistral's (2 i, 2 i + 1)."""
    rows, cols = x.shape
    return x.reshape(rows // head_dim, 2, head_dim // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json as transformers 4 writes it."""
    c = config
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "torch_dtype": "bfloat16",
        "hidden_act": "silu", "hidden_size": c.dim, "intermediate_size": c.hidden_dim, "head_dim": c.head_dim,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads,
        "vocab_size": c.vocab_size, "max_position_embeddings": c.context, "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta, "sliding_window": c.sliding_window, "tie_word_embeddings": False,
        "bos_token_id": c.bos_id, "eos_token_id": c.eos_id,
    }   # fmt: skip


def mistral_params(config: ModelConfig) -> dict[str, Any]:
    """The content of params.json."""
    c = config
    params = {
        "dim": c.dim, "n_layers": c.n_layers, "head_dim": c.head_dim, "hidden_dim": c.hidden_dim, "n_heads": c.n_heads,
        "n_kv_heads": c.n_kv_heads, "norm_eps": c.norm_eps, "vocab_size": c.vocab_size, "rope_theta": c.rope_theta,
        "max_seq_len": c.context,
    }   # fmt: skip
    return params if c.sliding_window is None else {**params, "sliding_window": c.sliding_window}


def write_hf(model: GoldenModel, folder: Path, bits: Mapping[str, BF16] | None = None) -> Path:
    """A checkpoint directory in Hugging Face layout."""
    bits = tensors(model) if bits is None else bits
    return _write(folder, "config.json", hf_config(model.config), "model.safetensors", bits)


def write_mistral(model: GoldenModel, folder: Path, bits: Mapping[str, BF16] | None = None) -> Path:
    """The same weights in Mistral's layout."""
    bits = tensors(model) if bits is None else bits
    ours = {}
    for name, x in bits.items():
        is_rotated = name.endswith(("q_proj.weight", "k_proj.weight"))
        ours[mistral_name(name)] = interleave_pairs(x, model.config.head_dim) if is_rotated else x
    return _write(folder, "params.json", mistral_params(model.config), "consolidated.safetensors", ours)


def _write(folder: Path, config_file: str, config: object, file: str, bits: Mapping[str, BF16]) -> Path:
    folder.mkdir(parents=True)
    (folder / config_file).write_text(json.dumps(config, indent=2), encoding="utf-8")
    entries = {
        name: {"dtype": "bfloat16", "shape": list(x.shape), "data": x.astype("<u2").tobytes()} for name, x in bits.items()
    }
    serialize_file(entries, str(folder / file))
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    return folder
