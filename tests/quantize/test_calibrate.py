"""Calibration: the same model before rounding, the same bytes however it is computed, and a smaller loss."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from edgemistral_quantize import calibration_text, convert, equalise, exponents, quantize
from edgemistral_quantize.calibrate import CalibrationPass, Inputs, tiled
from edgemistral_quantize.checkpoint import Checkpoint
from edgemistral_quantize.groups import quantize_rows
from edgemistral_quantize.sensitivity import spend
from hypothesis import given, settings
from hypothesis import strategies as st

import edgemistral
from edgemistral.cli.inspect import describe
from edgemistral.errors import BadCheckpoint, BadInput
from edgemistral.files import layout
from edgemistral.files.blob import Blob
from tests import naive
from tests.checkpoints import SMALL, random_weights, write_hf

WEIGHTS = random_weights(SMALL)
F32 = np.float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("checkpoint"), SMALL, WEIGHTS)


@pytest.fixture(autouse=True)
def _any_text_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "ENOUGH", 1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The river ran past the mill, and the wheel turned slowly. " * 60, "utf-8")
    return path


# ---- the text ----

class Words:
    bos_id, chats = 1, True

    def encode(self, text: str) -> list[int]:
        return [5] * len(text.split())

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [1, *(6 for message in messages for _ in message["content"].split())]


def test_windows_begin_with_bos_and_fit_the_context() -> None:
    for context in (32, 4096):
        calibration = calibration_text.read_calibration("fast", None, Words(), context)
        assert calibration is not None and len(calibration.windows) == 8
        assert all(window[0] == 1 and len(window) <= min(512, context) for window in calibration.windows)
        assert any((window == 6).any() for window in calibration.windows)   # conversations, by the template


def test_conversations_of_the_package_alternate() -> None:
    found = list(calibration_text.conversations((calibration_text.FOLDER / "chat.txt").read_text("utf-8")))
    assert len(found) > 10
    for messages in found:
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "empty"), (b" \n", "empty"), (b"caf\xe9 au lait", "not UTF-8 text: byte 3"), (None, "No such file"),
])
def test_bad_texts_are_refused(checkpoint: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        quantize(checkpoint, tmp_path / "b", calibration_text=path)
    assert not (tmp_path / "b.partial").exists()


def test_bad_methods_are_refused(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="calibrate is 'best'"):
        quantize(checkpoint, tmp_path / "b", calibrate="best")
    with pytest.raises(BadInput, match="nothing would read it"):
        quantize(checkpoint, tmp_path / "b", calibrate="none", calibration_text=text)


# ---- equalisation ----

def test_equalisation_changes_no_answer() -> None:
    """Before rounding, the changed model computes what the model computes."""
    c, rng = SMALL, np.random.default_rng(0)
    weights = dict(WEIGHTS)
    ids = rng.integers(3, c.vocab_size, 40)
    for layer in range(c.n_layers):
        at = f"layers.{layer}."
        sizes = {"wqkv": c.dim, "wo": c.q_dim, "w13": c.dim, "w2": c.hidden_dim}
        alpha = {"wqkv": 0.3, "wo": 0.4, "w13": 0.1, "w2": 0.7} if layer % 2 else None
        changes = equalise.layer_changes(c, {name: rng.exponential(size=n) ** 4 for name, n in sizes.items()}, 1000, alpha)
        whole = {
            "wqkv": np.concatenate([weights[at + name] for name in ("wq", "wk", "wv")]), "wo": weights[at + "wo"],
            "w13": layout.interleave_gate_up(weights[at + "w1"], weights[at + "w3"]), "w2": weights[at + "w2"],
        }
        changed = {name: changes.matrices[name].apply(w, 0) for name, w in whole.items()}
        parts = np.split(changed["wqkv"], [c.q_dim, c.q_dim + c.kv_dim])
        weights |= {at + name: w for name, w in zip(("wq", "wk", "wv"), parts, strict=True)}
        pairs = changed["w13"].reshape(-1, 2, layout.PANEL, c.dim)
        weights |= {at + "w1": pairs[:, 0].reshape(-1, c.dim), at + "w3": pairs[:, 1].reshape(-1, c.dim)}
        weights |= {at + "wo": changed["wo"], at + "w2": changed["w2"]}
        for norm, factors in changes.norms.items():
            weights[at + norm] = weights[at + norm] * factors
    before, after = naive.forward(WEIGHTS, c, ids), naive.forward(weights, c, ids)
    np.testing.assert_allclose(after, before, atol=2e-3 * np.abs(before).max())


def test_a_head_in_8_bits_is_not_equalised() -> None:
    """It gets its inputs with twice as many digits."""
    measured = np.random.default_rng(0).exponential(size=64) ** 4
    for bits, columns_change in ((8, False), (4, True)):
        changes = equalise.output_changes(measured, bits, 1e9)
        columns = changes.matrices["output"].columns
        assert columns is not None
        assert (columns != 1).any() == (changes.norms["norm"] != 1).any() == columns_change


def test_the_estimated_error_is_that_of_rounding() -> None:
    """Round inputs and weights as the kernels do, and compare the outputs."""
    rng, cols = np.random.default_rng(1), 200      # no multiple of a block
    w, x = rng.normal(size=(300, cols)).astype(F32), rng.normal(size=(400, cols)).astype(F32)
    x *= rng.exponential(size=cols).astype(F32)
    s = rng.uniform(0.5, 2, cols)

    def rounded(values: np.ndarray, size: int) -> np.ndarray:
        parts = [values[:, at : at + size] for at in range(0, cols, size)]
        steps = [np.abs(part).max(axis=1, keepdims=True) / 127 for part in parts]
        return np.concatenate([np.rint(part / step) * step for part, step in zip(parts, steps, strict=True)], axis=1)

    measured = np.square(x @ w.T - rounded(x / s, 128) @ rounded(w * s, 32).T).sum(axis=1).mean()
    estimated = exponents.error(w, x, np.square(x, dtype=np.float64).mean(axis=0), s) / (12 * 127**2)
    assert estimated == pytest.approx(measured, rel=0.05)


def _inputs(of_kinds: list[np.ndarray], rows: np.ndarray) -> Inputs:
    """A layer of one matrix, with one window (tokens, cols) of each kind."""
    squares = [np.square(x, dtype=np.float64).mean(axis=0) for x in of_kinds]
    return Inputs({"w2": np.mean(squares, axis=0)}, {"w2": squares}, {"w2": of_kinds}, {"w2": rows})


def test_equalised_are_outliers_that_all_kinds_of_text_share() -> None:
    rng, cols = np.random.default_rng(2), 256
    rows = rng.normal(size=(64, cols)).astype(F32)
    plain = [rng.normal(size=(100, cols)).astype(F32) for _ in range(4)]
    shared = np.where(np.arange(cols) % 64 == 5, 20, 1).astype(F32)
    own = [np.where(np.arange(cols) % 64 == 5 + kind, 20, 1).astype(F32) for kind in range(4)]
    for factors, least, most in (([shared] * 4, 0.4, 1.0), (own, 0.0, 0.0)):
        inputs = _inputs([x * f for x, f in zip(plain, factors, strict=True)], rows)
        assert least <= exponents.choose(SMALL, inputs, [0, 1, 2, 3])["w2"] <= most
    assert exponents.choose(SMALL, _inputs([plain[0] * shared], rows), [0])["w2"] >= 0.4      # one kind: judged by itself
    assert exponents.choose(SMALL, _inputs([np.zeros_like(x) for x in plain], rows), [0, 1, 2, 3])["w2"] == 0


def test_factors_of_nothing_are_ones() -> None:
    np.testing.assert_array_equal(equalise.factors(np.zeros(8), 0.5), np.ones(8))
    found = equalise.factors(np.array([0.0, 1e-30, 1.0, 1e30]), 0.5)
    assert np.isfinite(found).all() and (found > 0).all()


# ---- statistics ----

def test_statistics_are_those_of_the_float_model(checkpoint: Path) -> None:
    windows = [np.arange(3, 40, dtype=np.int32), np.arange(50, 70, dtype=np.int32)]
    run = CalibrationPass(Checkpoint(checkpoint), windows, 1, 1 << 16, lambda n: None, threads=2)
    try:
        met = run.pass_layer(0).mean_squares
    finally:
        run.close()
    x = np.concatenate([WEIGHTS["tok_embeddings"][ids] for ids in windows])
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + SMALL.norm_eps) * WEIGHTS["layers.0.attention_norm"]
    np.testing.assert_allclose(met["wqkv"], (x.astype(np.float64) ** 2).mean(axis=0), rtol=1e-4)
    assert {name: values.shape for name, values in met.items()} == {
        "wqkv": (SMALL.dim,), "wo": (SMALL.q_dim,), "w13": (SMALL.dim,), "w2": (SMALL.hidden_dim,),
    }


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=5))
def test_tiles_have_the_same_rows_however_they_come(sizes: list[int]) -> None:
    rows = np.arange(sum(sizes), dtype=F32)[:, None]
    tiles = list(tiled(np.split(rows, np.cumsum(sizes)[:-1])))
    np.testing.assert_array_equal(np.concatenate(tiles), rows)
    assert all(len(tile) == 256 for tile in tiles[:-1])


# ---- the same bytes ----

@pytest.mark.parametrize(("method", "bits"), [("fast", 4), ("full", 4), ("fast", 8), ("full", 8)])
def test_strips_and_windows_at_once_make_no_difference(
    checkpoint: Path, text: Path, tmp_path: Path, method: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(checkpoint, tmp_path / "a", bits=bits, calibrate=method, calibration_text=text).read_bytes()
    monkeypatch.setattr(convert, "STRIP_BYTES", 1)
    monkeypatch.setattr(convert, "WINDOWS_AT_ONCE", 1)
    assert quantize(checkpoint, tmp_path / "b", bits=bits, calibrate=method, calibration_text=text).read_bytes() == whole


@pytest.mark.parametrize(("method", "bits"), [("fast", 4), ("full", 4), ("fast", 8), ("full", 8)])
def test_threads_make_no_difference(checkpoint: Path, text: Path, tmp_path: Path, method: str, bits: int) -> None:
    code = ("import os, sys; os.cpu_count = lambda: int(sys.argv[4])\n"
            "from edgemistral_quantize import convert, quantize\n"
            "convert.ENOUGH = 1\n"
            "quantize(sys.argv[1], sys.argv[2], int(sys.argv[6]), calibrate=sys.argv[3], calibration_text=sys.argv[5],\n"
            "         progress=False)")
    for threads in ("1", "3"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads}
        arguments = [checkpoint, tmp_path / threads, method, threads, text, bits]
        subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, env=environment)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


@pytest.mark.parametrize("method", ["fast", "full"])
def test_resumed_after_an_error_in_the_second_layer(checkpoint: Path, text: Path, tmp_path: Path, method: str) -> None:
    whole = quantize(checkpoint, tmp_path / "whole", calibrate=method, calibration_text=text).read_bytes()
    conversion, done = convert._Conversion.write_matrix, []

    def fail(self: object, matrix: layout.Matrix, *rest: object) -> None:
        if matrix.name == "layers.1.w13":
            raise KeyboardInterrupt
        done.append(matrix.name)
        conversion(self, matrix, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert._Conversion, "write_matrix", fail)
        quantize(checkpoint, tmp_path / "b", calibrate=method, calibration_text=text)
    assert done[-1] == "layers.1.wo"
    with pytest.raises(BadInput, match="begun with another calibration"):
        quantize(checkpoint, tmp_path / "b", calibrate="none", resume=True)
    path = quantize(checkpoint, tmp_path / "b", calibrate=method, calibration_text=text, resume=True)
    assert path.read_bytes() == whole


def test_the_blob_tells_how_it_was_made(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with Blob.open(quantize(checkpoint, tmp_path / "fast", calibration_text=text)) as blob:
        found = json.loads(blob.metadata["calibration"])
        blob.verify()
    assert found["method"] == "fast" and len(found["text_sha256"]) == 64 and found["tokens"] > 100
    with Blob.open(quantize(checkpoint, tmp_path / "none", calibrate="none")) as blob:
        assert "calibration" not in blob.metadata


def test_a_text_of_few_different_tokens_calibrates_nothing(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    told: list[str] = []
    blob = quantize(checkpoint, tmp_path / "a", calibration_text=text, notice=told.append)
    assert blob.read_bytes() == quantize(checkpoint, tmp_path / "b", calibrate="none").read_bytes()
    assert len(told) == 1 and "different tokens" in told[0]
    with Blob.open(quantize(checkpoint, tmp_path / "c", bits=4.6, calibration_text=text, notice=told.append)) as mixed:
        assert "calibration" not in mixed.metadata and mixed.recipe.eight and len(told) == 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["fast", "full"])
def test_too_little_memory_is_refused(checkpoint: Path, tmp_path: Path, bits: int, method: str) -> None:
    """One line says how much is enough; with exactly that, a note says that some of the text is not read."""
    with pytest.raises(BadInput, match="max_ram is 1000000 bytes; to calibrate this checkpoint needs") as error:
        quantize(checkpoint, tmp_path / "b", bits=bits, max_ram=1_000_000, calibrate=method)
    least, told = int(str(error.value).split()[-1]), list[str]()
    with pytest.raises(BadInput):
        quantize(checkpoint, tmp_path / "b", bits=bits, max_ram=least - 1, calibrate=method)
    quantize(checkpoint, tmp_path / "b", bits=bits, max_ram=least, calibrate=method, notice=told.append, progress=False)
    assert len(told) == 1 and f"max_ram is {least} bytes, room for 1 of the " in told[0]
    enough = int(told[0].split(". ")[-1].split()[0])
    quantize(checkpoint, tmp_path / "c", bits=bits, max_ram=enough, calibrate=method, notice=told.append, progress=False)
    assert len(told) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_that_overflow_are_refused(tmp_path: Path, text: Path, bits: int) -> None:
    source = write_hf(tmp_path / "c", SMALL, WEIGHTS | {"layers.1.ffn_norm": WEIGHTS["layers.1.ffn_norm"] * F32(1e19)})
    with pytest.raises(BadCheckpoint, match=r"layers\.1: .* w13 .* too large"):
        quantize(source, tmp_path / "b", bits=bits, calibration_text=text, progress=False)


# ---- some matrices in 8 bits ----

def test_the_budget_is_spent_where_it_gains_most() -> None:
    names = [m.name for layer in range(SMALL.n_layers) for m in layout.layer_matrices(SMALL, layer, layout.Recipe(4))]
    sensitivity = {name: float(n) for n, name in enumerate(names)}
    few, many = (spend(SMALL, sensitivity, bits, 8) for bits in (4.6, 7.5))
    assert 0 < len(few.eight) < len(many.eight) < len(names)
    assert list(few.eight) == sorted(few.eight, key=names.index)
    for recipe, bits in ((few, 4.6), (many, 7.5)):
        matrices = [m for layer in range(SMALL.n_layers) for m in layout.layer_matrices(SMALL, layer, recipe)]
        n_bytes = sum(int(np.prod(m.shape)) for m in matrices)
        weights = sum(m.panels * layout.PANEL * m.blocks * layout.BLOCK for m in matrices)
        assert 8 * n_bytes / weights <= bits


def test_sensitive_matrices_take_8_bits(tmp_path: Path, text: Path) -> None:
    """One matrix whose weights no 4 bits serve: a huge one in each group."""
    weights = dict(WEIGHTS)
    spoiled = weights["layers.1.wo"].copy()
    spoiled[:, ::32] *= 40
    directory = write_hf(tmp_path / "c", SMALL, weights | {"layers.1.wo": spoiled})
    path = quantize(directory, tmp_path / "b", bits=5.2, calibration_text=text, progress=False)
    with Blob.open(path) as blob:
        blob.verify()
        assert "layers.1.wo" in blob.recipe.eight
        found = describe(blob)
        assert found["recipe"]["eight"] == list(blob.recipe.eight)
        exact = naive.forward(weights | {"layers.1.wo": spoiled}, SMALL, np.arange(3, 60))
        mixed = naive.mean_kl(exact, naive.forward_of_blob(blob, np.arange(3, 60)))
    plain = quantize(directory, tmp_path / "p", bits=4, calibration_text=text, progress=False)
    with Blob.open(plain) as blob:
        assert mixed < naive.mean_kl(exact, naive.forward_of_blob(blob, np.arange(3, 60)))
    with edgemistral.load(path, threads=1) as model:
        assert naive.mean_kl(exact, model.logits(np.arange(3, 60))) < 2 * mixed + 1e-4


@pytest.mark.parametrize("bits", [3, 4.2, 8.25, float("nan"), "4.5"])
def test_other_averages_are_refused(checkpoint: Path, tmp_path: Path, bits: object) -> None:
    with pytest.raises(BadInput, match=r"bits is .*; supported: 4, 8, and averages"):
        quantize(checkpoint, tmp_path / "b", bits=bits)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="takes a calibration"):
        quantize(checkpoint, tmp_path / "b", bits=4.5, calibrate="none")


@pytest.mark.parametrize(("bits", "output_bits"), [(4, 8), (8, 4)])
def test_every_matrix_is_rounded_by_gptq(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, output_bits: int
) -> None:
    plain = quantize_rows

    def only_padding(w: np.ndarray, *rest: object) -> tuple[np.ndarray, np.ndarray]:
        assert not w.any()
        return plain(w, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "quantize_rows", only_padding)
    with Blob.open(quantize(checkpoint, tmp_path / "b", bits=bits, output_bits=output_bits, calibration_text=text)) as blob:
        blob.verify()


def test_small_contexts_and_texts(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, context=1)
    directory = write_hf(tmp_path / "c", config, WEIGHTS)
    (tmp_path / "text").write_text("one", "utf-8")
    for options in ({}, {"calibration_text": tmp_path / "text"}):
        quantize(directory, tmp_path / "b", force=True, **options)
