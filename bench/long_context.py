"""A prompt of 30,000 tokens through two layers of 7B shapes: speed by depth, memory, and a check of the logits.

    python bench/long_context.py WORK              # 4-bit weights
    python bench/long_context.py WORK --bits 8
    python bench/long_context.py WORK --n-layers 4     # speed only, 32,000 tokens, 8- and 4-bit KV, beside llama.cpp
    python bench/long_context.py WORK --n-layers 32    # the same with the blob of seven_b.py, without llama.cpp

Needs 3 GB of disk in WORK, 6 GB of memory and about six minutes. The logits are compared with float32 arithmetic on the
same dequantized weights. To show that a fault would be seen, the same distance is measured with attention to only the last
half of the prompt.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # before NumPy loads: idle BLAS workers would spin beside the model

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from bench import by_depth, harness
from bench.synthetic import V2, synthetic_blob, write_synthetic
from edgemistral.config import ModelConfig
from edgemistral.errors import ContextOverflow
from edgemistral.files.blob import Blob
from edgemistral.generate.engine import Engine
from edgemistral.generate.sampler import SamplingParams
from edgemistral.measure.benchmark import Roofline, bytes_of_a_token, products, seconds
from edgemistral.measure.reference import BlobWeights, Reference
from edgemistral.runtime.segments import segment_bytes, segments_of
from edgemistral.runtime.threads import performance_cores
from edgemistral.runtime.transformer import Transformer
from tests import naive

CONFIG = dataclasses.replace(V2, n_layers=2)
TOKENS = 30_000
PIECE = 2_000       # tokens between two measurements; not a multiple of a chunk, a segment or a block of the cache
DECODED = 16        # tokens in each round, after a first one that is not counted
ROUNDS = 5
MAX_KL = 0.001      # mean over the sampled positions, in nats
DISK_BYTES = 3 * 10**9


@dataclass(frozen=True)
class Speed:
    """Tokens per second from a depth on, and the share of the machine's limit, measured at the same time."""

    depth: int                 # positions in the cache before
    tokens: int
    tokens_per_second: float
    share: float               # prefill: of the int8 peak; decode: of the read bandwidth
    products: int = 0          # prefill: multiplications


class LongRun:
    """One prompt of random ids on a blob, piece by piece."""

    def __init__(self, blob: Path, tokens: int, piece: int) -> None:
        opened = Blob.open(blob)
        self.transformer = Transformer(opened, threads=performance_cores())
        self.engine, self.ceilings = Engine(self.transformer), Roofline(self.transformer.threads, opened.data)
        self.config, self.piece = opened.config, piece
        self.ids = prompt(self.config, tokens)
        self.engine.prefill([self.config.eos_id])   # loads the kernels; the prompt begins with another token

    def prefill(self) -> tuple[list[Speed], NDArray[np.float32]]:
        """Speeds of the pieces, and the logits (pieces, vocab_size) at the end of each."""
        speeds, logits = [], []
        for depth in tqdm(range(0, len(self.ids), self.piece), desc="prefill", leave=False, disable=None):
            end = min(depth + self.piece, len(self.ids))
            before = self.ceilings.int8_peak()
            took = seconds(lambda end=end: logits.append(self.engine.prefill(self.ids[:end])))
            peak = max(before, self.ceilings.int8_peak())    # short measurements: a disturbed one would give shares over 100 %
            work = products(self.config, end - depth, depth)
            speeds.append(Speed(depth, end - depth, (end - depth) / took, work / took / peak, work))
        return speeds, np.stack(logits)

    def decode(self, depths: Sequence[int]) -> list[Speed]:
        """Medians over some rounds at each depth, each a fork of the prompt."""
        return [self._decode(depth) for depth in tqdm(depths, desc="decode", leave=False, disable=None)]

    def _decode(self, depth: int) -> Speed:
        rates, shares = [], []
        for _ in range(ROUNDS):
            bandwidth = self.ceilings.bandwidth()
            generation = self.engine.generate(self.ids[:depth], SamplingParams(temperature=0.0), DECODED + 1)
            for _token in generation:
                pass
            rates.append(generation.usage.decode_rate)
            shares.append(rates[-1] * bytes_of_a_token(self.transformer, depth) / bandwidth)
        return Speed(depth, DECODED, median(rates), median(shares))

    def overflow(self, last_logits: NDArray[np.float32]) -> str:
        """The error of a prompt one token over the context. The conversation survives it: the last token, computed again
        alone from the cache, gives the same bits as in the prompt."""
        try:
            self.engine.prefill(np.resize(self.ids, self.engine.context + 1))
        except ContextOverflow as error:
            assert error.over == 1
            assert np.array_equal(self.engine.tokens, self.ids)
            assert np.array_equal(self.engine.prefill(self.ids), last_logits)
            return str(error)
        raise AssertionError("a prompt longer than the context was taken")

    def close(self) -> None:
        self.ceilings.close()
        self.engine.close()


def prompt(config: ModelConfig, tokens: int) -> NDArray[np.int32]:
    """<s>, then random ids."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, tokens, np.int32)
    ids[0] = config.bos_id
    return ids


def measure(blob: Path, tokens: int = TOKENS, piece: int = PIECE) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """All figures of a run, and its logits at the end of every piece."""
    with harness.PeakMemory(os.getpid()) as memory:
        run = LongRun(blob, tokens, piece)
        try:
            prefill, logits = run.prefill()
            overflow = run.overflow(logits[-1])
            decode = run.decode([tokens, *(depth for depth in (24_000, 16_000, 8_000, 1) if depth < tokens)])
        finally:
            run.close()
    return {
        "prefill_seconds": sum(speed.tokens / speed.tokens_per_second for speed in prefill),
        "prefill": [asdict(speed) for speed in prefill],
        "decode": [asdict(speed) for speed in decode],
        "kv_file_bytes": segments_of(tokens) * segment_bytes(run.config, run.transformer.kv_bits),
        "peak_anonymous_bytes": memory.bytes,
        "overflow": overflow,
    }, logits


def compare(blob: Path, logits: NDArray[np.float32], tokens: int = TOKENS, piece: int = PIECE) -> dict[str, Any]:
    """The logits against float32 arithmetic on the same dequantized weights."""
    at = np.minimum(np.arange(piece, tokens + piece, piece), tokens) - 1

    def reference(config: ModelConfig) -> NDArray[np.float32]:
        model, ids = Reference(BlobWeights(opened, config)), np.asarray(prompt(config, tokens), np.int32)
        return model.logits(model.hidden_states([ids], at=[at], threads=performance_cores())[0])

    with Blob.open(blob) as opened:
        exact = reference(opened.config)
        blind = reference(dataclasses.replace(opened.config, sliding_window=tokens // 2))
    return {
        "positions": at.tolist(),
        "kl": [naive.mean_kl(a[None], b[None]) for a, b in zip(exact, logits, strict=True)],
        "mean_kl": naive.mean_kl(exact, logits),
        "top1_agreement": naive.top1_agreement(exact, logits),
        "kl_of_half_the_context": naive.mean_kl(exact[-1:], blind[-1:]),
    }


def print_table(results: dict[str, Any]) -> None:
    for task in ("prefill", "decode"):
        limit = "int8 peak" if task == "prefill" else "bandwidth"
        print(f"\n{task:12}{'depth':>8}{'tokens/s':>12}{'of the ' + limit:>22}")
        for speed in results[task]:
            print(f"{'':12}{speed['depth']:8}{speed['tokens_per_second']:12.1f}{speed['share']:22.0%}")
    print(f"\nprefill of {results['tokens']} tokens: {results['prefill_seconds']:.1f} s")
    print(f"KV file {harness.in_gb(results['kv_file_bytes'])}")
    print(f"peak anonymous memory {harness.in_gb(results['peak_anonymous_bytes'])}")
    print(f"one token over the context: {results['overflow']}")
    print(
        f"mean KL {results['mean_kl']:.2e} over {len(results['kl'])} positions, top-1 {results['top1_agreement']:.0%}"
        f" (with half the context: KL {results['kl_of_half_the_context']:.2e})"
    )


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Bits of a weight.")
@click.option("--n-layers", type=int, help="Measure the speed with so many layers instead.")
@click.option("--only", type=click.Choice(["decode", "prompt"]), help="With --n-layers: measure only this.")
def main(work: Path, bits: str, n_layers: int | None, only: str | None) -> None:
    if n_layers is not None:
        blob = synthetic_blob(work, n_layers)
        by_depth.measure(work, blob, (only,) if only else ("decode", "prompt"), beside_llama_cpp=n_layers < V2.n_layers)
        return
    checkpoint = work / "2-layers"
    blob = work / f"2-layers-q{bits}.safetensors"
    harness.prepare(work, DISK_BYTES)
    if not (checkpoint / "tokenizer.model").exists():   # which is written last
        write_synthetic(checkpoint, CONFIG, shards=1, progress=True)
    harness.run([*harness.EDGEMISTRAL, "quantize", str(checkpoint), str(blob), "--bits", bits, "--force"])
    results, logits = measure(blob)
    results |= {"tokens": TOKENS, "bits": int(bits), "config": CONFIG.to_dict(), **compare(blob, logits)}
    print_table(results)
    harness.save(f"long_context-{bits}bit", f"python bench/long_context.py WORK --bits {bits}", results)
    if results["mean_kl"] > MAX_KL:
        sys.exit(f"the logits are wrong: mean KL {results['mean_kl']:.2e} is over {MAX_KL}")


if __name__ == "__main__":
    main()
