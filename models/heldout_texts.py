"""What the demo model never saw in training, as windows of token ids to predict: for quality tests and benchmarks.

    windows(tokenizer)   {"prose": [ids, ...], "conversations": [ids, ...]}

Every window is int32 and begins with its <s>. The prose is the beginning of The Wind in the Willows (Kenneth Grahame, 1908);
the conversations are those of heldout.json with their right answers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conversations import heldout
from numpy.typing import NDArray

from edgemistral.evaluate import WINDOW
from edgemistral.tokenizer import Tokenizer

PROSE = Path(__file__).parents[1] / "tests" / "data" / "prose.txt"
Windows = list[NDArray[np.int32]]


def windows(tokenizer: Tokenizer, n_prose: int | None = None) -> dict[str, Windows]:
    """Of the prose only the first `n_prose` windows, if that is given."""
    ids = tokenizer.encode(PROSE.read_text("utf-8"))
    prose = [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)][:n_prose]
    talk = [[*tokenizer.encode_chat(case.messages), *tokenizer.encode(case.answer), tokenizer.eos_id] for case in heldout()]
    return {
        "prose": [np.array([tokenizer.bos_id, *window], np.int32) for window in prose],
        "conversations": [np.array(window, np.int32) for window in talk],
    }
