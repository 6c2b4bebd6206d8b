"""What keys and values of few bits cost a trained model, ours beside llama.cpp's: each against the same program's 16 bits.

    python bench/kv_bits.py                    # the demo model
    python bench/kv_bits.py CHECKPOINT         # any in Hugging Face or Mistral layout

The text is prose that the demo model never saw (tests/data/prose.txt). Weights are those of an 8-bit blob, and float32 in
llama.cpp, so the 16-bit runs differ; the distances from them hardly depend on that. Prints a table; writes kv_bits.json.
Needs the `bench` extra.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # before NumPy loads: idle BLAS workers would spin beside the model

import math
import tempfile
from collections.abc import Iterator
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
from edgemistral.kernels.kv_layout import block_bytes
from edgemistral.measure.evaluate import WINDOW, log_softmax
from training.heldout_texts import PROSE

PEERS = ("F16", "Q8_0", "Q4_0")
PEER_BITS = {"F16": 16, "Q8_0": 8.5, "Q4_0": 4.5}
Row = dict[str, Any]


def windows(checkpoint: Checkpoint, most: int) -> list[NDArray[np.int32]]:
    """The text, cut: each window begins with <s>."""
    tokenizer = checkpoint.tokenizer_of_text
    ids = tokenizer.encode(PROSE.read_text("utf-8"))
    size = min(WINDOW, checkpoint.config.context - 1)
    starts = range(0, len(ids), size)
    return [np.array([tokenizer.bos_id, *ids[at : at + size]], np.int32) for at in starts][:most]


def models(checkpoint: Checkpoint, directory: Path, folder: Path) -> Iterator[tuple[str, str, float, Any]]:
    """(program, KV, bits per key or value, model); of each program the 16-bit one first."""
    path = quantize(directory, folder / "8.safetensors", bits=8, progress=False)
    head_dim = checkpoint.config.head_dim
    for bits in (16, 8, 4):
        with edgemistral.load(path, kv_bits=bits, threads=1) as model:
            yield "edgemistral", f"{bits} bits", 8 * block_bytes(head_dim, bits) / block_bytes(head_dim, 16) * 2, model
    from bench import llama_cpp_models  # needs the `bench` extra; a test needs what is above

    source = folder / "f32.gguf"
    llama_cpp_models.write_float32(source, checkpoint)
    for kind in PEERS:
        peer = llama_cpp_models.LlamaCpp(source, checkpoint.config, kv=kind)
        yield "llama.cpp", kind, PEER_BITS[kind], peer
        peer.close()


def distances(texts: list[NDArray[np.int32]], model: Any, exact: list[NDArray[np.float64]]) -> Row:
    """Perplexity, and mean KL and top-1 agreement with `exact`, which is filled when it is empty."""
    nll = kl = agreed = 0.0
    first = not exact
    for n, ids in enumerate(texts):
        q = log_softmax(model.logits(ids[:-1]))
        if first:
            exact.append(q)
        p = exact[n]
        nll -= float(np.take_along_axis(q, ids[1:, None], axis=1).sum())
        kl += float((np.exp(p) * (p - q)).sum())
        agreed += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    tokens = sum(len(ids) - 1 for ids in texts)
    return {"perplexity": math.exp(nll / tokens), "mean_kl": kl / tokens, "top1_agreement": agreed / tokens}


FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command(help=__doc__.split("\n")[0])
@click.argument("directory", metavar="[CHECKPOINT]", required=False, type=FOLDER)
@click.option("--windows", "most", type=click.IntRange(1), default=64, show_default=True, help=f"Of {WINDOW} tokens.")
def main(directory: Path | None, most: int) -> None:
    directory = directory or checkpoint_dir()
    checkpoint = Checkpoint(directory)
    texts, rows = windows(checkpoint, most), []
    exact: dict[str, list[NDArray[np.float64]]] = {}
    print(f"{'':24}{'bits':>7}{'ppl':>10}{'change':>9}{'KL':>11}{'top-1':>9}")
    with tempfile.TemporaryDirectory() as temporary:
        for program, kv, bits, model in models(checkpoint, directory, Path(temporary)):
            row = {"program": program, "kv": kv, "bits": bits, **distances(texts, model, exact.setdefault(program, []))}
            rows.append(row)
            change = row["perplexity"] / next(one["perplexity"] for one in rows if one["program"] == program) - 1
            print(f"{program + ', ' + kv:24}{bits:7.2f}{row['perplexity']:10.3f}{change:9.2%}{row['mean_kl']:11.6f}"
                  f"{row['top1_agreement']:9.2%}", flush=True)
    harness.save("kv_bits", "python bench/kv_bits.py", {
        "model": directory.name, "head_dim": checkpoint.config.head_dim, "rows": rows,
        "tokens": sum(len(ids) - 1 for ids in texts),
    })


if __name__ == "__main__":
    main()
