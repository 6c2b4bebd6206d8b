"""The engine: token ids in, token ids out, nothing computed twice.

It knows neither text nor files. What the transformer's KV cache holds is known by its ids, so every call computes only
what follows the longest common prefix with them: the next turn of a chat, the next token of a generation, and a
generation that goes on after another one used the cache in between are all the same case.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.errors import BadRequest, Cancelled, ContextOverflow, EdgeMistralError
from edgemistral.generate.sampler import Logprobs, Sampler, SamplingParams

Ids = Sequence[int] | NDArray[np.integer]
Progress = Callable[[int, int], None]   # (done, total) prompt tokens of those that had to be computed
Cancel = Callable[[], bool]             # asked before every chunk and every token: True stops


class Transformer(Protocol):
    """What the engine needs of a model. `length` changes only when a call has done its work."""

    config: ModelConfig
    context: int   # positions the KV cache can hold
    chunk: int     # most tokens of one forward call

    @property
    def length(self) -> int:
        """Positions that the KV cache holds."""

    def forward(self, ids: NDArray[np.int32], n_logits: int) -> NDArray[np.float32]:
        """Append ids (m,) at `length`; logits (n_logits, vocab_size) of the last of them, valid until the next call."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV file now."""

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""

    def close(self) -> None: ...


@dataclass
class Usage:
    """What a generation took so far: counts of tokens, and seconds."""

    prompt_tokens: int
    cached_tokens: int = 0         # of the prompt, already in the KV cache
    new_tokens: int = 0            # given to the caller; </s> is not
    prefill_seconds: float = 0.0   # from the start to the first token
    decode_seconds: float = 0.0    # all tokens after the first

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed per second."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Engine:
    """One transformer and the ids its KV cache holds. Calls from several threads take turns."""

    def __init__(self, transformer: Transformer) -> None:
        self.config, self.context = transformer.config, transformer.context
        self._transformer: Transformer | None = transformer
        self._held = np.empty(self.context, np.int32)   # of these the first transformer.length are in the KV cache
        self._lock = threading.Lock()

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The ids that the KV cache holds, as a copy."""
        with self._lock:
            held: NDArray[np.int32] = self._held[: self._open().length].copy()
            return held

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV file now; answers at once, also while another thread computes."""
        transformer = self._transformer
        return transformer.kv_bytes if transformer is not None else 0

    def prefill(self, ids: Ids, progress: Progress | None = None, cancel: Cancel | None = None) -> NDArray[np.float32]:
        """Make the KV cache hold exactly `ids`; returns the logits (vocab_size,) after the last of them.

        Raises BadRequest, ContextOverflow (before anything is computed) or Cancelled (what was computed stays).
        """
        checked = self._checked(ids)
        with self._lock:
            logits: NDArray[np.float32] = self._extend(checked, progress, cancel)[0].copy()
            return logits

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """Logits (len(ids), vocab_size) at every position. Computes all of them anew: a cached position has none."""
        checked = self._checked(ids)
        with self._lock:
            transformer = self._open()
            transformer.truncate(0)
            logits = np.empty((len(checked), self.config.vocab_size), np.float32)
            for start in range(0, len(checked), transformer.chunk):
                piece = checked[start : start + transformer.chunk]
                self._held[start : start + len(piece)] = piece
                logits[start : start + len(piece)] = transformer.forward(piece, len(piece))
            return logits

    def generate(
        self,
        ids: Ids,
        params: SamplingParams,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Generation:
        """Continue `ids` until </s>, `max_new_tokens` or the end of the context. Nothing is computed before the first
        token is asked for, but what is wrong with the arguments is raised here (see `prefill`)."""
        if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 0):
            message = f"max_new_tokens is {max_new_tokens!r}: it must be a whole number, at least 0"
            raise BadRequest(message, "max_new_tokens")
        params.check_vocabulary(self.config.vocab_size)
        return Generation(self, self._checked(ids), Sampler(params), max_new_tokens, progress, cancel)

    def close(self) -> None:
        """Wait for the call in progress, then free the transformer. Any later call raises EdgeMistralError."""
        with self._lock:
            if self._transformer is not None:
                self._transformer.close()
                self._transformer = None

    def _open(self) -> Transformer:
        if self._transformer is None:
            raise EdgeMistralError("the model is closed")
        return self._transformer

    def _checked(self, ids: Ids) -> NDArray[np.int32]:
        array = check_ids(ids, self.config.vocab_size)
        if len(array) > self.context:
            raise ContextOverflow(len(array), self.context)
        return array

    def _next_token(
        self, history: NDArray[np.int32], sampler: Sampler, progress: Progress | None, cancel: Cancel | None
    ) -> tuple[int, int]:
        """(the token drawn after `history`, how many of its positions were in the KV cache)."""
        with self._lock:
            logits, reused = self._extend(history, progress, cancel)
            return sampler(logits, history), reused

    def _extend(
        self, ids: NDArray[np.int32], progress: Progress | None, cancel: Cancel | None
    ) -> tuple[NDArray[np.float32], int]:
        """`prefill` with the lock held: logits, valid while it is held, and how many positions were reused."""
        transformer = self._open()
        # The last token is always computed, for its logits.
        reused = min(common_prefix(self._held[: transformer.length], ids), len(ids) - 1)
        transformer.truncate(reused)
        for start in range(reused, len(ids), transformer.chunk):
            if cancel is not None and cancel():
                raise Cancelled("stopped as asked")
            end = min(start + transformer.chunk, len(ids))
            # Written first: they count once `length` has grown over them, so an exception in between does no harm.
            self._held[start:end] = ids[start:end]
            logits = transformer.forward(ids[start:end], int(end == len(ids)))
            if progress is not None:
                progress(end - reused, len(ids) - reused)
        return logits[0], reused


class Generation(Iterator[int]):
    """The new tokens of one `Engine.generate`, one computed at each `next`.

    usage: counts and times so far. finish_reason: None until the end, then "stop" (the model gave </s>), "length"
    (max_new_tokens) or "context" (it is full). logprobs: one for each token, if `SamplingParams.top_logprobs` is set.
    It may be dropped, or go on after other calls, at any point: it holds no lock between two tokens.
    """

    def __init__(
        self,
        engine: Engine,
        ids: NDArray[np.int32],
        sampler: Sampler,
        max_new_tokens: int | None,
        progress: Progress | None,
        cancel: Cancel | None,
    ) -> None:
        self.usage = Usage(prompt_tokens=len(ids))
        self.finish_reason: str | None = None
        self.logprobs: list[Logprobs] = []
        self._engine, self._sampler, self._progress, self._cancel = engine, sampler, progress, cancel
        self._max_new_tokens = max_new_tokens
        self._history = np.empty(engine.context + 1, np.int32)   # the last token needs no place in the KV cache
        self._history[: len(ids)] = ids

    def __next__(self) -> int:
        usage, engine = self.usage, self._engine
        length = usage.prompt_tokens + usage.new_tokens
        if self.finish_reason is None and usage.new_tokens == self._max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is None and length > engine.context:
            self.finish_reason = "context"
        if self.finish_reason is not None:
            raise StopIteration
        first, history, started = usage.new_tokens == 0, self._history[:length], time.perf_counter()
        token, reused = engine._next_token(history, self._sampler, self._progress if first else None, self._cancel)
        seconds = time.perf_counter() - started
        if first:
            usage.cached_tokens, usage.prefill_seconds = reused, seconds
        if token in engine.config.end_ids:
            self.finish_reason = "stop"
            raise StopIteration
        if not first:
            usage.decode_seconds += seconds
        self._history[length] = token
        if self._sampler.logprobs is not None:
            self.logprobs.append(self._sampler.logprobs)
        usage.new_tokens += 1
        return token


def check_ids(ids: Ids, vocab_size: int) -> NDArray[np.int32]:
    """Token ids as int32 (n,), n >= 1; BadRequest (field "ids") unless all are whole numbers inside the vocabulary."""
    if len(ids) == 0:
        raise BadRequest("the prompt has no tokens", "ids")
    try:
        array = np.asarray(ids)
    except ValueError:   # nested lists of different lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise BadRequest("token ids must be a flat list of whole numbers", "ids")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(outside):
        at = int(outside[0])
        raise BadRequest(f"token id {array[at]} at position {at} is outside the vocabulary of {vocab_size}", "ids")
    return np.ascontiguousarray(array, np.int32)


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many leading ids two sequences share."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
