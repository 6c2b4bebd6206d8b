"""From logits to one token: penalties, temperature, the three truncations, one draw.

The order is that of Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p. Every truncation
is a threshold on a value (tokens that tie with the last one kept are kept too), so the result depends neither on the
order in which a sort leaves equal values nor on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import BadRequest, EdgeMistralError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn; a value out of range is a BadRequest whose `field` is its name.

    temperature: 0 takes the most likely token (greedy), 1 the model's own distribution.
    top_k: only the so many most likely tokens; 0 means all.
    top_p: only the most likely tokens that together reach this probability (nucleus; arXiv:1904.09751).
    min_p: only tokens at least this fraction as likely as the most likely one (arXiv:2407.01082).
    repetition_penalty: divides (or multiplies, below zero) the logits of tokens seen before (CTRL; arXiv:1909.05858).
    seed: the same seed gives the same tokens; None draws a new one each time.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check_number("temperature", 0.0, 1e6)
        self._check_number("top_p", 0.0, 1.0)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("repetition_penalty", 1e-6, 1e6)
        self._check_integer("top_k")
        if self.seed is not None:
            self._check_integer("seed")

    def _check_number(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:   # NaN fails too
            raise BadRequest(f"{field} is {value!r}: it must be a number from {low:g} to {high:g}", field)

    def _check_integer(self, field: str) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise BadRequest(f"{field} is {value!r}: it must be a whole number, at least 0", field)


class Sampler:
    """Draws tokens under fixed parameters. One generator state: use a new Sampler for every generation."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = np.random.Generator(np.random.PCG64(params.seed))

    def __call__(self, logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int32]) -> int:
        """The next token id from logits (vocab_size,) and all ids before it, prompt included.

        Draws exactly one random number a token unless greedy.
        """
        logits = _without_nan(self._penalized(logits, history))
        if self.params.temperature == 0:
            return int(logits.argmax())
        weights = self.weights(logits)
        cumulative = np.cumsum(weights, out=weights)
        total = cumulative[-1]
        drawn = min(self._random.random() * total, np.nextafter(total, 0.0))   # the product may round up to the total
        return int(np.searchsorted(cumulative, drawn, side="right"))   # passes over weights of 0, which add nothing

    def weights(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities (vocab_size,) relative to the most likely token's, 0 for tokens that cannot be drawn.

        logits: finite or -inf, penalties applied. Needs a temperature above 0.
        """
        params = self.params
        weights = logits.astype(np.float64)   # then in place: fresh memory would cost more than the arithmetic
        weights -= float(logits.max())
        with np.errstate(over="ignore"):   # a tiny temperature sends all but the best to -inf, as it should
            weights /= params.temperature
        np.exp(weights, out=weights)
        if 0 < params.top_k < len(logits):
            kth = len(logits) - params.top_k
            weights *= logits >= np.partition(logits, kth)[kth]
        floor = params.min_p
        if params.top_p < 1:
            floor = max(floor, _nucleus_floor(weights, params.top_p))
        if floor > 0:
            weights *= weights >= floor
        return weights

    def _penalized(
        self, logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int32]
    ) -> NDArray[np.float32]:
        penalty = self.params.repetition_penalty
        if penalty == 1 or len(history) == 0:
            return logits
        seen = np.asarray(history)
        before = logits[seen]
        logits = logits.copy()
        # An id that occurs twice is written twice with the same value: no need to make the ids unique.
        logits[seen] = np.where(before < 0, before * np.float32(penalty), before / np.float32(penalty))
        return logits


def _without_nan(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """NaN becomes -inf (never drawn) and +inf the largest number, so that what follows is plain arithmetic."""
    if math.isfinite(logits.max()):   # NaN passes through max
        return logits
    logits = np.nan_to_num(logits, nan=-np.inf, posinf=float(np.finfo(np.float32).max), neginf=-np.inf)
    if logits.max() == -np.inf:
        raise EdgeMistralError("the model gave no finite logit: the model file may be damaged (edgemistral verify)")
    return logits


def _nucleus_floor(weights: NDArray[np.float64], top_p: float) -> float:
    """The smallest weight among the most likely tokens that together hold `top_p` of the sum."""
    total = float(weights.sum())
    # Tokens below the average of what the nucleus leaves out add up to less than that: only the others need sorting
    # (llama2.c does the same). Of a trained model's vocabulary that is a few hundred.
    head = np.sort(weights[weights >= (1 - top_p) * total / len(weights)])[::-1]
    cumulative = np.cumsum(head)
    last = int(np.searchsorted(cumulative, top_p * total))
    return float(head[min(last, len(head) - 1)])   # the two sums may round differently
