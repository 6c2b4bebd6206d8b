"""What people give instead of a checkpoint is said in its own words; what only looks different is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgemistral_quantize.checkpoint import Checkpoint
from safetensors.numpy import save_file

from edgemistral.errors import BadCheckpoint, BadConfig, BadInput
from edgemistral.files import sniff
from tests.checkpoints import SMALL, hf_name, random_weights, save, write_hf, write_mistral

WEIGHTS = random_weights(SMALL)
NAMED = {hf_name(name): values for name, values in WEIGHTS.items()}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4943162336\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Log in</title></head></html>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "c", SMALL, WEIGHTS)


def output(source: Path) -> bytes:
    return b"".join(strip.tobytes() for strip in Checkpoint(source).strips("output", 1 << 24))


# ---- read all the same ----

@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: "base_model.model." + name,
        lambda name: "_orig_mod." + name,
        lambda name: "language_model." + name,
        lambda name: "model." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: name.replace("model.layers.1.", "model.layers.1._orig_mod."),
        lambda name: "model." + name.removeprefix("model."),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_prefixes_of_wrappers_are_left_out(folder: Path, rename: Callable[[str], str], tied: bool) -> None:
    whole = output(folder)
    named = {rename(name): values for name, values in NAMED.items() if not (tied and name == "lm_head.weight")}
    write_hf(folder, SMALL, WEIGHTS, tie_word_embeddings=tied)
    save(folder / "model.safetensors", named, "BF16")
    assert tied or output(folder) == whole
    assert Checkpoint(folder).config == SMALL


def test_a_prefix_of_some_tensors_only_is_not_left_out(folder: Path) -> None:
    named = {("x." if "layers.1." in name else "") + name: values for name, values in NAMED.items()}
    save(folder / "model.safetensors", named, "BF16")
    with pytest.raises(BadCheckpoint, match=r"tensor model.layers.1.input_layernorm.weight is missing; x.model"):
        Checkpoint(folder)


def test_two_tensors_of_one_name_are_refused(folder: Path) -> None:
    save(folder / "model.safetensors", NAMED | {"_orig_mod.lm_head.weight": WEIGHTS["output"]}, "BF16")
    with pytest.raises(BadCheckpoint, match=r"two tensors are lm_head.weight"):
        Checkpoint(folder)


def test_hidden_files_and_leftovers_are_not_there(folder: Path) -> None:
    whole = output(folder)
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7" + bytes(99))
    (folder / ".DS_Store").write_bytes(bytes(99))
    save_file({"a": np.ones(1, np.float32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert output(folder) == whole


@pytest.mark.parametrize("spoil", ["pointers", "missing", "gap", "quantized"])
def test_the_layout_that_is_whole_is_read(folder: Path, spoil: str) -> None:
    whole = output(folder)
    write_mistral(folder, SMALL, WEIGHTS)
    if spoil == "quantized":
        save_file({"model.layers.0.mlp.up_proj.qweight": np.ones(1, np.int32)}, folder / "model.safetensors")
    else:
        (folder / "model.safetensors").unlink()
        write_hf(folder, SMALL, WEIGHTS, shards=3, index=spoil != "gap")
        shards = sorted(folder.glob("model-*.safetensors"))
        if spoil == "pointers":
            shards[0].write_bytes(LFS)
        else:
            shards[1].unlink()
    assert output(folder) == whole


def test_a_cache_folder_stands_for_its_snapshot(folder: Path, tmp_path: Path) -> None:
    whole = output(folder)
    cache = tmp_path / "hub" / "models--org--name"
    (cache / "snapshots").mkdir(parents=True)
    shutil.copytree(folder, cache / "snapshots" / "abc")
    for given in (cache, cache / "snapshots" / "abc", cache.parent):
        assert output(given) == whole
    (cache / "snapshots" / "def").mkdir()
    with pytest.raises(BadCheckpoint, match=r"has 2 snapshots \(abc, def\); give one"):
        Checkpoint(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert output(cache) == output(cache / "snapshots") == whole
    (cache.parent / "models--org--other").mkdir()
    with pytest.raises(BadCheckpoint, match="a cache of 2 models; give the folder of one"):
        Checkpoint(cache.parent)
    for path in (cache / "snapshots").iterdir():
        shutil.rmtree(path)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "cafe.incomplete").write_bytes(b"")
    with pytest.raises(BadCheckpoint, match=r"without a snapshot; cafe.incomplete is a download that was not finished"):
        Checkpoint(cache)


# ---- said in its own words ----

def replace_weights(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


def rename_weights(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def put(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def with_tensors(**extra: np.ndarray) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        kept = {name: values for name, values in NAMED.items() if "gate_proj" not in name}
        save_file(kept | {f"model.layers.0.mlp.gate_proj.{name}": values for name, values in extra.items()},
                  folder / "model.safetensors")

    return apply


def only_adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    save_file({"a": np.ones(1, np.float32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}))


def shards_without_the_last(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_hf(folder, SMALL, WEIGHTS, shards=3, index=False)
    (folder / "model-00003-of-00003.safetensors").unlink()


def two_sets_of_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for shards in (2, 3):
        write_hf(folder, SMALL, WEIGHTS, shards=shards, index=False)


def unfinished(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    place = folder / ".cache" / "huggingface" / "download"
    place.mkdir(parents=True)
    (place / "model.safetensors.123abc.incomplete").write_bytes(b"")


def in_a_folder(folder: Path) -> None:
    inner = folder / "checkpoint-500"
    inner.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(inner / path.name)


def dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "x")


BYTES = np.ones((4, 4), np.uint8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (replace_weights(LFS), r"model.safetensors: .*a Git LFS pointer, not the file itself; `git lfs pull`"),
        (replace_weights(PAGE), r"model.safetensors: .*an HTML page"),
        (replace_weights(b"GGUF\3\0\0\0" + bytes(99)), "a GGUF file"),
        (replace_weights(b"PK\3\4" + bytes(99)), "PyTorch's pickle format"),
        (replace_weights(b"\x80\2}q\0." + bytes(99)), "a Python pickle"),
        (replace_weights(b"Entry not found"), "a text that begins with 'Entry not found'"),
        (replace_weights(b""), "an empty file"),
        (replace_weights(bytes(4096)), "nothing but zeros"),
        (put("tokenizer.model", LFS), "tokenizer.model: a Git LFS pointer"),
        (put("config.json", PAGE), "config.json: an HTML page"),
        (put("generation_config.json", PAGE), "generation_config.json: an HTML page"),
        (only_adapter, "this is a LoRA adapter for 'org/base'; use quantize BASE DST --lora"),
        (rename_weights("consolidated.00.pth"), "consolidated.00.pth has a format that is not read"),
        (rename_weights("model.gguf"), "model.gguf: give that file itself"),
        (rename_weights("model.onnx"), "model.onnx has a format that is not read here: an ONNX model"),
        (shards_without_the_last, "model-00003-of-00003.safetensors is missing"),
        (two_sets_of_shards, "belong to two different sets of files"),
        (unfinished, "model.safetensors.123abc.incomplete is a download that was not finished"),
        (in_a_folder, "its folder checkpoint-500 has one: give that"),
        (dangling, "it links to a file that is not there"),
        (with_tensors(qweight=BYTES, qzeros=BYTES, scales=BYTES), "already quantized .GPTQ or AWQ"),
        (with_tensors(weight=BYTES, absmax=BYTES, quant_map=BYTES), "already quantized .bitsandbytes"),
        (with_tensors(weight=BYTES, SCB=BYTES), "already quantized .bitsandbytes"),
        (with_tensors(weight=BYTES, scales=BYTES, biases=BYTES), "already quantized .MLX"),
        (with_tensors(weight=BYTES, weight_scale_inv=BYTES), "already quantized .FP8"),
        (with_tensors(weight=BYTES, weight_scale=BYTES), "already quantized .FP8"),
        (with_tensors(weight_packed=BYTES, weight_scale=BYTES), "already quantized .compressed-tensors"),
        (with_tensors(q_weight=BYTES, q_scale=BYTES), "already quantized .EXL2"),
    ],
)
def test_what_was_given_is_said(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(BadInput, match=message) as caught:
        Checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"already quantized \(awq, 4 bits\)"),
        ({"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, r"\(bitsandbytes, 4 bits\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"already quantized \(fp8\)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"already quantized \(MLX, 4 bits\)"),
        ({"quantization_config": 3}, "already quantized; get the original"),
    ],
)
def test_configs_of_quantized_weights(folder: Path, fields: dict[str, object], message: str) -> None:
    write_hf(folder, SMALL, WEIGHTS, **fields)
    with pytest.raises(BadConfig, match=message):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", r"the weights without the config and the tokenizer; give the folder it lies in, .*c$"),
        ("config.json", "a file; give the folder it lies in"),
        ("tokenizer.model", "a file; give the folder it lies in"),
        ("page.safetensors", "an HTML page"),
        ("adapter_model.safetensors", "a file of a LoRA adapter; use quantize BASE DST --lora"),
        ("nothing", "no such directory or file"),
        ("link", "a link to a file that is not there"),
    ],
)
def test_a_file_instead_of_its_folder(folder: Path, name: str, message: str) -> None:
    (folder / "page.safetensors").write_bytes(PAGE)
    (folder / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "link").symlink_to(folder / "nothing")
    with pytest.raises(BadCheckpoint, match=message):
        Checkpoint(folder / name)


def test_a_name_on_hugging_face_is_not_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadCheckpoint, match="nothing is downloaded here"):
        Checkpoint(Path("mistralai/Mistral-7B-Instruct-v0.2"))


def test_ordinary_bytes_are_not_taken_for_something() -> None:
    assert sniff.describe(b'{"a": 1}') is None
    assert sniff.describe_text(b"\x08\0\0\0\0\0\0\0{}") is None
    assert sniff.describe_text(bytes(range(128, 255))) is None
