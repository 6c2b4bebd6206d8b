"""Perplexity and comparison with a reference, on models whose logits are known."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.errors import BadRequest
from edgemistral.measure.evaluate import Evaluation, Tally, cut, evaluate, evaluate_windows, tally
from edgemistral.measure.reference import Reference
from tests import naive
from tests.checkpoints import write_hf
from tests.golden.models import MODELS

GOLDEN = MODELS[0]
TEXT = [int(token) for token in GOLDEN.ids[1:101]]


class Exact:
    """The golden model in float32, its logits optionally distorted."""

    def __init__(self, context: int = 512, noise: float = 0.0) -> None:
        self.config: ModelConfig = GOLDEN.config
        self.context = context
        self.noise = noise
        self.asked: list[list[int]] = []

    def logits(self, ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        self.asked.append([int(token) for token in ids])
        assert len(ids) <= self.context
        logits = naive.forward(GOLDEN.weights, self.config, np.asarray(ids))
        return logits + np.random.default_rng(0).normal(0, self.noise, logits.shape).astype(np.float32)


class Uniform(Exact):
    def logits(self, ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        return np.zeros((len(ids), self.config.vocab_size), np.float32)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference.open(GOLDEN.write(write_hf, tmp_path_factory.mktemp("checkpoint")))


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    result = evaluate(Uniform(), TEXT)
    assert result.perplexity == pytest.approx(GOLDEN.config.vocab_size)
    assert result == Evaluation(result.perplexity, pytest.approx(math.log(515)), 100, None, None)


def test_perplexity_is_that_of_the_next_tokens() -> None:
    log_p = naive.log_softmax(naive.forward(GOLDEN.weights, GOLDEN.config, [1, *TEXT[:-1]]))
    expected = -np.mean([log_p[i, token] for i, token in enumerate(TEXT)])
    assert evaluate(Exact(), TEXT).nll == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("window", "context", "sizes"), [(40, 512, [40, 40, 20]), (512, 64, [64, 36]), (50, 512, [50, 50])]
)
def test_each_window_starts_with_bos_and_fits_the_context(window: int, context: int, sizes: list[int]) -> None:
    model = Exact(context)
    result = evaluate(model, TEXT, window=window)
    assert [len(ids) for ids in model.asked] == sizes
    starts = np.cumsum([0, *sizes])
    assert model.asked == [[1, *TEXT[start : start + size - 1]] for start, size in zip(starts, sizes, strict=False)]
    assert result.n_tokens == len(TEXT)


def test_the_reference_agrees_with_itself(reference: Reference) -> None:
    result = evaluate(Exact(), TEXT, reference, window=30)
    assert result.mean_kl == pytest.approx(0, abs=1e-9)
    assert result.top1_agreement == 1


def test_distance_from_the_reference(reference: Reference) -> None:
    model = Exact(noise=0.1)
    result = evaluate(model, TEXT, reference)
    ids = [1, *TEXT[:-1]]
    exact, got = Exact().logits(ids), model.logits(ids)
    assert result.mean_kl == pytest.approx(naive.mean_kl(exact, got), rel=1e-4)
    assert result.mean_kl == pytest.approx(0.1**2 / 2, rel=0.1)   # of small normal noise: half its variance
    assert result.top1_agreement == naive.top1_agreement(exact, got) < 1


def test_percentiles_and_flipped_tokens(reference: Reference) -> None:
    """The same whether the reference is a checkpoint or another model; and of texts put together."""
    model, ids = Exact(noise=0.1), [1, *TEXT[:-1]]
    result, beside = evaluate(model, TEXT, reference), evaluate(model, TEXT, Exact())
    p, q = (naive.log_softmax(each.logits(ids)).astype(np.float64) for each in (Exact(), model))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    for found in (result, beside):
        assert found.kl_percentiles is not None
        assert {n: pytest.approx(value, rel=1e-3) for n, value in found.kl_percentiles.items()} == {
            "50": np.percentile(kl, 50), "90": np.percentile(kl, 90), "99": np.percentile(kl, 99), "100": kl.max(),
        }
        assert found.flipped == pytest.approx((p.argmax(axis=1) != q.argmax(axis=1)).mean())
    parts = [tally(model, cut(model, part), reference) for part in (TEXT[:30], TEXT[30:])]
    whole = Tally.of(parts).result()
    assert whole.n_tokens == len(TEXT)
    assert whole.nll == pytest.approx(sum(part.result().nll * part.n_tokens for part in parts) / len(TEXT))
    assert whole.kl_percentiles is not None
    assert whole.kl_percentiles["100"] == max(part.kl[0].max() for part in parts)


def test_what_comes_before_a_start_is_only_read(reference: Reference) -> None:
    windows, starts = [np.array([1, *TEXT[:70]], np.int32), np.array([1, *TEXT[70:]], np.int32)], [66, 1]
    model = Exact(noise=0.1)
    result = evaluate_windows(model, windows, reference, starts=starts)
    kl = nll = 0.0
    for ids, start in zip(windows, starts, strict=True):
        exact, got = Exact().logits(ids[:-1])[start - 1 :], model.logits(ids[:-1])[start - 1 :]
        kl += naive.mean_kl(exact, got) * len(got)
        nll -= sum(naive.log_softmax(got)[i, token] for i, token in enumerate(ids[start:]))
    assert result.n_tokens == 5 + 30
    assert result.mean_kl == pytest.approx(kl / 35, rel=1e-4)
    assert result.nll == pytest.approx(nll / 35, rel=1e-4)


def test_progress_reaches_its_total(reference: Reference) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    evaluate(Exact(), TEXT, reference, window=60, progress=lambda *at: seen.setdefault(at[0], []).append(at[1:]))
    assert seen == {"reference": [(i, 6) for i in range(1, 7)], "model": [(1, 2), (2, 2)]}


def test_json_has_no_numpy_types(reference: Reference) -> None:
    assert json.loads(json.dumps(dataclasses.asdict(evaluate(Exact(), TEXT[:20], reference))))["n_tokens"] == 20


@pytest.mark.parametrize("window", [0, -1, 2.0, True, None])
def test_bad_window(window: object) -> None:
    with pytest.raises(BadRequest, match="window is") as caught:
        evaluate(Exact(), TEXT, window=window)  # type: ignore[arg-type]
    assert caught.value.field == "window"


@pytest.mark.parametrize("ids", [[], [515], [-1], [0.5]])
def test_bad_ids(ids: list[int]) -> None:
    with pytest.raises(BadRequest):
        evaluate(Exact(), ids)


def test_reference_of_another_model(tmp_path: Path) -> None:
    other = Reference.open(MODELS[2].write(write_hf, tmp_path))
    with pytest.raises(BadRequest, match="the reference is of another model: its dim is 256, the blob's 192"):
        evaluate(Exact(), TEXT, other)
