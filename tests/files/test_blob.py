"""The blob's file format: what is written can be read, by others too, and nothing else is taken for it."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from edgemistral.errors import BadBlob, BadInput, DamagedBlob
from edgemistral.files.blob import NO_DIGEST, Blob
from edgemistral.files.blob_writer import BlobWriter
from edgemistral.files.layout import ALIGNMENT
from edgemistral.text.spec import TextSpec
from tests.files.written import CONFIG, RECIPE, SOURCE, TOKENIZER, content


def header_of(path: Path) -> dict[str, Any]:
    whole = path.read_bytes()
    header: dict[str, Any] = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    return header


def seal(text: bytes) -> bytes:
    """A header's text with its own checksum put right, as blob.py describes it."""
    at = text.find(b'"header_sha256":"') + len(b'"header_sha256":"')
    blank = text[:at] + NO_DIGEST.encode() + text[at + 64 :]
    return blank[:at] + hashlib.sha256(blank).hexdigest().encode() + blank[at + 64 :]


def with_header(source: Path, target: Path, change: Callable[[dict[str, Any]], object], step: int = ALIGNMENT) -> Path:
    """A copy of a blob whose header is changed, padded and sealed again; its data is the same."""
    whole = source.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % step)
    text = seal(text) if "header_sha256" in header["__metadata__"] else text
    target.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    return target


# ---- reading ----

def test_everything_comes_back(path: Path) -> None:
    with Blob.open(str(path)) as blob, BlobWriter(path, CONFIG, RECIPE, len(TOKENIZER), force=True) as writer:
        assert (blob.config, blob.recipe) == (CONFIG, RECIPE)
        assert blob.tensors == writer.tensors
        assert list(blob.offsets) == list(blob.tensors)
        for name, spec in blob.tensors.items():
            array = blob.array(name)
            assert array.shape == spec.shape
            assert not array.flags.writeable
            assert array.tobytes() == content(writer, name)
            assert blob.metadata["source_sha256:" + name] == SOURCE
            assert blob.offsets[name] % ALIGNMENT == 0
            assert array.ctypes.data % ALIGNMENT == 0
        assert (blob.array("norm").dtype, blob.array("tok_embeddings").dtype) == (np.float32, np.uint16)
        blob.verify()


def test_the_safetensors_library_reads_it(path: Path) -> None:
    with Blob.open(path) as blob, safe_open(path, "np") as other:
        assert other.metadata() == blob.metadata
        assert set(other.keys()) == set(blob.tensors)
        for name, spec in blob.tensors.items():
            if spec.dtype != "BF16":   # which numpy does not have
                np.testing.assert_array_equal(other.get_tensor(name), blob.array(name))


def test_the_bytes_of_the_format_are_pinned(path: Path) -> None:
    """Changing them is changing the format: count FORMAT_VERSION up."""
    whole = path.read_bytes()
    header = header_of(path)
    assert whole[:8] == struct.pack("<Q", 5688)
    assert list(header)[:4] == ["__metadata__", "tok_embeddings", "layers.0.attention_norm", "layers.0.wqkv"]
    assert header["tok_embeddings"] == {"dtype": "BF16", "shape": [50, 192], "data_offsets": [0, 19200]}
    assert header["layers.0.wqkv"] == {"dtype": "U8", "shape": [20, 2, 1088], "data_offsets": [19968, 63488]}
    assert list(header["__metadata__"])[:7] == [
        "format", "format_version", "config", "recipe", "text", "header_sha256", "sha256:tok_embeddings",
    ]
    assert header["__metadata__"]["recipe"] == '{"bits": 4, "output_bits": 8}'
    assert hashlib.sha256(whole).hexdigest() == "53692eb7c9eab1a088059c3defa1ba12ae3e9873113e13d49aa1b315286b2021"


def test_arrays_outlive_the_blob(path: Path) -> None:
    blob = Blob.open(path)
    norm = blob.array("norm")
    before = norm.copy()
    blob.close()
    np.testing.assert_array_equal(norm, before)


def test_verify_reads_everything_and_names_the_damaged_tensor(path: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copy(path, tmp_path))
    with Blob.open(damaged) as blob:
        seen: list[int] = []
        blob.verify(seen.append)
        assert sum(seen) == sum(spec.n_bytes for spec in blob.tensors.values())
        for name in ("tok_embeddings", "layers.0.w13.row_scales", "tokenizer"):
            with damaged.open("r+b") as file:
                file.seek(blob.offsets[name] + 3)
                byte = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte[0] ^ 1]))
                file.flush()
                with pytest.raises(DamagedBlob, match=f"tensor {name} is damaged") as caught:
                    blob.verify()
                assert caught.value.tensor == name
                file.seek(-1, 1)
                file.write(byte)
        damaged.unlink()
        with pytest.raises(DamagedBlob, match="tensor tok_embeddings cannot be read: No such file"):
            blob.verify()


# ---- refusing ----

def test_files_that_are_no_blobs(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for data, message in (
        (b"", "not a safetensors file"),
        (b"GGUF" * 100, "not a safetensors file"),
        (struct.pack("<Q", 1 << 60) + whole[8:], "not a safetensors file"),
        (b"\x02" + bytes(7) + b"{}", "a safetensors file but not a blob"),
        (whole[:start - 1], "truncated inside its header"),
        (whole[:-1], r"truncated \("),
        (whole + b"x", "longer than its header says"),
        (whole[:8] + whole[8:start].replace(b"1000000.0", b"1000001.0") + whole[start:], "its header is damaged"),
        (struct.pack("<Q", 1 << 20) + b'{"a":' + b"[" * ((1 << 20) - 5), "nested too deeply"),
        (struct.pack("<Q", 64) + b'{"a":1,"a":2}'.ljust(64), "'a' occurs twice"),
        (struct.pack("<Q", 64) + b"{\xff}".ljust(64), "not usable JSON"),
        (struct.pack("<Q", 4096) + (b'{"a":' + b"9" * 4000 + b"}").ljust(4096), "a number of 4000 digits"),
    ):
        other.write_bytes(data)
        with pytest.raises(BadBlob, match=message) as caught:
            Blob.open(other)
        assert str(other) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadBlob, match="No such file"):
        Blob.open(tmp_path / "nowhere")
    with pytest.raises(BadBlob, match="a directory, not a blob"):
        Blob.open(tmp_path)


def metadata(key: str, value: str | None) -> Callable[[dict[str, Any]], object]:
    def change(header: dict[str, Any]) -> None:
        if value is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = value

    return change


def tensor(name: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].update(fields)


CONFIG_FIELDS = CONFIG.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata("format", "other"), "not a blob"),
        (metadata("format_version", "3"), "format version '3'"),
        (metadata("text", "[]"), "text is not a JSON object"),
        (metadata("text", '{"voice": 1}'), "text has unknown fields: voice"),
        (metadata("text", '{"end_ids": [-1]}'), r"text.end_ids is '\[-1\]'"),
        (metadata("config", None), "config is not usable JSON"),
        (metadata("config", "[]"), "not a JSON object"),
        (metadata("config", json.dumps({**CONFIG_FIELDS, "dim": -192})), "dim is -192"),
        (metadata("config", json.dumps({**CONFIG_FIELDS, "dim": 256})), "tok_embeddings is BF16 .50, 192., its config"),
        (metadata("config", json.dumps({**CONFIG_FIELDS, "n_layers": 1 << 20})), "layers.1.attention_norm is missing"),
        (metadata("config", json.dumps({**CONFIG_FIELDS, "vocab_size": 64})), "tok_embeddings is BF16"),
        (metadata("recipe", '{"bits": 8, "output_bits": 8}'), "layers.0.wqkv is U8"),
        (metadata("recipe", '{"bits": 5, "output_bits": 8}'), "recipe is"),
        (metadata("recipe", '{"bits": true, "output_bits": 8}'), "recipe is"),
        (metadata("sha256:norm", None), "sha256:norm is not 64"),
        (metadata("sha256:norm", "A" * 64), "sha256:norm is not 64"),
        (metadata("source_sha256:norm", "5" * 63), "source_sha256:norm is not 64"),
        (tensor("norm", dtype="U8"), "norm': U8 .192. does not take the 768 bytes"),
        (tensor("norm", dtype="U8", shape=[768]), "norm is U8 .768., its config asks for F32 .192."),
        (tensor("norm", dtype="X"), "unknown dtype 'X'"),
        (tensor("norm", dtype=["F32"]), "unknown dtype"),
        (tensor("norm", shape=[192.0]), "lists of counts"),
        (tensor("norm", shape=[True, 192]), "lists of counts"),
        (tensor("norm", shape=[-192]), "lists of counts"),
        (tensor("norm", shape=None), "lists of counts"),
        (tensor("norm", data_offsets=[0, 768]), "overlaps its neighbour"),
        (tensor("norm", data_offsets=[768, 0]), "does not take"),
        (tensor("norm", data_offsets=[0]), "lists of counts"),
        (tensor("norm", more=1), "not described by"),
        (lambda header: header.update(norm=3), "not described by"),
        (lambda header: header.pop("norm"), "leaves a hole|overlaps"),
        (lambda header: header.update(extra=header.pop("norm")), "tensor norm is missing"),
        (lambda header: header.pop("tokenizer"), "longer than"),
        (lambda header: header.update(__metadata__={"format": 3}), "not an object of strings"),
        (lambda header: header.update(__metadata__=[]), "not an object of strings"),
    ],
)
def test_headers_that_are_refused(
    path: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    changed = with_header(path, tmp_path / "changed", change)
    with pytest.raises(BadBlob, match=message) as caught:
        Blob.open(changed)
    assert str(changed) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_extra_tensor_is_refused(path: Path, tmp_path: Path) -> None:
    def extend(header: dict[str, Any]) -> None:
        begin = header["tokenizer"]["data_offsets"][1]
        header["extra"] = {"dtype": "U8", "shape": [0], "data_offsets": [begin, begin]}

    with pytest.raises(BadBlob, match="'extra' does not belong to its config"):
        Blob.open(with_header(path, tmp_path / "changed", extend))


def test_unaligned_data_is_refused(path: Path, tmp_path: Path) -> None:
    changed = with_header(path, tmp_path / "changed", metadata("note", "x" * 9), step=8)
    if (8 + int.from_bytes(changed.read_bytes()[:8], "little")) % ALIGNMENT == 0:
        changed = with_header(path, tmp_path / "changed", metadata("note", "x" * 17), step=8)
    with pytest.raises(BadBlob, match="not at a multiple of 64"):
        Blob.open(changed)


def test_format_1_is_still_read(path: Path, tmp_path: Path) -> None:
    """It has no `text`: Mistral's own template, a SentencePiece model, no further tokens."""
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"]["format_version"] = "1"
        del header["__metadata__"]["text"]

    with Blob.open(path) as blob, Blob.open(with_header(path, tmp_path / "old", change)) as old:
        assert old.text == TextSpec()
        assert (old.config, old.recipe, old.tensors) == (blob.config, blob.recipe, blob.tensors)
        old.verify()
        for name in blob.tensors:
            np.testing.assert_array_equal(old.array(name), blob.array(name))


def test_unknown_metadata_and_another_order_of_names_are_fine(path: Path, tmp_path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"]["note"] = "from a later version"
        header["tok_embeddings"] = header.pop("tok_embeddings")   # to the end

    with Blob.open(with_header(path, tmp_path / "changed", change)) as blob:
        assert next(iter(blob.tensors)) == "tok_embeddings"
        assert blob.metadata["note"] == "from a later version"
        blob.verify()


@settings(max_examples=300, deadline=None)
@given(data=st.data(), sealed=st.booleans())
def test_any_mutated_header_is_refused_or_means_the_same(
    path: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sealed: bool
) -> None:
    """Also when the attacker knows to put `header_sha256` right: then what the kernels touch must still be in place."""
    whole = bytearray(path.read_bytes())
    length = int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 8 + length - 1))
        whole[at] = data.draw(st.sampled_from(b'{}[]",:0123456789.-eEntfu \x00\xff') | st.integers(0, 255))
    if sealed:
        whole[8 : 8 + length] = seal(bytes(whole[8 : 8 + length]))
    mutated = tmp_path_factory.getbasetemp() / "mutated"
    mutated.write_bytes(whole)
    with Blob.open(path) as blob:
        try:
            other = Blob.open(mutated)
        except BadBlob as problem:
            assert str(mutated) in str(problem)
            return
        with other:
            assert other.tensors == blob.tensors
            assert other.offsets == blob.offsets
            if not sealed:
                assert (other.config, other.recipe, other.metadata) == (blob.config, blob.recipe, blob.metadata)


@pytest.mark.skipif(sys.platform == "win32", reason="files in use cannot be opened again there")
def test_two_programs_do_not_write_one_file(tmp_path):
    path = tmp_path / "a"
    with BlobWriter(path, CONFIG, RECIPE, len(TOKENIZER)) as writer:
        begun = writer.partial.read_bytes()
        for how in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(BadInput, match="unfinished run" if not how else "another program is writing it"):
                BlobWriter(path, CONFIG, RECIPE, len(TOKENIZER), **how)
        assert writer.partial.read_bytes() == begun
