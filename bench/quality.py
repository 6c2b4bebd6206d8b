"""The loss by quantizing a trained model: our blobs and llama.cpp's types, all compared with the float32 model.

    python bench/quality.py

The model is the demo model (models/demo); the texts are prose and conversations that it never saw. Prints a table; writes
quality.json and .png. Everything runs as in normal use, with rounded activations and KV cache. A file stores some tensors with
more bits than others, so there are two comparisons: whole files as each program makes them, and only the layers, with
llama.cpp's embeddings and output head stored as in a blob. Needs the `bench` extra.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # before NumPy loads: idle BLAS workers would spin beside the model

import click
from edgemistral_quantize import quantize
from edgemistral_quantize.checkpoint import Checkpoint

import edgemistral
from bench import harness, llama_cpp_models
from edgemistral.cli.inspect import describe
from edgemistral.demo import checkpoint_dir
from edgemistral.files.blob import Blob
from edgemistral.measure.evaluate import evaluate_windows
from edgemistral.measure.reference import Reference, ReferenceModel
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from training.heldout_texts import texts as heldout_texts

PEERS = ("Q8_0", "Q4_K_M", "IQ4_NL", "Q4_0")
LIKE_A_BLOB = {"embeddings": "BF16", "output": "Q8_0"}
Row = dict[str, Any]


def models(checkpoint: Checkpoint, directory: Path, folder: Path) -> Iterator[tuple[str, dict[str, float], Any]]:
    """(name, bits per weight, model)"""
    for bits in (8, 4):
        path = quantize(directory, folder / f"{bits}.safetensors", bits=bits, progress=False)
        with Blob.open(path) as blob:
            size = describe(blob)["bits_per_weight"]
        for kv_bits in (16, 8):
            with edgemistral.load(path, kv_bits=kv_bits) as model:
                yield f"edgemistral {bits} bits, {kv_bits}-bit KV", size, model
    source = folder / "f32.gguf"
    llama_cpp_models.write_float32(source, checkpoint)
    for kind in PEERS:
        for name, kept in ((f"llama.cpp {kind}", {}), (f"llama.cpp {kind}, the rest like a blob", LIKE_A_BLOB)):
            path = folder / f"{kind}{len(kept)}.gguf"
            llama_cpp_models.quantize(source, path, kind, **kept)
            peer = llama_cpp_models.LlamaCpp(path, checkpoint.config)
            yield name, llama_cpp_models.bits_per_weight(path), peer
            peer.close()


def plot(rows: list[Row], path: Path) -> None:
    """KL over bits per weight of the layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows:
        if row["bits"] is None or row["name"].endswith(("blob", "16-bit KV")):
            continue
        ours = row["name"].startswith("edgemistral")
        x, y = row["bits"]["layers"], row["prose"]["mean_kl"]
        axes.plot(x, y, "o" if ours else "s", color="tab:blue" if ours else "tab:gray")
        axes.annotate(row["name"].removeprefix("llama.cpp "), (x, y), (6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="bits a weight, in the layers", ylabel="mean KL from float32 on held-out prose, nats", yscale="log",
             xlim=(4, 10), title="The demo model: lower and further left is better")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


@click.command(help=__doc__.split("\n")[0])
def main() -> None:
    directory = checkpoint_dir()
    checkpoint = Checkpoint(directory)
    reference = Reference(checkpoint)
    texts = heldout_texts(SentencePieceTokenizer(checkpoint.tokenizer))
    rows: list[Row] = []

    def add(name: str, bits: dict[str, float] | None, model: Any) -> None:
        row: Row = {"name": name, "bits": bits}
        for text, of in texts.items():
            row[text] = asdict(evaluate_windows(model, of.windows, reference, starts=of.starts))
        rows.append(row)
        size = f"{'':14}" if bits is None else f"{bits['layers']:7.2f}{bits['file']:7.2f}"
        figures = (f"{r['perplexity']:9.3f}{r['mean_kl']:11.6f}{r['top1_agreement']:8.2%}" for r in map(row.get, texts))
        print(f"{name:44}{size}{''.join(figures)}", flush=True)

    print(f"{'':44}{'layers':>7}{'file':>7}" + "".join(f"{'ppl':>9}{'KL':>11}{'top-1':>8}" for _ in texts))
    add("float32", None, ReferenceModel(reference))
    with tempfile.TemporaryDirectory() as temporary:
        for found in models(checkpoint, directory, Path(temporary)):
            add(*found)
    plot(rows, harness.OF_MACHINE / "quality.png")
    harness.save("quality", "python bench/quality.py", {
        "tokens": {text: sum(map(len, of.windows)) - sum(of.starts) for text, of in texts.items()}, "rows": rows,
    })


if __name__ == "__main__":
    main()
