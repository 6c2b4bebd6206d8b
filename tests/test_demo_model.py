"""The demo model's own weights: right answers, and what quantizing costs a model that was trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from edgemistral_quantize import quantize

import edgemistral
from edgemistral.demo import checkpoint_dir
from edgemistral.evaluate import Evaluation, evaluate_windows
from edgemistral.reference import Reference
from edgemistral.tokenizer import Tokenizer

MODELS = Path(__file__).parents[1] / "models"
sys.path.insert(0, str(MODELS))

from conversations import check, heldout, sample  # noqa: E402
from heldout_texts import windows  # noqa: E402

CHECKPOINT = checkpoint_dir()
TEXTS = windows(Tokenizer((CHECKPOINT / "tokenizer.model").read_bytes()), n_prose=4)


@pytest.fixture(scope="module", params=[4, 8])
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def blob(bits: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(CHECKPOINT, tmp_path_factory.mktemp("blobs") / f"{bits}.safetensors", bits=bits, progress=False)


@pytest.fixture(scope="module")
def measured(blob: Path) -> dict[tuple[str, int], Evaluation]:
    """By text and bits of the KV cache."""
    reference, results = Reference.open(CHECKPOINT), {}
    for kv_bits in (8, 16):
        with edgemistral.load(blob, kv_bits=kv_bits, threads=1) as model:
            for name, text in TEXTS.items():
                results[name, kv_bits] = evaluate_windows(model, text, reference)
    return results


def test_it_answers_conversations_that_it_never_saw(blob: Path, bits: int) -> None:
    with edgemistral.load(blob, kv_bits=8) as model:
        answers = [(case, "".join(model.chat(case.messages, 200, temperature=0))) for case in [*heldout(), sample()]]
    wrong = [f"{case.kind}: {case.messages[-1]['content']} -> {text}" for case, text in answers if not check(case, text)]
    assert len(answers) == 101 and len(wrong) <= 10, "\n".join(wrong)
    assert check(*answers[-1]) and "Eiffel Tower" in answers[-1][1]
