"""Make the demo model: until a trained one exists, a small Mistral with random weights, which babbles.

It shows that everything works (tokenizer, quantizer, kernels, chat) and how fast, not what a model can say.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

import edgemistral
from edgemistral.blob import Blob
from edgemistral.container import make_header
from edgemistral.errors import BadBlob, BadInput
from edgemistral.paths import cache_dir

TOKENIZER = Path(__file__).with_name("tokenizer.model")
REVISION = 1   # counts changes of what is made here, so that no older file in a cache is taken for it

DIM, LAYERS, HEADS, KV_HEADS, HIDDEN_DIM, CONTEXT = 256, 4, 8, 2, 704, 4096
SEED = 0


def demo_model() -> Path:
    """Path of the demo model's blob, made on first use (about a second).

    Safe when several processes ask at once. Raises BadInput when the cache folder cannot be written.
    """
    blob = cache_dir() / f"demo-{edgemistral.__version__}-{REVISION}.safetensors"
    if _is_blob(blob):
        return blob
    from edgemistral_quantize import quantize  # only when there is something to make: it loads numba

    try:
        blob.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="demo-", dir=blob.parent) as scratch:
            made = quantize(_write_checkpoint(Path(scratch)), Path(scratch) / blob.name, progress=False)
            try:
                made.replace(blob)
            except PermissionError:   # Windows: another process was faster and has it open
                if not _is_blob(blob):
                    raise
    except OSError as problem:
        raise BadInput(f"{blob}: cannot be made: {problem.strerror}; EDGEMISTRAL_CACHE names another folder") from None
    return blob


def _is_blob(path: Path) -> bool:
    try:
        Blob.open(path).close()
    except BadBlob:
        return False
    return True


def _write_checkpoint(directory: Path) -> Path:
    """A random checkpoint in Mistral layout, float32."""
    from sentencepiece import SentencePieceProcessor

    vocab_size = SentencePieceProcessor(model_file=str(TOKENIZER)).vocab_size()
    head_dim = DIM // HEADS
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (vocab_size, DIM)}
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.attention_norm": (DIM,),
            f"layers.{layer}.attention.wq": (DIM, DIM),
            f"layers.{layer}.attention.wk": (KV_HEADS * head_dim, DIM),
            f"layers.{layer}.attention.wv": (KV_HEADS * head_dim, DIM),
            f"layers.{layer}.attention.wo": (DIM, DIM),
            f"layers.{layer}.ffn_norm": (DIM,),
            f"layers.{layer}.feed_forward.w1": (HIDDEN_DIM, DIM),
            f"layers.{layer}.feed_forward.w2": (DIM, HIDDEN_DIM),
            f"layers.{layer}.feed_forward.w3": (HIDDEN_DIM, DIM),
        }
    shapes |= {"norm": (DIM,), "output": (vocab_size, DIM)}

    rng = np.random.default_rng(SEED)
    with (directory / "consolidated.safetensors").open("wb") as file:
        file.write(make_header(((name + ".weight", "F32", shape) for name, shape in shapes.items()), {}))
        for shape in shapes.values():
            values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.7 / shape[1] ** 0.5
            file.write(values.astype("<f4").tobytes())
    params = {
        "dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "head_dim": head_dim,
        "hidden_dim": HIDDEN_DIM, "vocab_size": vocab_size, "norm_eps": 1e-5, "rope_theta": 1e6, "max_seq_len": CONTEXT,
    }
    (directory / "params.json").write_text(json.dumps(params), encoding="utf-8")
    (directory / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    return directory
