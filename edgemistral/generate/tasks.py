"""The tasks of an engine's steps: the logits of a prompt, or the tokens of a generation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import Cancelled
from edgemistral.generate.lookup import Lookup
from edgemistral.generate.pace import Pace
from edgemistral.generate.sampler import Logprobs, Sampler, log_probabilities
from edgemistral.runtime.segments import Row, Sequence

if TYPE_CHECKING:
    from edgemistral.generate.engine import Engine

Progress = Callable[[int, int], None]   # (done, total) prompt tokens of those that had to be computed
Cancel = Callable[[], bool]             # called before every chunk and every token; True stops


@dataclass
class Usage:
    """Counts of tokens and seconds of a generation so far."""

    prompt_tokens: int
    cached_tokens: int = 0         # of the prompt, already in the KV cache
    new_tokens: int = 0            # given to the caller, without </s>
    guessed_tokens: int = 0        # by prompt lookup, verified in the same step as another token
    accepted_tokens: int = 0       # guesses that were right
    dropped_messages: tuple[int, ...] = ()   # numbers of messages left out of a conversation that is too long
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


@dataclass
class Counts:
    """What an engine has computed so far."""

    prompt_tokens: int = 0         # computed, without those from the cache
    decoded_tokens: int = 0        # of generations, with wrong guesses
    steps: int = 0
    seconds: float = 0.0           # of computing

    def add(self, decoded: int, prompt: int, seconds: float) -> None:
        self.decoded_tokens += decoded
        self.prompt_tokens += prompt
        self.steps += 1
        self.seconds += seconds


class Task:
    """Ids to compute, and a consumer of the logits after them. `length` ids of `history` are known.

    sequence: the part of them in the KV cache; None if there is none (yet, or after an eviction). home: the pinned sequence
    to use while it is kept; None for any. news: a counter of the task's progress. error: what stopped it.
    """

    keeps_nothing = False            # compute every position, and use nothing that is kept
    guessed: tuple[int, ...] = ()    # ids that may follow `history`, to be verified in the next row

    def __init__(self, engine: Engine, ids: NDArray[np.int32], progress: Progress | None, cancel: Cancel | None) -> None:
        self.engine, self.history, self.length = engine, ids, len(ids)
        self.sequence: Sequence | None = None
        self.home: Sequence | None = None
        self.error: BaseException | None = None
        self.news = self.turn = 0
        self.done = self.cancelled = False
        self.cached_tokens: int | None = None
        self._progress, self._cancel, self._prompt = progress, cancel, len(ids)

    @property
    def pending(self) -> int:
        """How many ids must still be computed, at least; 0 while the task has no sequence."""
        return self.length - self.sequence.length if self.sequence is not None else 0

    def attached(self) -> None:
        """Called when the task has got a sequence, for the first time or again."""
        assert self.sequence is not None
        if self.cached_tokens is None:
            self.cached_tokens = self.sequence.length

    def cancel(self) -> None:
        """Stop before the next step; from any thread. What was computed stays valid."""
        self.cancelled = True      # nothing else: another thread's step may work on this task

    def stopped(self) -> bool:
        """Whether the caller has asked to stop."""
        try:
            if self.error is None and (self.cancelled or (self._cancel is not None and self._cancel())):
                self.error = Cancelled("stopped as asked")
        except BaseException as error:
            self.error = error
        return self.error is not None

    def guess(self, most: int, pace: Pace, others: int) -> int:
        """Set `guessed` to at most `most` ids; returns how many. others: further tokens of the step, see `Lookup.guess`."""
        return 0

    def row(self, n: int) -> Row:
        """The next n ids, and the guessed ids after them."""
        assert self.sequence is not None
        start = self.sequence.length
        return Row(self.sequence, self.history[start : start + n], int(start + n == self.length))

    def take(self, logits: NDArray[np.float32], seconds: float) -> None:
        """Called when the row is computed; logits (n_logits, vocab_size) are valid during the call."""
        self.news += 1
        try:
            self._report()
            self._receive(logits, seconds)
        except BaseException as error:
            self.error = error

    def _report(self) -> None:
        if self._progress is None or self.sequence is None or self.cached_tokens is None:
            return
        if self.cached_tokens < self.sequence.length <= self._prompt:
            self._progress(self.sequence.length - self.cached_tokens, self._prompt - self.cached_tokens)

    def _receive(self, logits: NDArray[np.float32], seconds: float) -> None:
        raise NotImplementedError


class LastLogits(Task):
    """For `Engine.prefill`."""

    logits: NDArray[np.float32] | None = None

    def _receive(self, logits: NDArray[np.float32], seconds: float) -> None:
        if len(logits):
            self.logits, self.done = logits[0].copy(), True


class AllLogits(Task):
    """For `Engine.logits`."""

    keeps_nothing = True

    def __init__(self, engine: Engine, ids: NDArray[np.int32]) -> None:
        super().__init__(engine, ids, None, None)
        self.logits = np.empty((len(ids), engine.config.vocab_size), np.float32)

    def row(self, n: int) -> Row:
        return super().row(n)._replace(n_logits=n)

    def _receive(self, logits: NDArray[np.float32], seconds: float) -> None:
        assert self.sequence is not None
        end = self.sequence.length
        self.logits[end - len(logits) : end] = logits
        self.done = end == self.length


class PromptLogprobs(Task):
    """For `Engine.prompt_logprobs`: keeps only the requested values of each position."""

    keeps_nothing = True

    def __init__(self, engine: Engine, ids: NDArray[np.int32], top: int) -> None:
        super().__init__(engine, ids, None, None)
        self.logprobs: list[Logprobs | None] = [None]
        self._top = top

    def row(self, n: int) -> Row:
        return super().row(n)._replace(n_logits=n)

    def _receive(self, logits: NDArray[np.float32], seconds: float) -> None:
        for row in logits:
            if len(self.logprobs) < self.length:
                self.logprobs.append(log_probabilities(row, int(self.history[len(self.logprobs)]), self._top))
        assert self.sequence is not None
        self.done = self.sequence.length == self.length


class Generation(Task, Iterator[int]):
    """The new tokens of one `Engine.generate`, one at each `next`.

    usage: counts and times so far. finish_reason: None until the end, then "stop" (the model ended its turn), "length"
    (max_new_tokens), "context" (it is full) or "cancelled" (`cancel` ends it without an error). logprobs: one for each
    token, if `SamplingParams.top_logprobs` is set.
    It may be deleted, or continued after other calls, at any point: it holds no lock between two tokens.
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
        history = np.empty(engine.context + 1, np.int32)     # the last token needs no place in the KV cache
        history[: len(ids)] = ids
        super().__init__(engine, history, progress, cancel)
        self.length = self._prompt = len(ids)
        self.usage = Usage(prompt_tokens=len(ids))
        self.logprobs: list[Logprobs] = []
        self._sampler, self._max_new_tokens = sampler, max_new_tokens
        self._lookup: Lookup | None = None
        self._ready: deque[int] = deque()
        self._end: str | None = None
        self._finished: str | None = None
        self._check_length()

    @property
    def finish_reason(self) -> str | None:
        return self._finished

    @property
    def ready(self) -> bool:
        """Whether `next` has an answer without computing: a token, the end, or an error."""
        return bool(self._ready) or self.done or self.cancelled or self.error is not None

    def __next__(self) -> int:
        while not self._ready or self.cancelled:
            if self.cancelled and self._finished is None:
                self._finished = "cancelled"
                self.stopped()                        # its sequence becomes free for others
            if self._finished is None and self.error is not None:
                raise self.error
            if self.done:
                self._finished = self._finished or self._end
            if self._finished is not None:
                raise StopIteration
            try:
                self.engine.advance(self)
            except Cancelled:
                if not self.cancelled:
                    raise
        self.usage.new_tokens += 1
        return self._ready.popleft()

    def attached(self) -> None:
        super().attached()
        self.usage.cached_tokens = self.cached_tokens or 0

    def guess(self, most: int, pace: Pace, others: int) -> int:
        if self._lookup is None:
            self._lookup = Lookup(self.history, self.usage.prompt_tokens)
        most = min(most, self.engine.context - self.length)
        if self._max_new_tokens is not None:
            most = min(most, self._max_new_tokens - (self.length - self.usage.prompt_tokens) - 1)
        self.guessed = self._lookup.guess(self.history[: self.length], most, pace, others)
        return len(self.guessed)

    def row(self, n: int) -> Row:
        row = super().row(n)
        if not self.guessed:
            return row
        return row._replace(ids=np.array([*row.ids, *self.guessed], np.int32), n_logits=1 + len(self.guessed))

    def _receive(self, logits: NDArray[np.float32], seconds: float) -> None:
        """Draw a token after each position in turn, as long as it equals the guess."""
        guessed, self.guessed = self.guessed, ()
        if self.length == self.usage.prompt_tokens:
            self.usage.prefill_seconds += seconds
        else:
            self.usage.decode_seconds += seconds
        accepted = 0
        for at in range(len(logits)):
            token = self._draw(logits[at])
            if self.done or at == len(guessed) or token != guessed[at]:
                break
            accepted += 1
        if guessed and self._lookup is not None and self.sequence is not None:
            self.sequence.cut(self.sequence.length - len(guessed) + accepted)
            self._lookup.learn(len(guessed), accepted)
            self.usage.guessed_tokens += len(guessed)
            self.usage.accepted_tokens += accepted

    def _draw(self, logits: NDArray[np.float32]) -> int:
        """The next token, which may end the generation."""
        params = self._sampler.params
        ends = self.engine.end_ids | params.stop_token_ids
        if self.length - self.usage.prompt_tokens < params.min_tokens:
            logits = logits.copy()
            logits[list(ends)] = -np.inf
        token = self._sampler(logits, self.history[: self.length])
        if token in ends:
            self._end, self.done = "stop", True
            return token
        if self._sampler.logprobs is not None:
            self.logprobs.append(self._sampler.logprobs)
        self.history[self.length] = token
        self.length += 1
        self._ready.append(token)
        self._check_length()
        return token

    def _check_length(self) -> None:
        if self.length - self.usage.prompt_tokens == self._max_new_tokens:
            self._end, self.done = "length", True
        elif self.length > self.engine.context:
            self._end, self.done = "context", True
