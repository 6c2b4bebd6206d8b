"""Adapters are merged as their papers say, whatever the base's layout, within the strips; what cannot be merged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgemistral_quantize import quantize
from edgemistral_quantize.checkpoint import Checkpoint
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgemistral.errors import BadCheckpoint
from edgemistral.files.bf16 import widen
from edgemistral.files.blob import Blob
from tests.checkpoints import SMALL, hf_name, random_weights, write_hf, write_mistral

WEIGHTS = random_weights(SMALL)
RNG = np.random.default_rng(1)
F32 = NDArray[np.float32]


def factor(*shape: int) -> F32:
    return RNG.standard_normal(shape).astype(np.float32) * np.float32(0.1)


def adapter(folder: Path, tensors: dict[str, F32], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "a/b", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def factors(name: str, rank: int = 4) -> tuple[F32, F32, dict[str, F32]]:
    """A, B, and the two by PEFT's names."""
    rows, cols = WEIGHTS[name].shape
    a, b = factor(rank, cols), factor(rows, rank)
    module = "base_model.model." + hf_name(name).removesuffix(".weight")
    return a, b, {module + ".lora_A.weight": a, module + ".lora_B.weight": b}


def read(checkpoint: Checkpoint, name: str, strip_bytes: int = 1) -> F32:
    return np.concatenate([widen(strip) for strip in checkpoint.strips(name, strip_bytes)])


@pytest.mark.parametrize("write", [write_hf, write_mistral])
@pytest.mark.parametrize(
    ("config", "scale"),
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"alpha_pattern": {"q_proj|o_proj": 2}}, 0.5), ({"lora_alpha": 1.0}, 0.25)],
)
def test_products_are_added(tmp_path: Path, write: Any, config: dict[str, Any], scale: float) -> None:
    a, b, stored = factors("layers.1.wq")
    c, d, more = factors("layers.0.wo")
    folder = adapter(tmp_path / "a", stored | more, **config)
    checkpoint = Checkpoint(write(tmp_path / "c", SMALL, WEIGHTS), lora=folder)
    merged = WEIGHTS["layers.1.wq"] + scale * (b.astype(np.float64) @ a)
    np.testing.assert_allclose(read(checkpoint, "layers.1.wqkv")[: SMALL.q_dim], merged, atol=1e-6)
    np.testing.assert_array_equal(read(checkpoint, "layers.1.wqkv")[SMALL.q_dim :][: SMALL.kv_dim], WEIGHTS["layers.1.wk"])
    np.testing.assert_allclose(
        read(checkpoint, "layers.0.wo"), WEIGHTS["layers.0.wo"] + scale * (d.astype(np.float64) @ c), atol=1e-6
    )
    assert folder / "adapter_model.safetensors" in checkpoint.files


def test_ranks_may_differ(tmp_path: Path) -> None:
    a, b, stored = factors("layers.0.w1", rank=2)
    folder = adapter(tmp_path / "a", stored, rank_pattern={"gate_proj": 2})
    checkpoint = Checkpoint(write_hf(tmp_path / "c", SMALL, WEIGHTS), lora=folder)
    gate = read(checkpoint, "layers.0.w13").reshape(-1, 2, 16, SMALL.dim)[:, 0].reshape(-1, SMALL.dim)
    np.testing.assert_allclose(gate, WEIGHTS["layers.0.w1"] + 4 * b @ a, atol=1e-6)


def test_dora_sets_the_length_of_each_row(tmp_path: Path) -> None:
    a, b, stored = factors("layers.0.w2")
    lengths = 1 + np.abs(factor(SMALL.dim))
    stored["base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector"] = lengths
    folder = adapter(tmp_path / "a", stored, use_dora=True)
    merged = read(Checkpoint(write_hf(tmp_path / "c", SMALL, WEIGHTS), lora=folder), "layers.0.w2")
    wanted = WEIGHTS["layers.0.w2"] + 2 * b @ a
    wanted *= (lengths / np.linalg.norm(wanted, axis=1))[:, None]
    np.testing.assert_allclose(merged, wanted, rtol=1e-4, atol=1e-6)


def test_embeddings_and_saved_modules(tmp_path: Path) -> None:
    a, b, head = factor(4, SMALL.vocab_size), factor(SMALL.dim, 4), factor(SMALL.vocab_size, SMALL.dim)
    folder = adapter(tmp_path / "a", {
        "base_model.model.model.embed_tokens.lora_embedding_A": a, "base_model.model.model.embed_tokens.lora_embedding_B": b,
        "base_model.model.lm_head.weight": head,
    })
    checkpoint = Checkpoint(write_hf(tmp_path / "c", SMALL, WEIGHTS), lora=folder)
    np.testing.assert_allclose(read(checkpoint, "tok_embeddings"), WEIGHTS["tok_embeddings"] + 2 * (b @ a).T, atol=1e-6)
    np.testing.assert_array_equal(read(checkpoint, "output"), head)


def test_a_tied_head_follows_its_embeddings(tmp_path: Path) -> None:
    a, b = factor(4, SMALL.vocab_size), factor(SMALL.dim, 4)
    folder = adapter(tmp_path / "a", {
        "base_model.model.model.embed_tokens.lora_embedding_A": a, "base_model.model.model.embed_tokens.lora_embedding_B": b,
    })
    checkpoint = Checkpoint(write_hf(tmp_path / "c", SMALL, WEIGHTS, tie_word_embeddings=True), lora=folder)
    np.testing.assert_array_equal(read(checkpoint, "output"), read(checkpoint, "tok_embeddings"))


def test_strips_make_no_difference_and_factors_count_as_memory(tmp_path: Path) -> None:
    _, _, stored = factors("layers.0.w2")
    base = write_hf(tmp_path / "c", SMALL, WEIGHTS)
    checkpoint = Checkpoint(base, lora=adapter(tmp_path / "a", stored))
    np.testing.assert_array_equal(read(checkpoint, "layers.0.w2"), read(checkpoint, "layers.0.w2", 1 << 24))
    assert checkpoint.min_strip_bytes == Checkpoint(base).min_strip_bytes + 8 * 4 * (SMALL.hidden_dim + SMALL.dim)


def test_an_adapter_of_zeros_changes_no_weight(tmp_path: Path) -> None:
    _, _, stored = factors("layers.0.wv")
    base = write_hf(tmp_path / "c", SMALL, WEIGHTS, dtype="F32")
    folder = adapter(tmp_path / "a", {name: np.zeros_like(values) for name, values in stored.items()})
    paths = [quantize(base, tmp_path / name, lora=lora, calibrate="none") for name, lora in (("p", None), ("m", folder))]
    with Blob.open(paths[0]) as plain, Blob.open(paths[1]) as merged:
        for name in plain.tensors:
            assert plain.metadata["sha256:" + name] == merged.metadata["sha256:" + name], name


GOOD = factors("layers.0.wv")[2]
FIRST = next(iter(GOOD))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (GOOD, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        (GOOD, {"fan_in_fan_out": True}, "fan_in_fan_out"),
        (GOOD, {"bias": "lora_only"}, "bias is 'lora_only'"),
        (GOOD, {"use_dora": True}, "use_dora in adapter_config.json and the tensors contradict"),
        (GOOD, {"init_lora_weights": "pissa_niter_16"}, "changed the base model's weights too"),
        (GOOD, {"r": 8}, "has rank 4, but adapter_config.json says 8"),
        (GOOD, {"lora_alpha": None}, "lora_alpha is 'None'"),
        (GOOD, {"rank_pattern": {"(": 3}}, "has the pattern '\\('"),
        ({FIRST: GOOD[FIRST]}, {}, "v_proj.lora_B is missing"),
        ({FIRST.replace("layers.0", "layers.9"): GOOD[FIRST]}, {}, "which the base model does not have"),
        (GOOD | {"base_model.model.model.layers.0.self_attn.v_proj.bias": factor(64)}, {}, "not a factor of LoRA"),
        (GOOD | {FIRST: factor(4, 99)}, {}, r"has shape \[4, 99\], the base model asks for \[4, 192\]"),
        (GOOD | {"base_model.model.lm_head.weight": factor(9, 192)}, {}, r"has shape \[9, 192\], the base"),
        ({}, {}, "holds no tensors"),
    ],
)
def test_adapters_that_are_refused(
    tmp_path: Path, tensors: dict[str, F32], config: dict[str, Any], message: str
) -> None:
    base = write_hf(tmp_path / "c", SMALL, WEIGHTS)
    with pytest.raises(BadCheckpoint, match=message):
        Checkpoint(base, lora=adapter(tmp_path / "a", tensors, **config))


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "c", SMALL, WEIGHTS)
    folder = adapter(tmp_path / "a", GOOD)
    for given, message in (
        (base, "so not a LoRA adapter"), (tmp_path / "x", "no such directory"),
        (folder / "adapter_model.safetensors", "--lora takes the adapter's folder"),
    ):
        with pytest.raises(BadCheckpoint, match=message):
            Checkpoint(base, lora=given)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(BadCheckpoint, match=r"adapter_model.bin is a pickle"):
        Checkpoint(base, lora=folder)


def test_a_nan_that_the_adapter_brings(tmp_path: Path) -> None:
    tensors = {name: values.copy() for name, values in GOOD.items()}
    tensors[FIRST][0, 0] = np.nan
    checkpoint = Checkpoint(write_hf(tmp_path / "c", SMALL, WEIGHTS), lora=adapter(tmp_path / "a", tensors))
    with pytest.raises(BadCheckpoint, match=r"lora_A.weight has a NaN or infinity in row 0"):
        read(checkpoint, "layers.0.wqkv")
