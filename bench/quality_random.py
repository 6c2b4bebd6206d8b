"""How far 8-bit and 4-bit blobs, and llama.cpp's Q4_0, are from the float32 model, on random models.

    python bench/quality_random.py

Prints a table; writes bench/results/quality_random.json and .png. The blobs run as in normal use, with rounded activations and
KV cache; Q4_0 (every matrix, or all but the output head) has the advantage of float32 activations. For trained weights see
quality.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # before NumPy loads: idle BLAS workers would spin beside the model

import click
from edgemistral_quantize import quantize
from edgemistral_quantize.checkpoint import Checkpoint
from numpy.typing import NDArray

import edgemistral
from bench.harness import RESULTS, save
from edgemistral.config import ModelConfig
from edgemistral.files.bf16 import widen
from edgemistral.generate.ids import Ids
from edgemistral.measure.evaluate import Evaluation, evaluate
from edgemistral.measure.reference import Reference, ReferenceModel
from tests.checkpoints import write_hf
from tests.golden.models import GoldenModel
from tests.naive import q4_0

SHAPE = ModelConfig(
    dim=512, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=64, hidden_dim=1792, vocab_size=2000, context=1024,
    norm_eps=1e-5, rope_theta=1e6, sliding_window=None, bos_id=1, eos_id=2,
)
TOKENS = 2048
RANDOM_MODELS = {
    "N(0, 1) embeddings": {},
    "the same, logits spread as in trained models": {"output_std": 4.2},
    "N(0, 0.7 / sqrt(n)) embeddings": {"embedding_std": 0.7 / SHAPE.dim**0.5},
}


@dataclass(frozen=True)
class Rounded:
    """A checkpoint whose matrices went through Q4_0, the output head too or not."""

    checkpoint: Checkpoint
    with_output: bool

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    def strips(self, name: str, strip_bytes: int) -> Iterator[NDArray[Any]]:
        kept = name == "tok_embeddings" or name.endswith("norm") or (name == "output" and not self.with_output)
        for strip in self.checkpoint.strips(name, strip_bytes):
            yield strip if kept else q4_0(widen(strip))


def measure(directory: Path, ids: Ids, folder: Path) -> Iterator[tuple[str, Evaluation]]:
    """(method, result) for the checkpoint in `directory`, best first; blobs go to `folder`."""
    checkpoint = Checkpoint(directory)
    reference = Reference(checkpoint)
    for bits in (8, 4):
        blob = quantize(directory, folder / f"{bits}.safetensors", bits=bits, force=True, progress=False)
        for kv_bits in (16, 8):
            with edgemistral.load(blob, kv_bits=kv_bits) as model:
                yield f"{bits} bits, {kv_bits}-bit KV", evaluate(model, ids, reference)
    for with_output, name in ((False, "Q4_0, output head exact"), (True, "Q4_0")):
        yield name, evaluate(ReferenceModel(Reference(Rounded(checkpoint, with_output))), ids, reference)


def random_models(folder: Path) -> Iterator[tuple[str, Path, Ids]]:
    """(name, checkpoint, token ids)"""
    for seed, (name, stds) in enumerate(RANDOM_MODELS.items(), 100):
        model = GoldenModel(name, seed, TOKENS + 1, SHAPE, **stds)
        yield name, model.write(write_hf, folder / str(seed)), model.ids[1:]


def plot(table: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(table), 1, figsize=(8, 0.8 + 2 * len(table)), sharex=True, squeeze=False)
    for axis, (name, results) in zip(axes[:, 0], table.items(), strict=True):
        kls = [result["mean_kl"] for result in results.values()]
        colors = ["tab:gray" if method.startswith("Q4_0") else "tab:blue" for method in results]
        bars = axis.barh(list(results), kls, color=colors)
        axis.bar_label(bars, [f"{kl:.2g}" for kl in kls], padding=3, fontsize=8)
        axis.set(title=name, xscale="log")
        axis.invert_yaxis()
        axis.margins(x=0.15)
    axes[-1, 0].set_xlabel("mean KL divergence from float32, nats (lower is better)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@click.command(help=__doc__.split("\n")[0])
def main() -> None:
    table: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, directory, ids in random_models(folder):
            print(f"\n{name}\n{'':26}{'mean KL':>12}{'top-1':>9}")
            table[name] = {}
            for method, result in measure(directory, ids, folder):
                print(f"{method:26}{result.mean_kl:12.6f}{result.top1_agreement:9.2%}", flush=True)
                table[name][method] = asdict(result)
    save("quality_random", "python bench/quality_random.py", table, of_machine=False)
    plot(table, RESULTS / "quality_random.png")


if __name__ == "__main__":
    main()
