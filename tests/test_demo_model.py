"""The demo model's own weights: right answers, and what quantizing costs a model that was trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
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

PROSE = Path(__file__).parent / "data" / "prose.txt"
CHECKPOINT = checkpoint_dir()
TOKENIZER = Tokenizer((CHECKPOINT / "tokenizer.model").read_bytes())
WINDOW, N_WINDOWS = 512, 4


def prose() -> list[np.ndarray]:
    ids = TOKENIZER.encode(PROSE.read_text("utf-8"))[: WINDOW * N_WINDOWS]
    return [np.array([TOKENIZER.bos_id, *ids[at : at + WINDOW]], np.int32) for at in range(0, len(ids), WINDOW)]


def talk() -> list[np.ndarray]:
    return [
        np.array([*TOKENIZER.encode_chat(case.messages), *TOKENIZER.encode(case.answer), TOKENIZER.eos_id], np.int32)
        for case in heldout()
    ]


TEXTS = {"prose": prose, "talk": talk}


class Float32:
    """The checkpoint itself as a model."""

    def __init__(self, reference: Reference) -> None:
        self.config, self.context, self._reference = reference.config, reference.config.context, reference

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self._reference.logits(self._reference.hidden_states([ids])[0])


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
                results[name, kv_bits] = evaluate_windows(model, text(), reference)
    return results


def test_it_answers_conversations_that_it_never_saw(blob: Path, bits: int) -> None:
    with edgemistral.load(blob, kv_bits=8) as model:
        answers = [(case, "".join(model.chat(case.messages, 200, temperature=0))) for case in [*heldout(), sample()]]
    wrong = [f"{case.kind}: {case.messages[-1]['content']} -> {text}" for case, text in answers if not check(case, text)]
    assert len(answers) == 101 and len(wrong) <= 10, "\n".join(wrong)
    assert check(*answers[-1]) and "Eiffel Tower" in answers[-1][1]


def test_its_losses_are_recorded() -> None:
    losses = json.loads((CHECKPOINT / "losses.json").read_text("utf-8"))
    reference = Float32(Reference.open(CHECKPOINT))
    for name, recorded in (("prose", losses[-1]["prose"]), ("talk", losses[-1]["chat"])):
        assert recorded < losses[0]["prose" if name == "prose" else "chat"]
        assert np.isfinite(evaluate_windows(reference, TEXTS[name]()).nll)
