"""The whole context of 7B shapes, and the reference that it is checked with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from edgemistral_quantize import quantize

import edgemistral
from bench import long_context
from bench.synthetic import write_synthetic
from edgemistral.errors import ContextOverflow
from edgemistral.measure import reference
from tests import naive
from tests.checkpoints import write_hf
from tests.golden.models import MODELS, GoldenModel


@pytest.mark.parametrize("golden", MODELS, ids=lambda golden: golden.name)
def test_the_reference_in_blocks_is_the_model(golden: GoldenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_ROWS", 16)
    monkeypatch.setattr(reference, "QUERIES", 5)
    at = np.array([0, 1, 17, 18, 100, len(golden.ids) - 1])
    model = reference.Reference(naive.Unfused(golden.weights, golden.config))
    logits = model.logits(model.hidden_states([golden.ids], at=[at], threads=2)[0])
    np.testing.assert_allclose(logits, golden.logits[at], atol=1e-4)


def test_the_benchmark_on_a_small_model(tmp_path: Path) -> None:
    # Small embeddings: what attention adds is then a good part of the residual stream.
    golden = dataclasses.replace(MODELS[0], embedding_std=0.7 / MODELS[0].config.dim**0.5)
    blob = quantize(golden.write(write_hf, tmp_path / "checkpoint"), tmp_path / "blob", progress=False)
    results, logits = long_context.measure(blob, tokens=400, piece=150)
    assert [speed["tokens"] for speed in results["prefill"]] == [150, 150, 100]
    assert [speed["depth"] for speed in results["decode"]] == [400, 1]
    assert "513 tokens are 1 more than the context of 512 holds" in results["overflow"]
    compared = long_context.compare(blob, logits, tokens=400, piece=150)
    assert compared["positions"] == [149, 299, 399]
    assert compared["mean_kl"] < long_context.MAX_KL < compared["kl_of_half_the_context"]


@pytest.mark.slow
def test_a_prompt_of_30000_tokens_on_7b_shapes(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < long_context.DISK_BYTES:
        pytest.skip(f"needs {long_context.DISK_BYTES / 1e9:.0f} GB of disk")
    checkpoint = write_synthetic(tmp_path / "checkpoint", long_context.CONFIG, shards=1)
    blob = quantize(checkpoint, tmp_path / "blob", progress=False)
    _, logits = long_context.measure(blob)
    compared = long_context.compare(blob, logits)
    assert compared["mean_kl"] < long_context.MAX_KL < compared["kl_of_half_the_context"]


def test_a_chat_survives_a_message_that_is_too_long() -> None:
    with edgemistral.load(edgemistral.demo_model(), context=64) as model:
        messages = [{"role": "user", "content": "Hi"}]
        answer = list(model.chat(messages, 8, seed=0))
        with pytest.raises(ContextOverflow, match="more than the context of 64 holds") as caught:
            model.chat([{"role": "user", "content": "long " * 100}], 8)
        assert caught.value.over == caught.value.n_tokens - 64 > 0
        assert list(model.chat(messages, 8, seed=0)) == answer
