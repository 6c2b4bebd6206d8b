"""A checkpoint of true shapes and random weights, to measure speed and memory: python bench/synthetic.py DIR

The default has the shapes, the files and the tokenizer of Mistral-7B-Instruct-v0.2: 14.5 GB of bfloat16 in three
shards. Weights are Gaussian with a standard deviation of 0.7 / sqrt(columns), which keeps activations of ordinary size
through all layers; norms are near 1.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
from edgemistral_quantize.checkpoint import HUGGING_FACE, expected_tensors
from numpy.typing import NDArray
from tqdm import tqdm

from bench import harness
from edgemistral.config import ModelConfig
from edgemistral.demo import checkpoint_dir
from edgemistral.files.bf16 import to_bf16
from edgemistral.files.safetensors import make_header

V2 = ModelConfig(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=32000, context=32768,
    norm_eps=1e-5, rope_theta=1e6, sliding_window=None, bos_id=1, eos_id=2,
)
POOL = 16_777_213   # random numbers; a prime, so that no two rows of a matrix are the same part of the pool
PIECE = 1 << 22     # values written at a time


def synthetic_blob(work: Path, n_layers: int) -> Path:
    """A 4-bit blob of so many layers of a 7B, in WORK; made if it is not there. One of all layers is seven_b.py's."""
    from edgemistral_quantize import quantize

    if n_layers == V2.n_layers:
        whole = work / "7b-q4.safetensors"
        if not whole.exists():
            raise click.ClickException(f"{whole} is missing: python bench/seven_b.py {work} --only quantize makes it")
        return whole
    blob, source = work / f"{n_layers}-layers-q4.safetensors", work / f"{n_layers}-layers"
    if not blob.exists():
        harness.prepare(work, 10**9 * n_layers)
        if not (source / "tokenizer.model").exists():      # which is written last
            write_synthetic(source, dataclasses.replace(V2, n_layers=n_layers), progress=True)
        quantize(source, blob, bits=4, calibrate="none")
    return blob


def write_synthetic(
    directory: Path, config: ModelConfig = V2, shards: int = 3, seed: int = 0, progress: bool = False
) -> Path:
    """Write a checkpoint in Hugging Face layout; returns its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = [(name, shape) for _, name, shape in expected_tensors(config, HUGGING_FACE, tied=False)]
    total = sum(2 * math.prod(shape) for _, shape in tensors)
    values = _Values(seed)
    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=directory.name, disable=None if progress else True) as bar:
        for number, part in enumerate(_split(tensors, total, shards), 1):
            name = f"model-{number:05}-of-{shards:05}.safetensors"
            with (directory / name).open("wb") as file:
                file.write(make_header(((tensor, "BF16", shape) for tensor, shape in part), {"format": "pt"}, 8))
                for tensor, shape in part:
                    weight_map[tensor] = name
                    for piece in values.pieces(shape):
                        file.write(piece)
                        bar.update(piece.nbytes)
    _write_json(directory / "model.safetensors.index.json", {
        "metadata": {"total_size": total}, "weight_map": weight_map,
    })
    head_dim = {} if config.head_dim * config.n_heads == config.dim else {"head_dim": config.head_dim}
    _write_json(directory / "config.json", head_dim | {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id, "hidden_act": "silu", "hidden_size": config.dim,
        "initializer_range": 0.02, "intermediate_size": config.hidden_dim, "max_position_embeddings": config.context,
        "model_type": "mistral", "num_attention_heads": config.n_heads, "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0", "use_cache": True, "vocab_size": config.vocab_size,
    })
    (directory / "tokenizer.model").write_bytes(_tokenizer(config.vocab_size).read_bytes())
    return directory


class _Values:
    """Parts of one pool of random numbers, so that only the disk limits the time to write 14.5 GB."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._gaussian = self._rng.standard_normal(POOL, np.float32)
        self._scaled: dict[int, NDArray[np.uint16]] = {}

    def pieces(self, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint16]]:
        if len(shape) == 1:
            yield to_bf16(1 + 0.05 * self._rng.standard_normal(shape).astype(np.float32))
            return
        rows, cols = shape
        if cols not in self._scaled:
            self._scaled[cols] = to_bf16(self._gaussian * np.float32(0.7 / cols**0.5))
        pool, at, left = self._scaled[cols], int(self._rng.integers(POOL)), rows * cols
        while left:
            piece = pool[at : at + min(left, PIECE)]
            yield piece
            at, left = (at + piece.size) % POOL, left - piece.size


def _split(
    tensors: list[tuple[str, tuple[int, ...]]], total: int, shards: int
) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Runs of tensors of about the same size."""
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(shards)]
    begin = 0
    for name, shape in tensors:
        parts[begin * shards // total].append((name, shape))
        begin += 2 * math.prod(shape)
    yield from parts


def _tokenizer(vocab_size: int) -> Path:
    """The largest real tokenizer that fits: that of v0.3, of v0.1 and v0.2, or of the demo."""
    if (mistral_common := find_spec("mistral_common")) and mistral_common.origin:
        data = Path(mistral_common.origin).parent / "data"
        if vocab_size >= 32768:
            return data / "mistral_instruct_tokenizer_240323.model.v3"
        if vocab_size >= 32000:
            return data / "tokenizer.model.v1"
    return checkpoint_dir() / "tokenizer.model"


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _shape_options(command: Any) -> Any:
    """An option for every field of the config."""
    for field in reversed(dataclasses.fields(ModelConfig)):
        kind = float if field.name in ("norm_eps", "rope_theta") else int
        option = "--" + field.name.replace("_", "-")
        command = click.option(option, type=kind, default=getattr(V2, field.name), show_default=True)(command)
    return command


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--shards", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@_shape_options
def main(directory: Path, shards: int, seed: int, **fields: Any) -> None:
    """Write a synthetic checkpoint to DIRECTORY, for example: python bench/synthetic.py /tmp/mistral --n-layers 2"""
    write_synthetic(directory, ModelConfig(**fields), shards, seed, progress=True)


if __name__ == "__main__":
    main()
