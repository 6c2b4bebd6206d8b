"""What keys and values of few bits cost the demo model, on the figures of the benchmark."""

from __future__ import annotations

from pathlib import Path

from edgemistral_quantize import quantize
from edgemistral_quantize.checkpoint import Checkpoint

import edgemistral
from bench.kv_accuracy import distances, texts
from edgemistral.demo import checkpoint_dir

LIMITS = {8: (0.001, 0.0006), 4: (0.004, 0.003)}    # growth of perplexity, KL from 16 bits in nats


def test_few_bits_cost_little(tmp_path: Path) -> None:
    blob = quantize(checkpoint_dir(), tmp_path / "blob", bits=8, progress=False)
    windows, exact, found = texts(Checkpoint(checkpoint_dir()), 8), [], {}
    for bits in (16, 8, 4):
        with edgemistral.load(blob, kv_bits=bits, threads=1) as model:
            found[bits] = distances(windows, model.logits, exact)
    assert found[16]["mean_kl"] == 0 and found[16]["top1_agreement"] == 1
    for bits, (growth, kl) in LIMITS.items():
        assert found[bits]["perplexity"] <= (1 + growth) * found[16]["perplexity"], found
        assert found[bits]["mean_kl"] <= kl, found
