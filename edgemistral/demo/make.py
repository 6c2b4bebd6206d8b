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
from edgemistral.config import ModelConfig
from edgemistral.container import make_header
from edgemistral.errors import BadBlob, BadInput
from edgemistral.paths import cache_dir
from edgemistral.tokenizer import Tokenizer

TOKENIZER = Path(__file__).with_name("tokenizer.model")
REVISION = 1   # counts changes of what is made here, so that no older file in a cache is taken for it
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
    from edgemistral_quantize.checkpoint import MISTRAL, expected_tensors

    tokenizer = TOKENIZER.read_bytes()
    config = ModelConfig(
        dim=256, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=32, hidden_dim=704,
        vocab_size=Tokenizer(tokenizer).n_words, context=4096, norm_eps=1e-5, rope_theta=1e6, sliding_window=None,
        bos_id=1, eos_id=2,
    )
    tensors = [(name, shape) for _, name, shape in expected_tensors(config, MISTRAL, tied=False)]
    rng = np.random.default_rng(SEED)
    with (directory / "consolidated.safetensors").open("wb") as file:
        file.write(make_header(((name, "F32", shape) for name, shape in tensors), {}))
        for _, shape in tensors:
            values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.7 / shape[1] ** 0.5
            file.write(values.astype("<f4").tobytes())
    params = {**config.to_dict(), "max_seq_len": config.context}
    (directory / "params.json").write_text(json.dumps(params), encoding="utf-8")
    (directory / "tokenizer.model").write_bytes(tokenizer)
    return directory
