"""How good a model is: perplexity of a text, and how far a blob's answers are from those of its source checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.errors import BadRequest
from edgemistral.generate.engine import Ids, check_ids
from edgemistral.measure.reference import Reference

WINDOW = 512   # tokens, as llama.cpp's perplexity tool has it
ROWS = 64      # positions compared at once, in float64

Progress = Callable[[str, int, int], None]
"""(what, done, total): "reference" counts its layers of windows, "model" its windows."""


class Model(Protocol):
    """What is needed of `edgemistral.Model`."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def context(self) -> int: ...

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """(len(ids), vocab_size)"""


@dataclass(frozen=True)
class Evaluation:
    """Means over `n_tokens` predicted tokens; the last two are None without a reference."""

    perplexity: float               # e ** nll
    nll: float                      # negative log likelihood of the text's next token, in nats
    n_tokens: int
    mean_kl: float | None           # KL(reference || model) of the next-token distributions, in nats
    top1_agreement: float | None    # share of positions where both would say the same token


def evaluate(
    model: Model,
    ids: Ids,
    reference: Reference | None = None,
    window: int = WINDOW,
    progress: Progress | None = None,
) -> Evaluation:
    """Let the model predict the text `ids` (without <s>), in windows of at most `window` tokens.

    Every window starts with <s> and knows nothing of the one before; each of its tokens is predicted from those before
    it, the first from <s> alone. `window` is cut to the model's context. With a `reference`, the same windows go
    through the source checkpoint in float32.
    Raises BadRequest (`field` names the argument) for no or bad ids, a bad window, or a reference of another shape.
    """
    text = check_ids(ids, model.config.vocab_size)
    if type(window) is not int or window < 1:
        raise BadRequest(f"window is {window!r}: it must be a whole number, at least 1", "window")
    size = min(window, model.context)
    bos = np.array([model.config.bos_id], np.int32)
    windows = [np.concatenate([bos, text[start : start + size]]) for start in range(0, len(text), size)]
    return evaluate_windows(model, windows, reference, progress)


def evaluate_windows(
    model: Model,
    windows: Sequence[NDArray[np.int32]],
    reference: Reference | None = None,
    progress: Progress | None = None,
    starts: Sequence[int] | None = None,
) -> Evaluation:
    """The same for texts that are cut already (conversations, for example): each begins with its <s>, which is given.

    `starts`: of each window the first token that counts, where what comes before is only there to be read; by default 1.
    Raises BadRequest for a reference of another shape.
    """
    if reference is not None and (difference := _difference(reference.config, model.config)):
        raise BadRequest(f"the reference is of another model: {difference}", "reference")

    def tell(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(what, done, total) if progress is not None else None

    states = [] if reference is None else reference.hidden_states([ids[:-1] for ids in windows], tell("reference"))
    nll = kl = agreed = 0.0
    starts = [1] * len(windows) if starts is None else starts
    for i, (ids, start) in enumerate(zip(windows, starts, strict=True)):
        logits, target = model.logits(ids[:-1]), ids[1:]
        for row in range(start - 1, len(target), ROWS):
            rows = slice(row, row + ROWS)
            log_q = log_softmax(logits[rows])
            nll -= float(np.take_along_axis(log_q, target[rows, None], axis=1).sum())
            if reference is not None:
                log_p = log_softmax(reference.logits(states[i][rows]))
                kl += float((np.exp(log_p) * (log_p - log_q)).sum())
                agreed += int((log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum())
        tell("model")(i + 1, len(windows))
    n = sum(len(ids) - start for ids, start in zip(windows, starts, strict=True))
    return Evaluation(
        perplexity=math.exp(min(nll / n, 700.0)),   # e ** 709 is the largest float
        nll=nll / n,
        n_tokens=n,
        mean_kl=None if reference is None else kl / n,
        top1_agreement=None if reference is None else agreed / n,
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Along the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return result


def _difference(reference: ModelConfig, model: ModelConfig) -> str:
    """The first field in which two configs describe different models, in words; empty when there is none."""
    ours, theirs = model.to_dict(), reference.to_dict()
    for field in ours:
        if field != "context" and ours[field] != theirs[field]:
            return f"its {field} is {theirs[field]}, the blob's {ours[field]}"
    return ""
