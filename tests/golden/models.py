"""The models behind the golden logits: weights made from a seed, the same bits on every machine, without torch.

Matrices are N(0, 0.7 / sqrt(columns)), embeddings N(0, 1), norms near 1, all rounded to bfloat16. The numbers come
straight from the bits of a counter-based generator and only exact operations follow, because NumPy promises no stable
stream of its own normal numbers. `make_golden.py` feeds the same arrays to Hugging Face transformers.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.files.bf16 import to_bf16, widen
from tests.checkpoints import Weights

HERE = Path(__file__).parent
TOKENIZER = HERE / "tokenizer.model"   # 400 pieces, fewer than any vocabulary below


@dataclass(frozen=True)
class GoldenModel:
    """One small model; its golden logits are for `n_ids` random token ids."""

    name: str
    seed: int
    n_ids: int
    config: ModelConfig
    embedding_std: float = 1.0
    output_std: float = 0.7   # of the logits

    @cached_property
    def weights(self) -> Weights:
        """All tensors by our names, exact in bfloat16; rotary pairs as (i, i + head_dim / 2)."""
        return {
            name: _to_bf16(self._values(1000 * self.seed + number, name, shape))
            for number, (name, shape) in enumerate(_shapes(self.config).items())
        }

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        """<s>, then random ids."""
        ids = _random_bits(self.seed, self.n_ids) % np.uint64(self.config.vocab_size)
        ids[0] = self.config.bos_id
        return ids.astype(np.int32)

    @property
    def path(self) -> Path:
        """The committed logits."""
        return HERE / f"{self.name}.npz"

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        """The committed logits (n_ids, vocab_size), once the weights are found to be those they were made with."""
        with np.load(self.path) as file:
            assert str(file["sha256"]) == self.sha256, "the weights are not those of the golden logits"
            return file["logits"]

    @property
    def sha256(self) -> str:
        """Of all weights in order: tells a drifting generator from a wrong kernel."""
        digest = hashlib.sha256()
        for name, values in self.weights.items():
            digest.update(name.encode() + values.astype("<f4").tobytes())
        return digest.hexdigest()

    def write(self, writer: Callable[[Path, ModelConfig, Weights], Path], folder: Path) -> Path:
        """A checkpoint by `checkpoints.write_hf` or `write_mistral`, with a tokenizer for the small vocabulary."""
        writer(folder, self.config, self.weights)
        shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
        return folder

    def _values(self, seed: int, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        x = _normal(seed, int(np.prod(shape))).reshape(shape)
        if name == "tok_embeddings":
            return x * self.embedding_std
        std = self.output_std if name == "output" else 0.7
        return 1 + x / 8 if len(shape) == 1 else x * (std / np.sqrt(shape[1]))


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


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    c = config
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (c.vocab_size, c.dim)}
    for layer in range(c.n_layers):
        at = f"layers.{layer}."
        shapes |= {
            at + "wq": (c.q_dim, c.dim), at + "wk": (c.kv_dim, c.dim), at + "wv": (c.kv_dim, c.dim),
            at + "wo": (c.dim, c.q_dim), at + "w1": (c.hidden_dim, c.dim), at + "w3": (c.hidden_dim, c.dim),
            at + "w2": (c.dim, c.hidden_dim), at + "attention_norm": (c.dim,), at + "ffn_norm": (c.dim,),
        }
    return shapes | {"norm": (c.dim,), "output": (c.vocab_size, c.dim)}


def _random_bits(seed: int, n: int) -> NDArray[np.uint64]:
    return np.random.Philox(key=seed).random_raw(n)


def _normal(seed: int, n: int) -> NDArray[np.float64]:
    """n numbers of mean 0 and variance 1: sums of 12 uniform ones (exact in float64, cut off at 6 sigma)."""
    uniform = _random_bits(seed, 3 * n).astype("<u8").view("<u2").reshape(n, 12)
    return (uniform.astype(np.int64).sum(axis=1) - 6 * 65535) / 65536


def _to_bf16(x: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rounded to the nearest bfloat16, ties to even."""
    return widen(to_bf16(x.astype(np.float32)))
