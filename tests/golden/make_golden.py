"""Make the golden logits with the reference implementation: Hugging Face transformers' MistralForCausalLM in float32.

    pip install -e ".[oracle]"
    python tests/golden/make_golden.py

Needed only when `models.py` changes; the tests read the committed files and need neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers

from tests.checkpoints import hf_fields, hf_name
from tests.golden.models import MODELS, TOKENIZER, GoldenModel


def golden_logits(model: GoldenModel) -> np.ndarray:
    """float32 (n_ids, vocab_size)."""
    config = transformers.MistralConfig(**hf_fields(model.config), attn_implementation="eager")
    # Versions of transformers disagree on where it belongs; ignored, it would be 10000.
    assert (getattr(config, "rope_parameters", None) or config.to_dict())["rope_theta"] == model.config.rope_theta
    oracle = transformers.MistralForCausalLM(config).float().eval()
    state = {hf_name(name): torch.from_numpy(values) for name, values in model.weights.items()}
    oracle.load_state_dict(state, strict=True)
    with torch.no_grad():
        return oracle(torch.from_numpy(model.ids.astype(np.int64))[None]).logits[0].numpy()


def train_tokenizer() -> None:
    """A tokenizer.model of 400 pieces: a checkpoint must have one, no golden test uses its text."""
    text = Path(__file__).with_name("models.py").read_text(encoding="utf-8").splitlines()
    with TOKENIZER.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, model_type="bpe", vocab_size=400, byte_fallback=True,
            normalization_rule_name="identity", split_digits=True, num_threads=1, minloglevel=2,
        )   # fmt: skip


def main() -> None:
    if not TOKENIZER.exists():
        train_tokenizer()
    for model in MODELS:
        logits = golden_logits(model)
        np.savez_compressed(model.path, logits=logits, sha256=model.sha256)
        print(f"{model.path.name}: logits {logits.shape}, std {logits.std():.3f}, {model.path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
