"""The demo model's own weights: right answers, and what quantizing costs a model that was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgemistral_quantize import quantize

import edgemistral
from edgemistral.demo import checkpoint_dir
from edgemistral.measure.evaluate import evaluate_windows
from edgemistral.measure.reference import Reference, ReferenceModel
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from training import exam
from training.conversations import Case, check, heldout, sample
from training.heldout_texts import texts

CHECKPOINT = checkpoint_dir()
TEXTS = texts(SentencePieceTokenizer((CHECKPOINT / "tokenizer.model").read_bytes()), n_prose=4)


@pytest.fixture(scope="module", params=[4, pytest.param(8, marks=pytest.mark.slow)])
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def blob(bits: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dst = tmp_path_factory.mktemp("blobs") / f"{bits}.safetensors"
    return quantize(CHECKPOINT, dst, bits=bits, calibrate="none", progress=False)      # as demo_model makes it


@pytest.fixture(scope="module")
def answers(blob: Path) -> list[tuple[Case, str]]:
    return exam.answers(blob, [*heldout(), sample()])


def test_the_model_cards_sample_is_answered(answers: list[tuple[Case, str]]) -> None:
    case, answer = answers[-1]
    assert check(case, answer) and "Eiffel Tower" in answer


def test_it_answers_conversations_that_it_never_saw(answers: list[tuple[Case, str]]) -> None:
    wrong = [f"{case.kind}: {case.messages[-1]['content']} -> {text}" for case, text in answers[:-1] if not check(case, text)]
    assert len(answers) == 101 and len(wrong) <= 10, "\n".join(wrong)


LIMITS = {   # by bits of the weights and text: perplexity over float32's, KL in nats, top-1 agreement
    (8, "prose"): (1.005, 0.0005, 0.97), (8, "conversations"): (1.01, 0.0017, 0.97),
    (8, "answers"): (1.005, 0.0005, 0.99), (4, "answers"): (1.02, 0.006, 0.98),
    (4, "prose"): (1.025, 0.014, 0.89), (4, "conversations"): (1.02, 0.05, 0.91),
}


def test_quantizing_costs_little(blob: Path, bits: int) -> None:
    reference = Reference.open(CHECKPOINT)
    for name, text in TEXTS.items():
        perplexity = evaluate_windows(ReferenceModel(reference), text.windows, starts=text.starts).perplexity
        most_perplexity, most_kl, least_top1 = LIMITS[bits, name]
        for kv_bits in (8, 16):
            with edgemistral.load(blob, kv_bits=kv_bits, threads=1) as model:
                result = evaluate_windows(model, text.windows, reference, starts=text.starts)
            assert result.perplexity <= most_perplexity * perplexity
            assert result.mean_kl <= most_kl and result.top1_agreement >= least_top1, (name, kv_bits, result)


def test_transformers_loads_it_as_it_is() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.MistralForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    ids = TEXTS["prose"].windows[0][:100]
    with torch.no_grad():
        expected = model(torch.from_numpy(ids.astype("int64"))[None]).logits[0].numpy()
    np.testing.assert_allclose(ReferenceModel(Reference.open(CHECKPOINT)).logits(ids), expected, atol=2e-3)
