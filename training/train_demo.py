"""Train the demo model from scratch: English prose first, then conversations; one to two hours on two quiet cores.

    python training/train_demo.py WORK --prose BOOKS.txt --validation OTHER_BOOKS.txt

Needs `pip install -e '.[train]'` and a C++ compiler, or --eager. A GPU is used if there is one. Every SAVE_SECONDS, and when
it is interrupted, the whole state is saved in the folder WORK; the same command goes on from there. At the end (or with
--export, from what is there) the model is written to models/demo: a checkpoint that transformers loads, `losses.json` and
`losses.png`; how far its losses are from those of the model that was there is printed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

os.environ.setdefault("DNNL_PRIMITIVE_CACHE_CAPACITY", "8192")   # products compiled for all shapes of batches

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from edgemistral.config import HF_ARCHITECTURES, HF_NAMES, ModelConfig
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from edgemistral.text.tokenizer import Tokenizer
from training.balance import balance
from training.batches import IGNORED, Batch, chat_pool, encode_prose, prose_batch
from training.network import Mistral
from training.train_tokenizer import train_tokenizer

CONFIG = ModelConfig(
    dim=256, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=768, vocab_size=4096, context=1024,
    norm_eps=1e-5, rope_theta=10000.0, sliding_window=None, bos_id=1, eos_id=2,
)
DEMO = Path(__file__).parents[1] / "models" / "demo"
SEED = 1
CHAT_PART = 1536               # tokens of a batch of conversations; what a part of a step needs stays in the cache
ROWS = 256                     # of logits at a time, for the same reason: five times as fast as all at once
MATRIX_RATE, VECTOR_RATE, EMBEDDING_RATE = 0.02, 0.004, 0.004
WARM_UP = 100                  # steps
DECAY = 0.5                    # share of the first two stages in which the rates fall to zero
LATER_WARM_UP = 0.02           # share of each later stage in which they rise again


class Stage(NamedTuple):
    """For how many tokens the training learns from which steps, the same mixture in each, and how fast."""

    tokens: int
    chats: int                             # batches of conversations
    windows: tuple[tuple[int, int], ...]   # of prose, rows and length of each batch
    prose_weight: float                    # of a token of prose, where one that an assistant says weighs 1
    rate: float                            # highest, as a share of the peak rates


STAGES = (
    Stage(4_000_000, 0, ((8, 256),) * 4, 1.0, 1.0),
    Stage(12_000_000, 4, ((2, CONFIG.context),), 1.0, 1.0),   # in steps of 8,000 tokens, as the first
    Stage(10_000_000, 2, ((1, 512),), 0.25, 0.5),             # more and smaller steps; prose so that it is not forgotten
    Stage(7_000_000, 2, ((1, 512),), 0.25, 0.4),
)
BEGINS = (0, *itertools.accumulate(stage.tokens for stage in STAGES))
LATER = 2                      # from this stage on the rates rise and fall in each; before, once over all
FIRST_FALL, TOTAL = BEGINS[LATER], BEGINS[-1]
VALIDATE_EVERY = 1_500_000     # tokens
SAVE_SECONDS = 180


class Training:
    """Model, optimizers and the place in the data; `state`/`load` carry all of it over an interruption."""

    def __init__(self, tokenizer: Tokenizer, prose: np.ndarray, validation: np.ndarray, device: str, compiled: bool) -> None:
        torch.manual_seed(SEED)
        self.tokenizer, self.prose, self.device = tokenizer, prose, device
        self.model = Mistral(CONFIG, compiled).to(device)
        matrices = [p for p in self.model.layers.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        embeddings = [self.model.embed.weight, self.model.output.weight]
        self.optimizers = [
            torch.optim.Muon([{"params": matrices, "peak": MATRIX_RATE}], lr=MATRIX_RATE, weight_decay=0.01, nesterov=True),
            torch.optim.AdamW(
                [{"params": embeddings, "peak": EMBEDDING_RATE}, {"params": vectors, "peak": VECTOR_RATE}],
                lr=EMBEDDING_RATE, betas=(0.9, 0.95), weight_decay=0.0,
            ),
        ]
        self.step = self.tokens = 0
        self.pool, self.taken = 0, 0          # conversations: which pool, and how many of its batches were taken
        self.batches: list[Batch] = []
        self.losses: list[dict[str, float]] = []
        rng = np.random.default_rng(0)
        self.held_out = {
            "prose": [prose_batch(validation, 4, CONFIG.context, CONFIG.bos_id, rng) for _ in range(8)],
            "chat": chat_pool(0, tokenizer, CHAT_PART, CONFIG.context, "heldout")[:24],
        }

    def train_step(self) -> float:
        """One step; the mean loss of its tokens."""
        stage = self.stage
        parts = self.parts(stage)
        counted = sum(weight * int((targets != IGNORED).sum()) for (_, targets), weight in parts)
        total = 0.0
        for batch, weight in parts:
            loss = self.loss(batch) * (weight / counted)
            loss.backward()
            total += float(loss.detach())
            self.tokens += batch[0].numel()
        rate = self.rate(stage)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    @property
    def stage(self) -> int:
        """Index of the stage that the next step belongs to, with all of its tokens."""
        return sum(self.tokens >= end for end in BEGINS[1:-1])

    def parts(self, stage: int) -> list[tuple[Batch, float]]:
        """The batches of this step and what a token of each weighs."""
        rng = np.random.default_rng((SEED, self.step))
        _, chats, windows, prose_weight, _ = STAGES[stage]
        learned = [(self.next_chat(), 1.0) for _ in range(chats)]
        return learned + [(self.windows(shape, rng), prose_weight) for shape in windows]

    def windows(self, shape: tuple[int, int], rng: np.random.Generator) -> Batch:
        return prose_batch(self.prose, *shape, CONFIG.bos_id, rng)

    def next_chat(self) -> Batch:
        if not self.batches or self.taken == len(self.batches):
            if self.batches:
                self.pool, self.taken = self.pool + 1, 0
            self.batches = chat_pool(self.pool, self.tokenizer, CHAT_PART, CONFIG.context)
        self.taken += 1
        return self.batches[self.taken - 1]

    def loss(self, batch: Batch) -> torch.Tensor:
        """Summed cross-entropy."""
        ids, targets = (each.to(self.device) for each in batch)
        learned = (targets.flatten() != IGNORED).nonzero()[:, 0]
        learned = F.pad(learned, (0, -len(learned) % ROWS), value=-1)   # with a last position that is to be ignored
        targets = F.pad(targets.flatten(), (0, 1), value=IGNORED)[learned]
        with torch.autocast(self.device, torch.bfloat16):
            logits = self.model.output(self.model.hidden(ids).flatten(0, 1)[learned])
        parts = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
        return torch.stack([F.cross_entropy(row.float(), target, reduction="sum") for row, target in parts]).sum()

    def rate(self, stage: int) -> float:
        """Share of the peak rates in a step of this stage: warm-up, plateau, linear to zero; later up and to zero again."""
        if self.tokens < FIRST_FALL:
            return min(1.0, (self.step + 1) / WARM_UP, (1 - self.tokens / FIRST_FALL) / DECAY)
        stage = max(stage, LATER)      # the step that ends the first fall began before it
        seen = (self.tokens - BEGINS[stage]) / STAGES[stage].tokens
        return STAGES[stage].rate * max(0.0, min((seen + 0.001) / LATER_WARM_UP, 1 - seen))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss in nats a token on prose and conversations that are not trained on."""
        losses = {}
        for name, batches in self.held_out.items():
            counted = sum(int((targets != IGNORED).sum()) for _, targets in batches)
            losses[name] = sum(float(self.loss(batch)) for batch in batches) / counted
        return losses

    @property
    def done(self) -> bool:
        return self.tokens >= TOTAL

    def state(self) -> dict[str, Any]:
        names = ("step", "tokens", "pool", "taken", "losses")
        return {
            "model": self.model.state_dict(), "optimizers": [each.state_dict() for each in self.optimizers],
            **{name: getattr(self, name) for name in names},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state.pop("model"))
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        self.__dict__.update(state)
        if self.taken:
            self.batches = chat_pool(self.pool, self.tokenizer, CHAT_PART, CONFIG.context)


def save(training: Training, path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(training.state(), partial)
    partial.replace(path)


def train(training: Training, checkpoint: Path) -> None:
    """Until all tokens are seen; saves now and then, and at Ctrl-C."""
    saved, recent = time.monotonic(), math.nan
    with tqdm(total=TOTAL, initial=training.tokens, unit="tok", unit_scale=True, mininterval=2) as bar:
        try:
            while not training.done:
                before = training.tokens
                loss = training.train_step()
                recent = loss if math.isnan(recent) else 0.95 * recent + 0.05 * loss
                bar.update(training.tokens - before)
                bar.set_postfix(loss=f"{recent:.3f}", refresh=False)
                if training.tokens // VALIDATE_EVERY > before // VALIDATE_EVERY or training.done:
                    losses = {"step": training.step, "tokens": training.tokens, "train": recent, **training.validate()}
                    training.losses.append(losses)
                    bar.write(json.dumps({name: round(value, 4) for name, value in losses.items()}))
                if time.monotonic() - saved > SAVE_SECONDS:
                    save(training, checkpoint)
                    saved = time.monotonic()
        finally:
            save(training, checkpoint)


def export(training: Training, tokenizer: bytes) -> None:
    """The checkpoint, balanced to be quantized, and the curves of its training."""
    DEMO.mkdir(exist_ok=True)
    rng = np.random.default_rng(SEED)
    typical = [training.windows((1, 512), rng) for _ in range(8)] + [training.next_chat() for _ in range(8)]
    balance(training.model, [ids.to(training.device) for ids, _ in typical])
    fields = training.model.config.to_dict()
    config = {"architectures": [HF_ARCHITECTURES["mistral"]], "model_type": "mistral", "hidden_act": "silu",
              "torch_dtype": "bfloat16", "tie_word_embeddings": False, "rope_theta": CONFIG.rope_theta,
              "head_dim": CONFIG.head_dim, "sliding_window": None,
              **{foreign: fields[name] for name, foreign in HF_NAMES.items()}}
    (DEMO / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (DEMO / "tokenizer.model").write_bytes(tokenizer)
    save_file(training.model.to_hf(), DEMO / "model.safetensors", {"format": "pt"})
    (DEMO / "losses.json").write_text(
        "[\n" + ",\n".join(json.dumps({k: round(v, 4) for k, v in row.items()}) for row in training.losses) + "\n]\n",
        encoding="utf-8",
    )
    plot(training.losses, DEMO / "losses.png")


def compared(losses: dict[str, float], before: Path) -> str:
    """The last losses, beside those of the model whose losses.json is `before`."""
    rows = json.loads(before.read_text(encoding="utf-8")) if before.exists() else []
    lines = []
    for name in ("prose", "chat"):
        old = f" (before {rows[-1][name]:.4f}: {losses[name] / rows[-1][name] - 1:+.2%})" if rows else ""
        lines.append(f"held-out {name}: {losses[name]:.4f} nats a token{old}")
    return "\n".join(lines)


def plot(losses: list[dict[str, float]], path: Path) -> None:
    """Losses over tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    tokens = [row["tokens"] / 1e6 for row in losses]
    for name, label in (("prose", "held-out prose"), ("chat", "held-out conversations")):
        axes.plot(tokens, [row[name] for row in losses], label=f"{label}: {losses[-1][name]:.3f} at the end")
    axes.axvline(STAGES[0].tokens / 1e6, color="grey", linestyle=":", label="conversations begin")
    axes.set(xlabel="million tokens of training", ylabel="loss, nats a token", ylim=(0, 6))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


@click.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--prose", type=click.Path(exists=True, path_type=Path), required=True, help="Text to train on, .txt or .txt.xz.")
@click.option("--validation", type=click.Path(exists=True, path_type=Path), required=True, help="Text to measure on.")
@click.option("--threads", type=int, help="[default: PyTorch's]")
@click.option("--eager", is_flag=True, help="Compile nothing: slower, but needs no C++ compiler.")
@click.option("--export", "only_export", is_flag=True, help="Write models/demo from the state in WORK, train no more.")
def main(work: Path, prose: Path, validation: Path, threads: int | None, eager: bool, only_export: bool) -> None:
    """Train the demo model, or go on; the state is in the folder WORK."""
    work.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    if not (work / "tokenizer.model").exists():
        (work / "tokenizer.model").write_bytes(train_tokenizer(prose, CONFIG.vocab_size))
    tokenizer_model = (work / "tokenizer.model").read_bytes()
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    training = Training(
        tokenizer, encode_prose(prose, tokenizer, work / "prose.ids"),
        encode_prose(validation, tokenizer, work / "validation.ids"), "cuda" if torch.cuda.is_available() else "cpu", not eager,
    )
    checkpoint = work / "training.pt"
    if checkpoint.exists():
        training.load(torch.load(checkpoint, map_location=training.device, weights_only=True))
    if not only_export:
        with contextlib.suppress(KeyboardInterrupt):
            train(training, checkpoint)
    if training.done or only_export:
        if training.losses:
            click.echo(compared(training.losses[-1], DEMO / "losses.json"))
        export(training, tokenizer_model)
        click.echo(f"wrote {DEMO}")


if __name__ == "__main__":
    main()
