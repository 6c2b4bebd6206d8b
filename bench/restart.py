"""A restart of the program with a conversation of 30,000 tokens in a session: how long until the next answer's first token.

    python bench/restart.py WORK [--n-layers 4]

7B shapes with random weights, made in WORK as parallel.py makes them. The session is a conversation whose segments all hold the
keys and values of its first 256 tokens (`bench/filled_session.py`). Each time is of a new `edgemistral run`, from its start to
its first output: the session is opened, every checksum compared, the conversation's text encoded, and a short question read
that follows it. Beside it the same question without a session, and the time of one decoded token at that depth.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

import edgemistral
from bench import harness
from bench.filled_session import write_filled
from bench.synthetic import synthetic_blob
from edgemistral.files.blob import Blob
from edgemistral.model import tokenizer_of

TOKENS = 30_000
REPEATS = 7
WORDS = ("the", "old", "road", "to", "the", "sea", "was", "closed", "in", "winter", "and", "letters", "came", "by", "boat")
QUESTION = "And then?"


def conversation(tokenizer: Any) -> tuple[list[dict[str, str]], list[int]]:
    """Messages of some 30,000 tokens, and their ids."""
    rng, messages, ids = np.random.default_rng(0), [], []
    while len(ids) < TOKENS:
        for role, words in (("user", 200), ("assistant", 1000)):
            messages.append({"role": role, "content": " ".join(rng.choice(WORDS, words))})
        ids = tokenizer.encode_chat(messages)
    return messages, ids


def first_output(blob: Path, session: Path | None) -> float:
    """Seconds from the start of `edgemistral run` to its first output."""
    options = [] if session is None else ["--session", str(session)]
    command = [*harness.EDGEMISTRAL, "run", str(blob), QUESTION, "--greedy", "--max-new-tokens", "1", *options]
    return harness.run(command).first_output_seconds


def measure(blob: Path, session: Path, repeats: int) -> dict[str, Any]:
    with Blob.open(blob) as opened:
        tokenizer = tokenizer_of(opened)
    messages, ids = conversation(tokenizer)
    write_filled(session, blob, np.array(ids, np.int32), notes=json.dumps({"messages": messages, "written": {}}))
    kept = session.with_suffix(".kept")
    shutil.copyfile(session, kept)
    with_session, without = [], []
    for _ in range(repeats + 1):                 # the first fills the caches
        shutil.copyfile(kept, session)           # without the turn that the last run added
        with_session.append(first_output(blob, session))
        without.append(first_output(blob, None))
    shutil.copyfile(kept, session)
    with edgemistral.load(blob, lookup=False) as model, model.session(session) as opened_session:
        generation = model.generate([*opened_session.ids, 5], 9, temperature=0, session=opened_session,
                                    logit_bias={model.config.eos_id: -100.0})
        list(generation)
        assert generation.usage.cached_tokens == len(ids)
        decoded = 1 / generation.usage.decode_rate
    kept.unlink()
    return {"tokens": len(ids), "session_bytes": session.stat().st_size, "first_token_seconds": median(with_session[1:]),
            "without_session_seconds": median(without[1:]), "decoded_token_seconds": decoded,
            "samples": with_session[1:]}


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
@click.option("--n-layers", default=4, show_default=True)
@click.option("--repeats", default=REPEATS, show_default=True)
def main(work: Path, n_layers: int, repeats: int) -> None:
    blob, session = synthetic_blob(work, n_layers), work / f"{n_layers}-layers.session"
    results = measure(blob, session, repeats)
    session.unlink()
    click.echo(f"{results['tokens']:,} tokens in a session of {harness.in_gb(results['session_bytes'])}: first new token after "
               f"{results['first_token_seconds']:.2f} s; without a session {results['without_session_seconds']:.2f} s; "
               f"a decoded token takes {results['decoded_token_seconds']:.3f} s")
    harness.save("restart", f"python bench/restart.py WORK --n-layers {n_layers}", {"n_layers": n_layers, **results})


if __name__ == "__main__":
    main()
