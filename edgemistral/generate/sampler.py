"""From logits to one token: penalties, bias, grammar, temperature, the three truncations, one draw.

The order is that of Hugging Face transformers: repetition penalty (and after it what the OpenAI interface adds to
logits), temperature, top-k, top-p, min-p. Every truncation is a threshold on a value (tokens that tie with the last one
kept are kept too), so the result depends neither on the order in which a sort leaves equal values nor on the machine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import BadRequest, EdgeMistralError

MAX_TOP_LOGPROBS = 20


class Constraint(Protocol):
    """What one generation may still write; its state advances with every token."""

    def allowed(self) -> NDArray[np.bool_]:
        """(vocab_size,): the tokens that may come next, </s> among them where the text may end."""

    def accept(self, token: int) -> None:
        """Advance by this token."""


class Grammar(Protocol):
    """What a text may be (see `edgemistral.generate.grammar`). Many generations may share one."""

    def start(self) -> Constraint:
        """The state of a new generation."""


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the model's own probabilities (temperature 1, nothing forbidden) where a token was drawn."""

    drawn: float                        # of the token that was drawn
    top: tuple[tuple[int, float], ...]  # (token id, value) of the likeliest ones, best first


# The lowest and the highest value of each number, also for the server's schemas and the help texts.
RANGES = {
    "temperature": (0.0, 1e6), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "repetition_penalty": (1e-6, 1e6),
    "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn; a value out of range is a BadRequest whose `field` is its name.

    temperature: 0 takes the most likely token (greedy), 1 the model's own distribution.
    top_k: only this many of the most likely tokens; 0 means all.
    top_p: only the most likely tokens that together reach this probability (nucleus; arXiv:1904.09751).
    min_p: only tokens at least this fraction as likely as the most likely one (arXiv:2407.01082).
    repetition_penalty: divides (or multiplies, below zero) the logits of tokens seen before (CTRL; arXiv:1909.05858).
    seed: the same seed gives the same tokens; None draws a new one each time.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens generated before, once and as often as
        each was (-2 to 2, as in the OpenAI interface).
    logit_bias: token id -> what is added to its logit (-100 to 100, as in the OpenAI interface).
    grammar: the text follows it; at a limit of length it may be incomplete.
    min_tokens: the answer has at least this many. stop_token_ids: these end it, like the model's own ends of turn.
    top_logprobs: record `Logprobs` for every token, with this many of the likeliest; None records nothing.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    grammar: Grammar | None = None
    top_logprobs: int | None = None
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for field, (low, high) in RANGES.items():
            if not _is_number(value := getattr(self, field), low, high):
                raise BadRequest(f"{field} is {value!r}: it must be a number from {low:g} to {high:g}", field)
        self._check_integer("top_k")
        self._check_integer("min_tokens")
        if self.seed is not None:
            self._check_integer("seed")
        if self.top_logprobs is not None:
            self._check_integer("top_logprobs", MAX_TOP_LOGPROBS)
        for token, bias in (self.logit_bias or {}).items():
            if type(token) is not int or not _is_number(bias, -100, 100):
                raise BadRequest(
                    f"logit_bias has {token!r}: {bias!r}: it must map token ids to numbers from -100 to 100", "logit_bias"
                )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises BadRequest if `logit_bias` or `stop_token_ids` names a token that a model with this vocabulary lacks."""
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                message = f"stop_token_ids: token id {token} is outside the vocabulary of {vocab_size}"
                raise BadRequest(message, "stop_token_ids")
        for token in self.logit_bias or {}:
            if not 0 <= token < vocab_size:
                raise BadRequest(f"logit_bias: token id {token} is outside the vocabulary of {vocab_size}", "logit_bias")

    def _check_integer(self, field: str, high: int | None = None) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise BadRequest(f"{field} is {value!r}: it must be a whole number, at least 0", field)
        if high is not None and value > high:
            raise BadRequest(f"{field} is {value}: it must be at most {high}", field)


class Sampler:
    """Draws tokens under fixed parameters. It remembers what it drew: use a new Sampler for every generation.

    logprobs: of the token drawn last, if `params.top_logprobs` asks for them.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.logprobs: Logprobs | None = None
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._drawn: Counter[int] = Counter()
        self._constraint = params.grammar.start() if params.grammar else None

    def __call__(self, logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int32]) -> int:
        """The next token id from logits (vocab_size,) and all ids before it, prompt included.

        Draws exactly one random number a token unless greedy.
        """
        params, own = self.params, _without_nan(logits)
        token = self._draw(_without_nan(self._adjusted(own, history)))
        if params.presence_penalty or params.frequency_penalty:
            self._drawn[token] += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        if params.top_logprobs is not None:
            self.logprobs = log_probabilities(own, token, params.top_logprobs)
        return token

    def _draw(self, logits: NDArray[np.float32]) -> int:
        if self.params.temperature == 0:
            return int(logits.argmax())
        weights = self.weights(logits)
        cumulative = np.cumsum(weights, out=weights)
        total = cumulative[-1]
        drawn = min(self._random.random() * total, np.nextafter(total, 0.0))   # the product may round up to the total
        return int(np.searchsorted(cumulative, drawn, side="right"))   # skips weights of 0

    def weights(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities (vocab_size,) relative to the most likely token's, 0 for tokens that cannot be drawn.

        logits: finite or -inf, penalties applied. Needs a temperature above 0.
        """
        params = self.params
        weights = logits.astype(np.float64)   # modified in place: new memory would cost more than the arithmetic
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

    def _adjusted(
        self, logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """The logits with penalties and bias, -inf where the grammar forbids a token."""
        params, logits = self.params, self._penalized(logits, history)
        if self._drawn:
            logits = _plus(logits, list(self._drawn), [
                -params.presence_penalty - params.frequency_penalty * count for count in self._drawn.values()
            ])
        if params.logit_bias:
            logits = _plus(logits, list(params.logit_bias), list(params.logit_bias.values()))
        if self._constraint is not None:
            logits = np.where(self._constraint.allowed(), logits, np.float32(-np.inf))
        return logits

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


def log_probabilities(logits: NDArray[np.float32], drawn: int, n: int) -> Logprobs:
    """`Logprobs` of the token `drawn` from finite or -inf logits (vocab_size,), with the n likeliest ones."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= math.log(np.exp(values).sum())
    n = min(n, len(values))
    best = np.argpartition(-values, n - 1)[:n] if n else np.zeros(0, np.int64)
    best = best[np.lexsort((best, -values[best]))]   # ties: the lower id first
    return Logprobs(float(values[drawn]), tuple((int(i), float(values[i])) for i in best))


def _plus(logits: NDArray[np.float32], ids: list[int], values: list[float]) -> NDArray[np.float32]:
    """A copy of the logits with these values added at these ids, which are all different."""
    logits = logits.copy()
    logits[ids] += np.array(values, np.float32)
    return logits


def _is_number(value: object, low: float, high: float) -> bool:
    """Whether it is a number from low to high; NaN is not."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and low <= value <= high


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
