"""The speed of a model as a share of this machine's limits.

Decoding one token reads every weight once, so its limit is the memory bandwidth. Reading a prompt multiplies every weight
with every token, so its limit is the rate of int8 products. The speed of machines drifts: each round measures both limits
and the model one after another, and the result is the median over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.files.layout import Recipe, matrices, round_up
from edgemistral.kernels import roofline
from edgemistral.kernels.kv_layout import POSITIONS, block_bytes
from edgemistral.runtime.segments import Row
from edgemistral.runtime.segments import Sequence as KVSequence
from edgemistral.runtime.team import Team, compile_for
from edgemistral.runtime.transformer import Transformer

PEAK_ROUNDS = 10_000_000     # of the int8 peak: some 20 ms
READ_BYTES = 1 << 32        # of the bandwidth: as much as a 4-bit 7B, because a tenth of a second may be a bad moment
DECODED = 16                # tokens in each round


@dataclass(frozen=True)
class Measurement:
    """One row of the table: medians over the rounds, and the extremes of the rate."""

    task: str               # "decode" or "prefill"
    tokens: int             # of the prompt, or decoded one by one
    depth: int              # positions already in the KV cache
    tokens_per_second: float
    lowest: float           # tokens per second of the slowest round
    highest: float
    rate: float             # bytes read per second (decode), multiplications per second (prefill)
    ceiling: float          # the limit of the same rate, measured in the same rounds
    share: float            # median over the rounds of rate / ceiling

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Roofline:
    """The limits of this machine for a number of threads."""

    def __init__(self, threads: int, data: NDArray[np.uint8]) -> None:
        """data: the bytes to read; best the model's mapping, so that both read the same kind of pages."""
        self._team, self._data = Team(threads), data[-READ_BYTES:]
        self._results = [np.zeros(64, np.float32) for _ in range(threads)]
        for read in roofline.READS:
            compile_for(read, (self._data,), self._results[0])
        compile_for(roofline.multiply, (self._data, PEAK_ROUNDS), self._results[0])

    def bandwidth(self) -> float:
        """Bytes read per second, in the quickest way."""
        took = [seconds(partial(self._team.run, read, (self._data,), self._results)) for read in roofline.READS]
        return self._data.nbytes / min(took)

    def int8_peak(self) -> float:
        """Multiplications of bytes per second."""
        took = seconds(lambda: self._team.run(roofline.multiply, (self._data, PEAK_ROUNDS), self._results))
        return PEAK_ROUNDS * roofline.PRODUCTS * self._team.threads / took

    def close(self) -> None:
        self._team.close()


def measure(
    transformer: Transformer,
    prompts: Sequence[int] = (512,),
    depths: Sequence[int] = (0,),
    rounds: int = 5,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Measurement]:
    """Prefill of every size in `prompts` (tokens), then decoding, at each of `depths`; `progress(done, total)` counts steps."""
    blob, config = transformer.blob, transformer.config
    ceilings = Roofline(transformer.threads, blob.data)
    rng = np.random.default_rng(0)
    step, steps = 0, len(depths) * (1 + rounds * (len(prompts) + 1))
    result = []
    try:
        for depth in depths:
            held = KVSequence(transformer.pool)
            append(transformer, held, rng.integers(0, config.vocab_size, depth, dtype=np.int32))
            progress(step := step + 1, steps)
            for tokens in (*prompts, 0):
                samples = []
                for _ in range(rounds):
                    samples.append(_sample(transformer, held, ceilings, rng, tokens))
                    progress(step := step + 1, steps)
                result.append(_summary("prefill" if tokens else "decode", tokens or DECODED, depth, samples))
            held.close()
    finally:
        ceilings.close()
    return result


def _sample(
    transformer: Transformer, held: KVSequence, ceilings: Roofline, rng: np.random.Generator, tokens: int
) -> tuple[float, float, float]:
    """(tokens, rate, ceiling) per second of one round: for a prompt of `tokens`, or for decoding if 0."""
    config, depth = transformer.config, held.length
    ids = rng.integers(0, config.vocab_size, tokens or DECODED, dtype=np.int32)
    if tokens:
        ceiling = ceilings.int8_peak()
        took = seconds(lambda: append(transformer, held, ids))
        work = products(config, tokens, depth)
    else:
        ceiling = ceilings.bandwidth()
        took = seconds(lambda: [transformer.step([Row(held, ids[i : i + 1], 1)]) for i in range(DECODED)])
        work = DECODED * bytes_of_a_token(transformer, depth)
    held.cut(depth)
    return len(ids) / took, work / took, ceiling


def append(transformer: Transformer, sequence: KVSequence, ids: NDArray[np.int32]) -> None:
    """Compute a prompt in chunks, with the logits of its last token."""
    for first in range(0, len(ids), transformer.chunk):
        chunk = ids[first : first + transformer.chunk]
        transformer.step([Row(sequence, chunk, int(first + len(chunk) == len(ids)))])


def _summary(task: str, tokens: int, depth: int, samples: list[tuple[float, float, float]]) -> Measurement:
    speeds, rates, ceilings = zip(*samples, strict=True)
    shares = [rate / ceiling for rate, ceiling in zip(rates, ceilings, strict=True)]
    return Measurement(
        task, tokens, depth, median(speeds), min(speeds), max(speeds), median(rates), median(ceilings), median(shares)
    )


def products(config: ModelConfig, tokens: int, depth: int, whole: bool = False) -> int:
    """Multiplications for a prompt of `tokens`: the matrices, and attention to all positions that each token may see.

    Only the last token goes through the whole last layer, or, if `whole`, every token.
    """
    window, last = config.sliding_window or config.context, f"layers.{config.n_layers - 1}."
    seen = [min(depth + token + 1, window) for token in range(tokens)]
    result = 2 * config.q_dim * ((config.n_layers - 1) * sum(seen) + (sum(seen) if whole else seen[-1]))
    for matrix in matrices(config, Recipe()):
        once = matrix.name == "output" or (matrix.name.startswith(last) and not matrix.name.endswith("wqkv") and not whole)
        result += matrix.rows * matrix.cols * (1 if once else tokens)
    return result


def bytes_of_a_token(transformer: Transformer, depth: int) -> int:
    """Bytes that decoding one token must read: all weights but the embeddings, and the keys and values it may see."""
    tensors, config = transformer.blob.tensors, transformer.config
    weights = sum(spec.n_bytes for name, spec in tensors.items() if name not in ("tok_embeddings", "tokenizer"))
    blocks = round_up(min(depth + 1, config.sliding_window or config.context), POSITIONS) // POSITIONS
    return weights + config.n_layers * config.n_kv_heads * blocks * block_bytes(config.head_dim, transformer.kv_bits)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
