"""What the demo model never saw in training, as windows of token ids to predict: for quality tests and benchmarks.

    texts(tokenizer)   {"prose": Text, "conversations": Text, "answers": Text}

Every window is int32 and begins with its <s>. The prose is the beginning of The Wind in the Willows (Kenneth Grahame, 1908);
the conversations are those of heldout.json with their right answers. "answers" are the same windows, of which only the last
answer counts: what users say is given to a model, it never learned to say it, and nobody asks it to.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemistral.measure.evaluate import WINDOW
from edgemistral.text.tokenizer import Tokenizer
from training.conversations import heldout

PROSE = Path(__file__).parents[1] / "tests" / "data" / "prose.txt"


class Text(NamedTuple):
    """What `evaluate_windows` takes."""

    windows: list[NDArray[np.int32]]
    starts: list[int]     # the first token of each that counts


def texts(tokenizer: Tokenizer, n_prose: int | None = None) -> dict[str, Text]:
    """Of the prose only the first `n_prose` windows, if that is given."""
    ids = tokenizer.encode(PROSE.read_text("utf-8"))
    prose = [[tokenizer.bos_id, *ids[at : at + WINDOW]] for at in range(0, len(ids), WINDOW)][:n_prose]
    prompts = [tokenizer.encode_chat(case.messages) for case in heldout()]
    answers = [[*tokenizer.encode(case.answer), tokenizer.eos_id] for case in heldout()]
    talk = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]

    def text(windows: list[list[int]], starts: list[int]) -> Text:
        return Text([np.array(window, np.int32) for window in windows], starts)

    return {
        "prose": text(prose, [1] * len(prose)),
        "conversations": text(talk, [1] * len(talk)),
        "answers": text(talk, [len(prompt) for prompt in prompts]),
    }
