"""GGUF files: the same rows as the checkpoint they were made of, and hostile ones refused before anything is allocated."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgemistral_quantize.checkpoint import Checkpoint
from edgemistral_quantize.sources.gguf_header import TYPES, read_gguf_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgemistral.errors import BadCheckpoint, BadConfig, BadInput
from edgemistral.files.bf16 import widen
from tests.checkpoints import TOKENIZER, random_weights, small_config

gguf = pytest.importorskip("gguf")

CONFIG = small_config(dim=256, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512, vocab_size=2048)
WEIGHTS = random_weights(CONFIG)
NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output", "attention_norm": "attn_norm",
         "ffn_norm": "ffn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output", "w1": "ffn_gate",
         "w2": "ffn_down", "w3": "ffn_up"}


def write_gguf(path: Path, kind: str = "F32", without: tuple[str, ...] = (), **fields: Any) -> Path:
    """As llama.cpp's converter writes them: rotary pairs are neighbours. fields: metadata to change (None: leave out)."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(TOKENIZER))
    n = pieces.vocab_size()
    types = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in range(n)]
    metadata: dict[str, Any] = {
        "llama.embedding_length": CONFIG.dim, "llama.block_count": CONFIG.n_layers,
        "llama.attention.head_count": CONFIG.n_heads, "llama.attention.head_count_kv": CONFIG.n_kv_heads,
        "llama.feed_forward_length": CONFIG.hidden_dim, "llama.context_length": CONFIG.context,
        "llama.attention.layer_norm_rms_epsilon": CONFIG.norm_eps, "llama.rope.freq_base": CONFIG.rope_theta,
        "llama.rope.dimension_count": CONFIG.head_dim, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i).encode() for i in range(n)],
        "tokenizer.ggml.scores": [pieces.get_score(i) for i in range(n)], "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, **fields,
    }
    writer = gguf.GGUFWriter(str(path), metadata.pop("general.architecture", "llama"))
    for name, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    for name, values in WEIGHTS.items():
        layer, _, part = name.rpartition(".")
        theirs = layer.replace("layers", "blk") + ("." if layer else "") + NAMES[part] + ".weight"
        if part in ("wq", "wk"):
            values = values.reshape(-1, 2, CONFIG.head_dim // 2, CONFIG.dim).swapaxes(1, 2).reshape(values.shape)
        if theirs in without:
            continue
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(theirs, np.ascontiguousarray(values))
        else:
            stored = gguf.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType[kind])
            writer.add_tensor(theirs, stored, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "модель.gguf")


def read(checkpoint: Checkpoint, name: str, strip_bytes: int = 1 << 24) -> np.ndarray:
    return np.concatenate([widen(strip) for strip in checkpoint.strips(name, strip_bytes)])


def test_floats_are_the_same_rows(plain: Path) -> None:
    checkpoint = Checkpoint(plain)
    assert checkpoint.config == CONFIG
    assert checkpoint.quantized_as is None
    w = WEIGHTS
    at = "layers.1."
    np.testing.assert_array_equal(
        read(checkpoint, at + "wqkv"), np.concatenate([w[at + "wq"], w[at + "wk"], w[at + "wv"]])
    )
    for name in ("tok_embeddings", "output", at + "wo", at + "w2"):
        np.testing.assert_array_equal(read(checkpoint, name), w[name])
    np.testing.assert_array_equal(read(checkpoint, "norm")[0], w["norm"])


def test_the_tokenizer_is_the_same(plain: Path) -> None:
    from edgemistral.text.spec import TextSpec

    ours = Checkpoint(plain).tokenizer_of_text
    theirs = TextSpec().tokenizer(TOKENIZER.read_bytes(), CONFIG.vocab_size, "tokenizer.model")
    for text in ("Hello world", "  two  spaces", "naïve — 模型 🙂", "a\nb\tc", "</s> <s> [INST]", "1234567", ""):
        assert ours.encode(text) == theirs.encode(text), text
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.encode_chat(messages) == theirs.encode_chat(messages)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types_are_dequantized_as_the_library_does(tmp_path: Path, kind: str) -> None:
    checkpoint = Checkpoint(write_gguf(tmp_path / "m.gguf", kind))
    number = gguf.GGMLQuantizationType[kind]
    wanted = gguf.dequantize(gguf.quantize(WEIGHTS["layers.0.w2"], number), number)
    np.testing.assert_array_equal(read(checkpoint, "layers.0.w2", 1), wanted)
    if kind not in ("F16", "BF16"):
        assert checkpoint.quantized_as == kind
        assert checkpoint.bits == gguf.GGML_QUANT_SIZES[number][1] * 8 / 32


def test_sizes_of_types_are_the_librarys() -> None:
    for number, kind in TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == kind.name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (kind.block, kind.n_bytes)


def test_without_the_library_only_floats_are_read(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = write_gguf(tmp_path / "m.gguf", "Q8_0")
    for name in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    Checkpoint(plain)
    with pytest.raises(BadCheckpoint, match=r"is quantized as Q8_0, .*pip install 'edgemistral\[gguf\]'"):
        Checkpoint(quantized)


def test_a_missing_head_is_tied(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_gguf(tmp_path / "m.gguf", without=("output.weight",)))
    np.testing.assert_array_equal(read(checkpoint, "output"), WEIGHTS["tok_embeddings"])


@pytest.mark.parametrize("fields", [
    {"tokenizer.ggml.token_type": None}, {"tokenizer.chat_template": " "}, {"tokenizer.ggml.bos_token_id": None},
    {"llama.vocab_size": 999, "general.quantization_version": 2},
])
def test_fields_that_old_converters_left_out_or_got_wrong(plain: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    wanted, got = (Checkpoint(path).tokenizer_of_text for path in (plain, write_gguf(tmp_path / "m.gguf", **fields)))
    messages = [{"role": "user", "content": "Hi </s> naïve 模型"}]
    assert got.encode_chat(messages) == wanted.encode_chat(messages)
    assert got.end_ids == wanted.end_ids
    assert got.control == wanted.control


@pytest.mark.parametrize("given", [1, 2])
def test_a_model_in_two_files(plain: Path, tmp_path: Path, given: int) -> None:
    write_gguf(tmp_path / "m-00001-of-00002.gguf", without=("output.weight",))
    second = gguf.GGUFWriter(str(tmp_path / "m-00002-of-00002.gguf"), "llama")
    second.add_tensor("output.weight", np.ascontiguousarray(WEIGHTS["output"]))
    second.write_header_to_file()
    second.write_kv_data_to_file()
    second.write_tensors_to_file()
    second.close()
    checkpoint = Checkpoint(tmp_path / f"m-0000{given}-of-00002.gguf")
    np.testing.assert_array_equal(read(checkpoint, "output"), WEIGHTS["output"])
    (tmp_path / f"m-0000{3 - given}-of-00002.gguf").unlink()
    with pytest.raises(BadCheckpoint, match=f"m-0000{3 - given}-of-00002.gguf is missing"):
        Checkpoint(tmp_path / f"m-0000{given}-of-00002.gguf")


def test_a_download_that_ends_in_zeros(plain: Path, tmp_path: Path) -> None:
    data = plain.read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(BadCheckpoint, match=r"tensor output_norm.weight is nothing but zeros; was the download finished\?"):
        read(Checkpoint(tmp_path / "m.gguf"), "norm")


def test_linear_scaling(tmp_path: Path) -> None:
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert Checkpoint(write_gguf(tmp_path / "m.gguf", **fields)).config.rope_factors == (4.0,) * 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"general.architecture": "clip"}, r"reads images \(mmproj\); give the model's own file"),
        ({"general.type": "mmproj"}, r"reads images \(mmproj\)"),
        ({"general.type": "adapter"}, "a LoRA adapter as a GGUF file"),
        ({"general.type": "imatrix"}, "an importance matrix"),
        ({"tokenizer.chat_template": "chatml"}, "the chat template does not use `messages`"),
        ({"tokenizer.chat_template": "{% for %}"}, "line 1 of the chat template"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"llama.rope.dimension_count": 32, "llama.attention.key_length": 64}, "heads have 64 dimensions"),
        ({"llama.block_count": None}, "llama.block_count missing"),
        ({"llama.block_count": 3}, "tensor blk.2.attn_norm.weight is missing"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.scores": [1.0]}, "tokenizer.ggml.scores is missing or of another length"),
        ({"tokenizer.ggml.eos_token_id": 1 << 30}, "outside the vocabulary"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.merges is missing"),
    ],
)
def test_models_that_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        Checkpoint(write_gguf(tmp_path / "m.gguf", **fields))
    assert "m.gguf" in str(caught.value)
    assert isinstance(caught.value, BadCheckpoint | BadConfig)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def hostile(tensors: int = 0, fields: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


HUGE = (1 << 62) - 1
TENSOR = string(b"t") + struct.pack("<IQ", 1, 32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (hostile(version=1), "of version 1"),
        (hostile(version=3 << 24), "big-endian"),
        (hostile(tensors=HUGE), "claims"),
        (hostile(fields=HUGE), "claims"),
        (hostile(fields=1), "ends inside a key"),
        (hostile(fields=1, rest=struct.pack("<Q", HUGE)), "ends inside a key"),
        (hostile(fields=1, rest=string(b"k") + struct.pack("<IQ", 8, HUGE)), "which takes"),
        (hostile(fields=1, rest=string(b"k") + struct.pack("<IIQ", 9, 8, HUGE)), "which takes"),
        (hostile(fields=1, rest=string(b"k") + struct.pack("<IIQ", 9, 4, HUGE)), "which takes"),
        (hostile(fields=1, rest=string(b"k") + struct.pack("<IIQ", 9, 9, 1)), "array of the unknown type 9"),
        (hostile(fields=1, rest=string(b"k") + struct.pack("<I", 99)), "unknown type 99"),
        (hostile(fields=2, rest=2 * (string(b"k") + struct.pack("<IB", 0, 1))), "twice"),
        (hostile(tensors=1, rest=string(b"t") + struct.pack("<I", 1 << 31)), "dimensions"),
        (hostile(tensors=1, rest=TENSOR + struct.pack("<IQ", 0, HUGE)), "lies outside the file or at an odd place"),
        (hostile(tensors=1, rest=TENSOR + struct.pack("<IQ", 0, 32) + bytes(99)), "lies outside the file"),
        (hostile(tensors=1, rest=TENSOR + struct.pack("<IQ", 0, 1) + bytes(999)), "at an odd place"),
        (hostile(tensors=1, rest=TENSOR + struct.pack("<IQ", 99, 0)), "has the type number 99; supported: F32"),
        (hostile(tensors=1, rest=TENSOR + struct.pack("<IQ", 12, 0) + bytes(999)), r"dimensions \[32\] as Q4_K"),
        (hostile(tensors=2, rest=2 * (TENSOR + struct.pack("<IQ", 0, 0)) + bytes(999)), "twice"),
        (
            hostile(tensors=2, rest=b"".join(string(n) + struct.pack("<IQIQ", 1, 32, 0, 0) for n in (b"a", b"b")) + bytes(999)),
            "overlaps",
        ),
        (hostile(fields=1, rest=string(b"general.alignment") + struct.pack("<II", 4, 3)), "alignment 3"),
    ],
)
def test_hostile_headers(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(BadCheckpoint, match=message):
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), value=st.integers(0, 255), cut=st.integers(0, 1 << 20))
def test_damaged_files_are_refused_or_read(plain: Path, tmp_path: Path, at: int, value: int, cut: int) -> None:
    data = bytearray(plain.read_bytes())
    data[at] = value
    (tmp_path / "d.gguf").write_bytes(data[: len(data) - (cut if cut % 3 else 0)])
    try:
        read_gguf_header(tmp_path / "d.gguf")
    except BadCheckpoint as problem:
        assert "\n" not in str(problem)
