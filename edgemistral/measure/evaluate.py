"""The quality of a model: perplexity of a text, and the distance of a blob's predictions from those of its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.errors import BadRequest
from edgemistral.generate.ids import Ids, check_ids
from edgemistral.measure.reference import Reference

WINDOW = 512   # tokens, as in llama.cpp's perplexity tool
ROWS = 64      # positions compared at once, in float64
PERCENTILES = (50, 90, 99, 100)   # reported percentiles of the tokens' KL; 100 is the largest

Progress = Callable[[str, int, int], None]
"""(what, done, total): "reference" counts its layers of windows, "model" its windows."""


class Model(Protocol):
    """The part of `edgemistral.Model` that is needed."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def context(self) -> int: ...

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """(len(ids), vocab_size)"""


@dataclass(frozen=True)
class Evaluation:
    """Means over `n_tokens` predicted tokens. The fields after `n_tokens` are None without a reference."""

    perplexity: float               # e ** nll
    nll: float                      # negative log likelihood of the text's next token, in nats
    n_tokens: int
    mean_kl: float | None           # KL(reference || model) of the next-token distributions, in nats
    top1_agreement: float | None    # share of positions where both have the same most likely token
    flipped: float | None = None    # share of positions where they have not
    kl_percentiles: dict[str, float] | None = None   # of the tokens' KL, by "50", "90", "99", "100"


@dataclass
class Tally:
    """The sums of an evaluation; those of several texts can be added."""

    nll: float = 0.0                # a sum, in nats
    n_tokens: int = 0
    kl: list[NDArray[np.float64]] = field(default_factory=list)   # of each token, in parts
    agreed: int = 0

    def add(self, log_q: NDArray[np.float64], target: NDArray[np.int32], log_p: NDArray[np.float64] | None) -> None:
        """Add positions: the model's log probabilities (n, vocab_size), the actual tokens (n,), the reference's."""
        self.nll -= float(np.take_along_axis(log_q, target[:, None], axis=1).sum())
        self.n_tokens += len(target)
        if log_p is not None:
            self.kl.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
            self.agreed += int((log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum())

    def result(self) -> Evaluation:
        """The means; needs at least one token."""
        nll, kl = self.nll / self.n_tokens, np.concatenate(self.kl) if self.kl else None
        perplexity = math.exp(min(nll, 700.0))   # e ** 709 is the largest float
        if kl is None:
            return Evaluation(perplexity, nll, self.n_tokens, None, None)
        percentiles = {str(p): float(np.percentile(kl, p)) for p in PERCENTILES}
        agreement = self.agreed / self.n_tokens
        return Evaluation(perplexity, nll, self.n_tokens, float(kl.mean()), agreement, 1 - agreement, percentiles)

    @classmethod
    def of(cls, tallies: Iterable[Tally]) -> Tally:
        """Several texts as one."""
        whole = cls()
        for each in tallies:
            whole.nll += each.nll
            whole.n_tokens += each.n_tokens
            whole.agreed += each.agreed
            whole.kl += each.kl
        return whole


def evaluate(
    model: Model,
    ids: Ids,
    reference: Reference | Model | None = None,
    window: int = WINDOW,
    progress: Progress | None = None,
) -> Evaluation:
    """Let the model predict the text `ids` (without <s>), in windows of at most `window` tokens.

    Every window starts with <s> and is independent of the others. Each token is predicted from those before it, the first
    from <s> alone. `window` is cut to the model's context. With a `reference`, the same windows go through the source
    checkpoint in float32, or through another model.
    Raises BadRequest (`field` names the argument) for no or bad ids, a bad window, or a reference of another shape.
    """
    return tally(model, cut(model, ids, window), reference, progress).result()


def evaluate_windows(
    model: Model,
    windows: Sequence[NDArray[np.int32]],
    reference: Reference | Model | None = None,
    progress: Progress | None = None,
    starts: Sequence[int] | None = None,
) -> Evaluation:
    """The same for texts that are already cut (for example conversations). Each window begins with <s>.

    `starts`: for each window, the first token to count; those before it are only read. Default 1.
    Raises BadRequest for a reference of another shape.
    """
    return tally(model, windows, reference, progress, starts).result()


def cut(model: Model, ids: Ids, window: int = WINDOW) -> list[NDArray[np.int32]]:
    """The windows that `evaluate` makes of a text. Raises BadRequest as it does."""
    text = check_ids(ids, model.config.vocab_size)
    if type(window) is not int or window < 1:
        raise BadRequest(f"window is {window!r}: it must be a whole number, at least 1", "window")
    size = min(window, model.context)
    bos = np.array([model.config.bos_id], np.int32)
    return [np.concatenate([bos, text[start : start + size]]) for start in range(0, len(text), size)]


def tally(
    model: Model,
    windows: Sequence[NDArray[np.int32]],
    reference: Reference | Model | None = None,
    progress: Progress | None = None,
    starts: Sequence[int] | None = None,
) -> Tally:
    """`evaluate_windows`, but returns the sums."""
    if reference is not None and (difference := _difference(reference.config, model.config)):
        raise BadRequest(f"the reference is of another model: {difference}", "reference")

    def tell(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(what, done, total) if progress is not None else None

    in_float = reference if isinstance(reference, Reference) else None
    as_it_runs = None if isinstance(reference, Reference) else reference
    states = [] if in_float is None else in_float.hidden_states([ids[:-1] for ids in windows], tell("reference"))
    found = Tally()
    for i, (ids, start) in enumerate(zip(windows, [1] * len(windows) if starts is None else starts, strict=True)):
        logits, target = model.logits(ids[:-1]), ids[1:]
        peer = None if as_it_runs is None else as_it_runs.logits(ids[:-1])
        for row in range(start - 1, len(target), ROWS):
            rows = slice(row, row + ROWS)
            log_p = None
            if peer is not None:
                log_p = log_softmax(peer[rows])
            elif in_float is not None:
                log_p = log_softmax(in_float.logits(states[i][rows]))
            found.add(log_softmax(logits[rows]), target[rows], log_p)
        tell("model")(i + 1, len(windows))
    return found


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The log softmax along the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return result


def _difference(reference: ModelConfig, model: ModelConfig) -> str:
    """The first difference between two configs, in words; empty if they describe the same shape."""
    ours, theirs = model.to_dict(), reference.to_dict()
    for name in ours:
        if name != "context" and ours[name] != theirs[name]:
            return f"its {name} is {theirs[name]}, the blob's {ours[name]}"
    return ""
