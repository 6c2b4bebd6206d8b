"""The demo model's exam: the held-out conversations, then others that are drawn anew with the same wordings.

    python training/exam.py [CHECKPOINT] [--fresh 3]

Greedy, 8-bit KV, with 4-bit and with 8-bit weights; prints every wrong answer of the fixed list, and how many were right.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import click
from edgemistral_quantize import quantize
from tqdm import tqdm

import edgemistral
from edgemistral.demo import checkpoint_dir
from training.conversations import Case, check, heldout, sample
from training.make_heldout import draw

FRESH_SEED = 1000   # and up; the fixed list was drawn with another
N_NEW = 200         # tokens of the longest answer


def answers(blob: Path, cases: list[Case], progress: bool = False) -> list[tuple[Case, str]]:
    """Every case with the answer that the model of this blob gives it, greedily."""
    with edgemistral.load(blob, kv_bits=8) as model:
        asked = tqdm(cases, desc=blob.stem, leave=False, disable=None if progress else True)
        return [(case, "".join(model.chat(case.messages, N_NEW, temperature=0))) for case in asked]


def report(title: str, answered: list[tuple[Case, str]], show: bool) -> None:
    """Print how many are right and of which kinds the others are; `show`: those themselves too."""
    wrong = [(case, text) for case, text in answered if not check(case, text)]
    if show:
        for case, text in wrong:
            click.echo(f"  {case.kind}: {case.messages[-1]['content']} -> {text}")
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(case.kind for case, _ in wrong).most_common())
    click.echo(f"{title}: {len(answered) - len(wrong)} of {len(answered)} right; wrong: {kinds or 'none'}")


@click.command(help=__doc__.split("\n")[0])
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.option("--fresh", default=3, show_default=True, help="Other lists to draw, of 100 conversations each.")
def main(checkpoint: Path | None, fresh: int) -> None:
    checkpoint = checkpoint or checkpoint_dir()
    others = [case for seed in range(fresh) for case in draw(Random(FRESH_SEED + seed))]
    with tempfile.TemporaryDirectory() as folder:
        for bits in (4, 8):
            blob = quantize(checkpoint, Path(folder) / f"{bits}-bits.safetensors", bits=bits, progress=False)
            report(f"{bits} bits, the model card's sample", answers(blob, [sample()]), show=True)
            report(f"{bits} bits, the fixed list", answers(blob, heldout(), progress=True), show=True)
            if others:
                report(f"{bits} bits, drawn anew", answers(blob, others, progress=True), show=False)


if __name__ == "__main__":
    main()
