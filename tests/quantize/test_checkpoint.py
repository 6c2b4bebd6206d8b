"""Reading checkpoints: both layouts become the same rows, and every fault is named before anything is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgemistral_quantize.checkpoint import Checkpoint
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgemistral.errors import BadCheckpoint, BadConfig, BadInput
from edgemistral.files import layout
from edgemistral.files.safetensors import read_header
from tests.checkpoints import (
    SMALL,
    Weights,
    hf_name,
    mistral_name,
    random_weights,
    save,
    small_config,
    to_bytes,
    write_hf,
    write_mistral,
)

WEIGHTS = random_weights(SMALL)


def read(checkpoint: Checkpoint, name: str, strip_bytes: int = 1 << 20) -> NDArray[Any]:
    return np.concatenate(list(checkpoint.strips(name, strip_bytes)))


def stored_rows(weights: Weights, name: str) -> NDArray[np.float32]:
    """The rows that the blob's tensor `name` is made of."""
    at = name.rpartition(".")[0] + "."
    if name.endswith(".wqkv"):
        return np.concatenate([weights[at + "wq"], weights[at + "wk"], weights[at + "wv"]])
    if name.endswith(".w13"):
        pairs = zip(np.split(weights[at + "w1"], 28), np.split(weights[at + "w3"], 28), strict=True)
        return np.concatenate([rows for pair in pairs for rows in pair])
    return np.atleast_2d(weights[name])


WRITERS: list[tuple[str, Callable[[Path, str], Path]]] = [
    ("hf", lambda path, dtype: write_hf(path, SMALL, WEIGHTS, dtype=dtype)),
    ("hf of transformers 5", lambda path, dtype: write_hf(
        path, SMALL, WEIGHTS, dtype=dtype, rope_theta=None, head_dim=None,
        rope_parameters={"rope_theta": SMALL.rope_theta, "rope_type": "default"},
    )),
    ("hf in 3 shards", lambda path, dtype: write_hf(path, SMALL, WEIGHTS, dtype=dtype, shards=3)),
    ("hf in 2 shards without index", lambda path, dtype: write_hf(
        path, SMALL, WEIGHTS, dtype=dtype, shards=2, index=False
    )),
    ("mistral", lambda path, dtype: write_mistral(path, SMALL, WEIGHTS, dtype=dtype)),
]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("layout_name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
def test_every_layout_gives_the_same_rows(
    tmp_path: Path, layout_name: str, write: Callable[[Path, str], Path], dtype: str
) -> None:
    checkpoint = Checkpoint(write(tmp_path / layout_name, dtype))
    assert checkpoint.config == SMALL
    assert checkpoint.tokenizer == (tmp_path / layout_name / "tokenizer.model").read_bytes()
    assert checkpoint.n_bytes == sum(values.size for values in WEIGHTS.values()) * (4 if dtype == "F32" else 2)
    tensors = [matrix.name for matrix in layout.matrices(SMALL, layout.Recipe())]
    for name in [*tensors, "tok_embeddings", "norm", "layers.0.attention_norm", "layers.1.ffn_norm"]:
        assert read(checkpoint, name).tobytes() == to_bytes(stored_rows(WEIGHTS, name), dtype), name


def test_strips_are_small_and_whole_panels(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_mistral(tmp_path / "c", SMALL, WEIGHTS))
    for name in ("layers.0.wqkv", "layers.0.w13", "layers.0.w2", "output"):
        strips = list(checkpoint.strips(name, 1))   # as small as they get
        assert max(2 * strip.nbytes for strip in strips) <= checkpoint.min_strip_bytes
        assert all(len(strip) % 32 == 0 for strip in strips[:-1])
        np.testing.assert_array_equal(np.concatenate(strips), read(checkpoint, name))


def test_files_of_the_safetensors_library(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "c", SMALL, WEIGHTS)
    save_file({hf_name(name): values for name, values in WEIGHTS.items()}, directory / "model.safetensors")
    np.testing.assert_array_equal(read(Checkpoint(directory), "output"), WEIGHTS["output"])


def test_hugging_face_is_preferred_where_both_are(tmp_path: Path) -> None:
    """As in Mistral's own repositories; but not when only the other one has weights."""
    directory = write_mistral(tmp_path / "c", SMALL, WEIGHTS, sliding_window=64)
    write_hf(directory, SMALL, WEIGHTS, sliding_window=128)
    assert Checkpoint(directory).config.sliding_window == 128
    (directory / "model.safetensors").unlink()
    assert Checkpoint(directory).config.sliding_window == 64


def test_newer_tokenizer_names_are_found(tmp_path: Path) -> None:
    directory = write_mistral(tmp_path / "c", SMALL, WEIGHTS)
    (directory / "tokenizer.model").rename(directory / "tokenizer.model.v3")
    assert Checkpoint(directory).tokenizer


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_output_head_is_the_embeddings(tmp_path: Path, stored: bool) -> None:
    weights = WEIGHTS if stored else {name: values for name, values in WEIGHTS.items() if name != "output"}
    for directory in (
        write_hf(tmp_path / "hf", SMALL, weights, tie_word_embeddings=True),
        write_mistral(tmp_path / "mistral", SMALL, weights, tied_embeddings=True),
    ):
        assert read(Checkpoint(directory), "output").tobytes() == to_bytes(WEIGHTS["tok_embeddings"], "BF16")


def test_constants_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "c", SMALL, WEIGHTS)
    named = {hf_name(name): values for name, values in WEIGHTS.items()}
    named["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    save(directory / "model.safetensors", named, "BF16")
    Checkpoint(directory)


def test_dtypes_may_differ_within_a_model(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "c", SMALL, WEIGHTS)
    named = {hf_name(name): values for name, values in WEIGHTS.items()}
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        named[name] = named[name].astype(np.float16)
    named["lm_head.weight"] = named["lm_head.weight"].astype(np.float64)
    save_file(named, directory / "model.safetensors")
    checkpoint = Checkpoint(directory)
    sizes = 0
    for name in ("layers.0.wqkv", "layers.1.w13", "output"):
        rows = read(checkpoint, name)
        np.testing.assert_array_equal(rows.astype(np.float32), stored_rows(WEIGHTS, name))
    for name in [*(m.name for m in layout.matrices(SMALL, layout.Recipe())), "tok_embeddings", "norm",
                 *(f"layers.{i}.{norm}" for i in (0, 1) for norm in ("attention_norm", "ffn_norm"))]:
        sizes += sum(strip.nbytes for strip in checkpoint.strips(name, 1 << 20))
    assert sizes == checkpoint.n_bytes   # so that the progress ends at 100 %


# ---- faults ----

def change_weights(**changed: NDArray[np.float32] | None) -> Callable[[Path], None]:
    """Rewrite the weights with some changed, or left out; `layers__0__wq` stands for layers.0.wq."""
    def apply(directory: Path) -> None:
        named = {hf_name(name): values for name, values in WEIGHTS.items()}
        for key, values in changed.items():
            name = hf_name(key.replace("__", "."))
            if values is None:
                del named[name]
            else:
                named[name] = values
        save(directory / "model.safetensors", named, "F32")

    return apply


def add_file(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(data)


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def only_torch(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def index(weight_map: object) -> Callable[[Path], object]:
    def spoil(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "weights.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def with_integers(directory: Path) -> None:
    named = {hf_name(name): values for name, values in WEIGHTS.items()}
    integers = {"lm_head.weight": np.ones((SMALL.vocab_size, SMALL.dim), np.int8)}
    save_file(named | integers, directory / "model.safetensors")


def in_two_files(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory / "copy.safetensors")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (shutil.rmtree, BadCheckpoint, "no such directory"),
        (remove("config.json"), BadCheckpoint, "neither config.json"),
        (remove("tokenizer.model"), BadCheckpoint, "no tokenizer.model"),
        (remove("model.safetensors"), BadCheckpoint, "no safetensors files with weights; is the download complete"),
        (only_torch, BadCheckpoint, "pytorch_model.bin has a format that is not read"),
        (add_file("tokenizer.model", b"\x00\x01"), BadCheckpoint, "tokenizer.model is not a SentencePiece model"),
        (add_file("config.json", b"{"), BadConfig, "config.json is not usable JSON"),
        (add_file("config.json", b"[]"), BadConfig, "config.json: not a JSON object"),
        (add_file("config.json", b'{"model_type": "gemma"}'), BadConfig, "config.json: model_type is 'gemma'"),
        (add_file("model.safetensors", b"version https://git-lfs"), BadCheckpoint, "model.safetensors: not a saf"),
        (truncate, BadCheckpoint, "model.safetensors: truncated"),
        (change_weights(norm=None), BadCheckpoint, "tensor model.norm.weight is missing"),
        (change_weights(output=None), BadCheckpoint, "tensor lm_head.weight is missing"),
        (change_weights(layers__1__w2=None), BadCheckpoint, "tensor model.layers.1.mlp.down_proj.weight is missing"),
        (change_weights(layers__2__wq=WEIGHTS["norm"]), BadCheckpoint, "model.layers.2.* does not belong"),
        (
            change_weights(layers__0__wk=WEIGHTS["layers.0.wk"].T), BadCheckpoint,
            r"safetensors: tensor model.layers.0.self_attn.k_proj.weight has shape \[192, 64\].*\[64, 192\]",
        ),
        (with_integers, BadCheckpoint, "tensor lm_head.weight has dtype I8; supported: BF16, F16, F32"),
        (in_two_files, BadCheckpoint, "tensor .* is in copy.safetensors too"),
        (index({"x": "model-1.safetensors"}), BadCheckpoint, "lists 'model-1.safetensors', which is not there"),
        (index({"x": "../c/weights.safetensors"}), BadCheckpoint, "which is not there"),
        (index({"x": 3}), BadCheckpoint, "no weight_map of file names"),
        (index([]), BadCheckpoint, "no weight_map of file names"),
    ],
)
def test_faults_are_named(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[BadInput], message: str
) -> None:
    directory = write_hf(tmp_path / "c", SMALL, WEIGHTS)
    spoil(directory)
    with pytest.raises(error, match=message) as caught:
        Checkpoint(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    config = small_config(vocab_size=2047)
    with pytest.raises(BadCheckpoint, match="has 2048 pieces, but the model's vocabulary only 2047"):
        Checkpoint(write_hf(tmp_path / "c", config, random_weights(config)))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["layers.0.w1", "layers.1.wk", "output", "norm"])
def test_values_that_are_not_finite(tmp_path: Path, dtype: str, value: float, name: str) -> None:
    spoilt = {**WEIGHTS, name: WEIGHTS[name].copy()}
    row = 0 if name == "norm" else 60
    np.atleast_2d(spoilt[name])[row, 7] = value
    checkpoint = Checkpoint(write_mistral(tmp_path / "c", SMALL, spoilt, dtype=dtype))
    stored = {"layers.0.w1": "layers.0.w13", "layers.1.wk": "layers.1.wqkv"}.get(name, name)
    with pytest.raises(BadCheckpoint) as caught:
        read(checkpoint, stored, 32 * 192 * 4)
    if name == "layers.1.wk":
        row = 57   # in the file: row 28 of the second head is the latter of pair 12
    where = f"{tmp_path / 'c' / 'consolidated.safetensors'}: tensor {mistral_name(name)}"
    assert str(caught.value) == f"{where} has a NaN or infinity in row {row}"


def test_files_that_change_while_they_are_read(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "c", SMALL, WEIGHTS)
    checkpoint = Checkpoint(directory)
    path = directory / "model.safetensors"
    with path.open("rb") as file:
        end = max(entry.offset for entry in read_header(file, path, BadCheckpoint).tensors.values())
    with path.open("r+b") as file:
        file.truncate(end + 100)
    with pytest.raises(BadCheckpoint, match=r"model.safetensors: tensor lm_head.weight ends early"):
        read(checkpoint, "output")
    path.unlink()
    with pytest.raises(BadCheckpoint, match=r"tensor model.norm.weight cannot be read: No such file"):
        read(checkpoint, "norm")
