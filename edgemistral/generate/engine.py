"""The engine: token ids in, token ids out, nothing computed twice.

It knows neither text nor files. Whatever computes is a `Task`: ids, of which a kept sequence holds a prefix, and something
that takes the logits behind the last of them. One `step` computes rows of several tasks at once: each token that is being
generated, and beside them as much of a waiting prompt as their readers do not notice. No task's bits depend on the others.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.errors import BadRequest, Cancelled, ContextOverflow, EdgeMistralError
from edgemistral.generate.pace import Pace
from edgemistral.generate.sampler import Logprobs, Sampler, SamplingParams
from edgemistral.generate.sequences import KeptSequences, common_prefix
from edgemistral.runtime import segments
from edgemistral.runtime.segments import Row, SegmentPool, segments_of

Ids = Sequence[int] | NDArray[np.integer]
Progress = Callable[[int, int], None]   # (done, total) prompt tokens of those that had to be computed
Cancel = Callable[[], bool]             # asked before every chunk and every token: True stops
WORTH_WAITING = 16                      # tokens of a prefix that another task is about to compute
GATHERING = 0.002                       # seconds to wait for other threads' tasks before a step


class Transformer(Protocol):
    """What the engine needs of a model."""

    config: ModelConfig
    context: int        # the longest sequence
    chunk: int          # most tokens of one step
    pool: SegmentPool

    def step(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Append each row's ids to its sequence, all or none; logits (sum of n_logits, vocab_size), valid until the next."""

    def wait(self) -> None:
        """Until nothing of an interrupted step is at work."""

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
    """One transformer and the sequences that are kept. Threads may share it: their tasks share the steps."""

    def __init__(self, transformer: Transformer) -> None:
        self.config, self.context = transformer.config, transformer.context
        self._transformer: Transformer | None = transformer
        self.end_ids = frozenset({self.config.eos_id})
        self._kept = KeptSequences(transformer.pool)
        self._pace = Pace()
        self._turns = 0
        self._lock = threading.Lock()                # held for a step, and for whatever touches a sequence
        self._demanded = threading.Condition()
        self._demands: dict[Task, int] = {}          # tasks that a thread waits for, and which thread
        self._last: list[tuple[Task, int]] = []      # those of the last step

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The ids of the sequence that was used last, as a copy."""
        with self._lock:
            self._open()
            newest = self._kept.newest
            return newest.ids.copy() if newest is not None else np.zeros(0, np.int32)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV file now; answers at once, also while another thread computes."""
        transformer = self._transformer
        return transformer.pool.file_bytes if transformer is not None else 0

    def prefill(self, ids: Ids, progress: Progress | None = None, cancel: Cancel | None = None) -> NDArray[np.float32]:
        """Make a kept sequence hold `ids`; returns the logits (vocab_size,) after the last of them.

        Raises BadRequest, ContextOverflow (before anything is computed) or Cancelled (what was computed stays).
        """
        task = _LastLogits(self, self._checked(ids), progress, cancel)
        while task.logits is None:
            self.advance(task)
        return task.logits

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """Logits (len(ids), vocab_size) at every position. Computes all of them anew: a cached position has none."""
        task = _AllLogits(self, self._checked(ids))
        while not task.done:
            self.advance(task)
        return task.logits

    def generate(
        self,
        ids: Ids,
        params: SamplingParams,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Generation:
        """Continue `ids` until an end of turn, `max_new_tokens` or the end of the context. Nothing is computed before the first
        token is asked for, but what is wrong with the arguments is raised here (see `prefill`)."""
        if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 0):
            message = f"max_new_tokens is {max_new_tokens!r}: it must be a whole number, at least 0"
            raise BadRequest(message, "max_new_tokens")
        params.check_vocabulary(self.config.vocab_size)
        return Generation(self, self._checked(ids), Sampler(params), max_new_tokens, progress, cancel)

    def advance(self, task: Task) -> None:
        """Bring a task nearer to what it waits for, by a step that tasks of other waiting threads share.

        Raises what stopped the task: Cancelled, or what its sampler or a callback of its own raised.
        """
        news, me = task.news, threading.get_ident()
        with self._demanded:
            self._demands[task] = me
            self._demanded.notify_all()
        try:
            with self._lock:
                if task.news == news and task.error is None:     # else another thread's step has done it
                    self._gather(me)
                    with self._demanded:
                        waiting = dict(self._demands)
                    self._last = list(waiting.items())
                    self._step([one for one in waiting if one.error is None])
        finally:
            with self._demanded:
                self._demands.pop(task, None)
        if task.error is not None:
            raise task.error

    def step(self, tasks: Sequence[Task]) -> None:
        """One step for these tasks. What stops one of them is in its `error`, and no other is disturbed."""
        with self._lock:
            self._step(tasks)

    def close(self) -> None:
        """Wait for the call in progress, then free the transformer. Any later call raises EdgeMistralError."""
        with self._lock:
            if self._transformer is not None:
                self._transformer.wait()
                self._kept.evict_all()
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

    def _gather(self, me: int) -> None:
        """Wait a moment for the threads whose tasks shared the last step: they are about to ask for their next tokens."""
        end = time.monotonic() + GATHERING
        with self._demanded:
            while True:
                missing = [one for one, thread in self._last if thread != me and one not in self._demands and not one.done]
                left = end - time.monotonic()
                if not missing or left <= 0:
                    return
                self._demanded.wait(left)

    def _step(self, tasks: Sequence[Task]) -> None:
        transformer = self._open()
        transformer.wait()
        started = time.perf_counter()
        going = [task for task in tasks if not task.done and not task.stopped()]
        rows = self._compose(transformer, going)
        if not rows:
            return
        try:
            logits = self._compute(transformer, [row for _, row in rows])
        except Exception as error:
            for task, _ in rows:
                task.error = error
            return
        seconds, first = time.perf_counter() - started, 0
        alone = sum(len(row.ids) == 1 for _, row in rows)
        self._pace.note(alone, sum(len(row.ids) for _, row in rows) - alone, seconds)
        for task, row in rows:
            task.take(logits[first : first + row.n_logits], seconds)
            first += row.n_logits
            if task.done and task.sequence is not None:
                self._kept.leave(task.sequence)

    def _compute(self, transformer: Transformer, rows: list[Row]) -> NDArray[np.float32]:
        try:
            return transformer.step(rows)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._kept.evict_all(but=[row.sequence for row in rows])     # the disk is full: what is only kept goes first
            return transformer.step(rows)

    def _compose(self, transformer: Transformer, tasks: Sequence[Task]) -> list[tuple[Task, Row]]:
        """The rows of the next step: one token of every task that generates, and prompts in turn in what is left."""
        in_use = {task.sequence for task in tasks if task.sequence is not None}
        decoding = [task for task in tasks if task.pending == 1]
        prompts = sorted((task for task in tasks if task.pending != 1), key=lambda task: task.turn)
        rows: list[tuple[Task, Row]] = []
        left = transformer.chunk
        for task in (*decoding, *prompts):
            if task.sequence is None and not self._attach(task, tasks, in_use):
                continue
            assert task.sequence is not None
            if task.pending > 1 and decoding:
                left = min(left, self._pace.prompt_tokens)
            n = min(task.pending, left)
            if n == 0 or not self._has_room(task.sequence, n, [row.sequence for _, row in rows]):
                continue
            self._turns += 1
            task.turn = self._turns
            self._kept.touch(task.sequence)
            rows.append((task, task.row(n)))
            left -= n
        return rows

    def _attach(self, task: Task, tasks: Sequence[Task], in_use: set[segments.Sequence]) -> bool:
        """Give a task the kept sequence with the longest prefix of its ids; False: it has to wait."""
        if task.keeps_nothing:
            task.sequence = self._kept.new(task)
        else:
            known = task.history[: task.length - 1]       # the last id is always computed, for its logits
            _, common = self._kept.longest_prefix(known)
            for other in tasks:    # one that is about to compute more of the same prompt
                if other is task or other.sequence is None or other.pending <= 1:
                    continue
                if common_prefix(other.history[: other.length], known) >= common + WORTH_WAITING:
                    return False
            task.sequence = self._kept.take(task, known, in_use)
        in_use.add(task.sequence)
        task.attached()
        return True

    def _has_room(self, sequence: segments.Sequence, n: int, in_step: list[segments.Sequence]) -> bool:
        """Whether a sequence can grow by n positions. Alone it always may: one full context was promised."""
        needed = segments_of(sequence.length + n) - len(sequence.addresses)
        return needed <= 0 or self._kept.make_room(needed, [sequence, *in_step]) or not in_step


class Task:
    """Ids to compute, and what becomes of the logits behind them. `length` ids of `history` are known.

    sequence: what is in the KV cache of them; None when nothing is (yet, or not any more). news: grows whenever the task got
    nearer to its end. error: what stopped it.
    """

    keeps_nothing = False    # compute every position, whatever is kept
    pending_logits = 1       # of the last ids of a row that reaches `length`

    def __init__(self, engine: Engine, ids: NDArray[np.int32], progress: Progress | None, cancel: Cancel | None) -> None:
        self.engine, self.history, self.length = engine, ids, len(ids)
        self.sequence: segments.Sequence | None = None
        self.error: BaseException | None = None
        self.news = self.turn = 0
        self.done = False
        self.cached_tokens: int | None = None
        self._progress, self._cancel, self._prompt = progress, cancel, len(ids)

    @property
    def pending(self) -> int:
        """Ids that are still to be computed, at least; 0 before anything is known of it."""
        return self.length - self.sequence.length if self.sequence is not None else 0

    def attached(self) -> None:
        """The sequence is there, for the first time or again."""
        assert self.sequence is not None
        if self.cached_tokens is None:
            self.cached_tokens = self.sequence.length

    def stopped(self) -> bool:
        """Whether the caller has asked to stop."""
        try:
            if self.error is None and self._cancel is not None and self._cancel():
                self.error = Cancelled("stopped as asked")
        except BaseException as error:
            self.error = error
        return self.error is not None

    def row(self, n: int) -> Row:
        """The next n ids."""
        assert self.sequence is not None
        start = self.sequence.length
        return Row(self.sequence, self.history[start : start + n], int(start + n == self.length))

    def take(self, logits: NDArray[np.float32], seconds: float) -> None:
        """The row was computed; logits (n_logits, vocab_size) are valid during the call."""
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


class _LastLogits(Task):
    """For `Engine.prefill`."""

    logits: NDArray[np.float32] | None = None

    def _receive(self, logits: NDArray[np.float32], seconds: float) -> None:
        if len(logits):
            self.logits, self.done = logits[0].copy(), True


class _AllLogits(Task):
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


class Generation(Task, Iterator[int]):
    """The new tokens of one `Engine.generate`, one at each `next`.

    usage: counts and times so far. finish_reason: None until the end, then "stop" (the model ended its turn), "length"
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
        history = np.empty(engine.context + 1, np.int32)     # the last token needs no place in the KV cache
        history[: len(ids)] = ids
        super().__init__(engine, history, progress, cancel)
        self.length = self._prompt = len(ids)
        self.usage = Usage(prompt_tokens=len(ids))
        self.logprobs: list[Logprobs] = []
        self._sampler, self._max_new_tokens = sampler, max_new_tokens
        self._ready: deque[int] = deque()
        self._end: str | None = None
        self._finished = False
        self._check_length()

    @property
    def finish_reason(self) -> str | None:
        return self._end if self._finished else None

    @property
    def ready(self) -> bool:
        """Whether `next` has an answer without computing: a token, the end, or an error."""
        return bool(self._ready) or self.done or self.error is not None

    def __next__(self) -> int:
        while not self._ready:
            if self.error is not None:
                raise self.error
            if self.done:
                self._finished = True
                raise StopIteration
            self.engine.advance(self)
        self.usage.new_tokens += 1
        return self._ready.popleft()

    def attached(self) -> None:
        super().attached()
        self.usage.cached_tokens = self.cached_tokens or 0

    def _receive(self, logits: NDArray[np.float32], seconds: float) -> None:
        first = self.length == self.usage.prompt_tokens
        if first:
            self.usage.prefill_seconds += seconds
        if not len(logits):
            return
        token = self._sampler(logits[0], self.history[: self.length])
        if token in self.engine.end_ids:
            self._end, self.done = "stop", True
            return
        if not first:
            self.usage.decode_seconds += seconds
        if self._sampler.logprobs is not None:
            self.logprobs.append(self._sampler.logprobs)
        self.history[self.length] = token
        self.length += 1
        self._ready.append(token)
        self._check_length()

    def _check_length(self) -> None:
        if self.length - self.usage.prompt_tokens == self._max_new_tokens:
            self._end, self.done = "length", True
        elif self.length > self.engine.context:
            self._end, self.done = "context", True


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
