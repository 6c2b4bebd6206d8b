"""From checkpoint to blob: the same bytes whatever the layout, the strips and the interruptions."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgemistral_quantize import convert, quantize

from edgemistral.errors import BadCheckpoint, BadConfig, BadInput
from edgemistral.files import layout
from edgemistral.files.blob import Blob
from tests.checkpoints import SMALL, TOKENIZER, random_weights, small_config, to_bytes, write_hf, write_mistral

WEIGHTS = random_weights(SMALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("checkpoint") / "моя модель", SMALL, WEIGHTS)


@pytest.fixture(scope="module")
def blob_bytes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return quantize(checkpoint, tmp_path_factory.mktemp("blob") / "blob").read_bytes()


def stored_rows(blob: Blob, name: str) -> np.ndarray:
    levels = blob.array(name + ".levels") if name + ".levels" in blob.tensors else None
    return layout.dequantize(blob.array(name), blob.array(name + ".row_scales"), levels)


@pytest.mark.parametrize(("bits", "output_bits", "bound"), [(4, 8, 0.0065), (8, 4, 3e-5)])
def test_the_blob_holds_the_checkpoint(
    checkpoint: Path, tmp_path: Path, bits: int, output_bits: int, bound: float
) -> None:
    """Relative squared error of every matrix; what is not quantized, exactly; padding worth zero."""
    path = quantize(checkpoint, tmp_path / "b", bits=bits, output_bits=output_bits, calibrate="none")
    with Blob.open(path) as blob:
        blob.verify()
        assert blob.config == SMALL
        w, at = WEIGHTS, "layers.1."
        gate, up = (np.pad(w[at + name], [(0, 64), (0, 0)]) for name in ("w1", "w3"))
        for name, wanted, limit in (
            ("wqkv", np.concatenate([w[at + "wq"], w[at + "wk"], w[at + "wv"]]), bound),
            ("wo", w[at + "wo"], bound),
            ("w13", layout.interleave_gate_up(gate, up), bound),
            ("w2", w[at + "w2"], bound),
            ("output", w["output"], 3e-5 if output_bits == 8 else 0.0065),
        ):
            stored = stored_rows(blob, name if name == "output" else at + name)
            rows, cols = wanted.shape
            error = ((stored[:rows, :cols] - wanted) ** 2).sum() / (wanted**2).sum()
            assert error < limit, name
            assert not stored[rows:].any()
            assert not stored[:, cols:].any()
        assert blob.array("tok_embeddings").tobytes() == to_bytes(w["tok_embeddings"], "BF16")
        np.testing.assert_array_equal(blob.array(at + "ffn_norm"), w[at + "ffn_norm"])
        assert blob.array("tokenizer").tobytes() == TOKENIZER.read_bytes()


def test_source_checksums_are_of_the_canonical_rows(checkpoint: Path, blob_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(blob_bytes)
    w = WEIGHTS
    rows = np.concatenate([w["layers.0.wq"], w["layers.0.wk"], w["layers.0.wv"]])
    with Blob.open(tmp_path / "b") as blob:
        for name in ("layers.0.wqkv", "layers.0.wqkv.row_scales", "layers.0.wqkv.levels"):
            digest = hashlib.sha256(to_bytes(rows, "BF16")).hexdigest()
            assert blob.metadata["source_sha256:" + name] == digest
        assert blob.metadata["source_sha256:tokenizer"] == hashlib.sha256(TOKENIZER.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_mistral(path, SMALL, WEIGHTS),
        lambda path: write_hf(path, SMALL, WEIGHTS, shards=3),
        lambda path: write_hf(path, SMALL, WEIGHTS, shards=2, index=False),
    ],
    ids=["mistral", "sharded", "without index"],
)
def test_the_layout_makes_no_difference(write: Callable[[Path], Path], blob_bytes: bytes, tmp_path: Path) -> None:
    assert quantize(write(tmp_path / "c"), tmp_path / "b").read_bytes() == blob_bytes


@pytest.mark.parametrize("strip_bytes", [1, 100_000])
def test_strips_make_no_difference(
    checkpoint: Path, blob_bytes: bytes, tmp_path: Path, strip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "STRIP_BYTES", strip_bytes)
    assert quantize(checkpoint, tmp_path / "b").read_bytes() == blob_bytes


def test_source_dtypes(tmp_path: Path, blob_bytes: bytes) -> None:
    """float16 and float32 give the same tensors where the values are the same."""
    (tmp_path / "bf16").write_bytes(blob_bytes)
    for dtype in ("F16", "F32"):
        path = quantize(write_hf(tmp_path / dtype, SMALL, WEIGHTS, dtype=dtype), tmp_path / (dtype + ".q"))
        with Blob.open(tmp_path / "bf16") as blob, Blob.open(path) as other:
            for name in blob.tensors:
                assert blob.metadata["sha256:" + name] == other.metadata["sha256:" + name], name


def test_embeddings_are_rounded_to_the_nearest_even_bfloat16(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(WEIGHTS["tok_embeddings"].shape).astype(np.float32)
    values.view(np.uint32)[0, :4] = 0x3F808000, 0x3F818000, 0x3F818001, 0x3F807FFF   # ties and their neighbours
    directory = write_hf(tmp_path / "c", SMALL, {**WEIGHTS, "tok_embeddings": values}, dtype="F32")
    with Blob.open(quantize(directory, tmp_path / "b")) as blob:
        wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
        np.testing.assert_array_equal(blob.array("tok_embeddings"), wanted)


# ---- refusing ----

def test_bad_arguments_write_nothing(checkpoint: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"bits": 3}, "bits is 3; supported: 4, 8, and averages between 4.25 and 8.25"),
        ({"output_bits": 16}, "output_bits is 16"),
        ({"max_ram": 1000}, "max_ram is 1000 bytes; this checkpoint needs 458752"),
    ):
        with pytest.raises(BadInput, match=message):
            quantize(checkpoint, tmp_path / "b", **options)
    with pytest.raises(BadConfig):
        quantize(write_hf(tmp_path / "c", SMALL, WEIGHTS, hidden_act="gelu"), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_the_checkpoint_itself_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    source = checkpoint / "model.safetensors"
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(source)
    for dst in (source, tmp_path / "link", checkpoint / ".." / checkpoint.name / "config.json"):
        with pytest.raises(BadInput, match="a part of the checkpoint itself"):
            quantize(checkpoint, dst, force=True)
    assert source.read_bytes() == before


def test_an_existing_blob_is_kept_unless_forced(checkpoint: Path, blob_bytes: bytes, tmp_path: Path) -> None:
    dst = tmp_path / "b"
    dst.write_bytes(b"precious")
    with pytest.raises(BadInput, match="exists already"):
        quantize(checkpoint, dst)
    assert dst.read_bytes() == b"precious"
    assert quantize(checkpoint, dst, force=True).read_bytes() == blob_bytes


# ---- interruptions ----

def test_a_bad_value_in_the_middle_and_resume_after_repair(blob_bytes: bytes, tmp_path: Path) -> None:
    spoilt = {**WEIGHTS, "layers.1.w1": WEIGHTS["layers.1.w1"].copy()}
    spoilt["layers.1.w1"][300, 3] = np.nan
    directory, dst = write_hf(tmp_path / "c", SMALL, spoilt), tmp_path / "b"
    with pytest.raises(BadCheckpoint, match=r"tensor model.layers.1.mlp.gate_proj.weight has a NaN .* in row 300"):
        quantize(directory, dst)
    assert not dst.exists()
    write_hf(directory, SMALL, WEIGHTS)
    with pytest.raises(BadInput, match="an unfinished run"):
        quantize(directory, dst)
    assert quantize(directory, dst, resume=True).read_bytes() == blob_bytes


def test_resume_with_other_weights_is_refused(blob_bytes: bytes, tmp_path: Path) -> None:
    """Their config is the same, so only the checksums of the sources tell."""
    spoilt = {**WEIGHTS, "norm": WEIGHTS["norm"] * np.float32(np.nan)}
    other = random_weights(SMALL, seed=1)
    with pytest.raises(BadCheckpoint):
        quantize(write_hf(tmp_path / "a", SMALL, spoilt), tmp_path / "b")
    with pytest.raises(BadInput, match="tensor tok_embeddings was made of other weights; pass force"):
        quantize(write_hf(tmp_path / "other", SMALL, other), tmp_path / "b", resume=True)
    assert quantize(write_hf(tmp_path / "c", SMALL, WEIGHTS), tmp_path / "b", resume=True).read_bytes() == blob_bytes


KILLED = """
import os, signal, sys
from edgemistral.files.blob_writer import BlobWriter
from edgemistral_quantize import quantize

write_at, left = BlobWriter._write_at, int(sys.argv[3])

def write_and_die(self, offset, data):
    global left
    left -= 1
    if left == 0:
        write_at(self, offset, memoryview(data)[: len(data) // 2])
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    write_at(self, offset, data)

BlobWriter._write_at = write_and_die
quantize(sys.argv[1], sys.argv[2], resume=True, progress=False)
"""


def test_killed_again_and_again(checkpoint: Path, blob_bytes: bytes, tmp_path: Path) -> None:
    """kill -9 in the middle of a write leaves no blob; the runs that resume give the same bytes in the end."""
    dst = tmp_path / "b"
    moments = random.Random(0)
    for attempt in range(50):
        n_writes = 1 if attempt == 0 else moments.randrange(1, 60)
        run = subprocess.run([sys.executable, "-c", KILLED, checkpoint, dst, str(n_writes)], check=False)
        if run.returncode == 0:
            break
        assert not dst.exists()
    assert attempt >= 3
    assert dst.read_bytes() == blob_bytes
    assert list(tmp_path.iterdir()) == [dst]


def test_memory_is_bounded(tmp_path: Path) -> None:
    """No tensor is ever whole in memory: the embeddings alone are 25 MB."""
    config = small_config(vocab_size=64_000, n_layers=1)
    directory, max_ram = write_hf(tmp_path / "c", config, random_weights(config)), 16 << 20
    quantize(directory, tmp_path / "warm")
    tracemalloc.start()
    try:
        quantize(directory, tmp_path / "b", max_ram=max_ram)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < max_ram
