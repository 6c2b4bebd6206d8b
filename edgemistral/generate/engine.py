"""The engine: token ids in, token ids out, nothing computed twice.

It does not handle text or files. All work is a `Task`: ids, a prefix of which is in a kept sequence, and a consumer of the
logits after the last id. One `step` computes rows of several tasks at once: the next token of each generation, and as much
of a waiting prompt as does not slow the readers too much. The bits of a task do not depend on other tasks.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.errors import BadRequest, ContextOverflow, EdgeMistralError
from edgemistral.files.kv_store import KVStore
from edgemistral.generate.ids import Ids, check_ids
from edgemistral.generate.pace import Duty, Pace
from edgemistral.generate.sampler import Logprobs, Sampler, SamplingParams
from edgemistral.generate.sequences import KeptSequences, common_prefix
from edgemistral.generate.tasks import AllLogits, Cancel, Counts, Generation, LastLogits, Progress, PromptLogprobs, Task
from edgemistral.runtime import segments
from edgemistral.runtime.kv_store import StoredPrefixes
from edgemistral.runtime.segments import Row, SegmentPool, segments_of

Pinned = TypeVar("Pinned", bound=segments.Sequence)
WORTH_WAITING = 16                      # tokens of a prefix that another task is about to compute
MOST_DECODED = 8                        # tokens of a step that only decodes: with more, computing takes longer than memory
GATHERING = 0.002                       # seconds to wait for other threads' tasks before a step
RESTING = 0.02                          # seconds between two checks whether a rest may end


class Transformer(Protocol):
    """What the engine needs of a model."""

    config: ModelConfig
    context: int        # the longest sequence
    chunk: int          # most tokens of one step
    step_sizes: Sequence[int]   # numbers of tokens that fill whole tiles, ascending
    max_rows: int       # of one step
    pool: SegmentPool

    def step(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Append the ids of all rows, or of none; logits (sum of n_logits, vocab_size), valid until the next call."""

    def wait(self) -> None:
        """Wait until no thread works on an interrupted step."""

    def close(self) -> None: ...


class Engine:
    """One transformer and the sequences that are kept. Threads may share it: their tasks share the steps."""

    def __init__(self, transformer: Transformer, lookup: bool = True) -> None:
        """lookup: guess tokens from earlier text and verify several in one step; the answers are the same."""
        self.config, self.context = transformer.config, transformer.context
        self._transformer: Transformer | None = transformer
        self.end_ids = frozenset({self.config.eos_id})
        self._kept = KeptSequences(transformer.pool)
        self._pace, self._lookup, self.duty = Pace(transformer.step_sizes), lookup, Duty()
        self.counts = Counts()
        self._store: StoredPrefixes | None = None
        self._turns = 0
        self._lock = threading.Lock()                # held for a step, and for every access to a sequence
        self._demanded = threading.Condition()
        self._demands: dict[Task, int] = {}          # tasks that a thread waits for, and the thread
        self._last: list[tuple[Task, int]] = []      # the same for the last step

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The ids of the sequence that was used last, as a copy."""
        with self._lock:
            self._open()
            newest = self._kept.newest
            return newest.ids.copy() if newest is not None else np.zeros(0, np.int32)

    @property
    def kv_bytes(self) -> int:
        """Bytes that the KV cache takes on the disk now. Returns at once, even while another thread computes."""
        transformer = self._transformer
        return transformer.pool.file_bytes if transformer is not None else 0

    def prefill(self, ids: Ids, progress: Progress | None = None, cancel: Cancel | None = None) -> NDArray[np.float32]:
        """Make a kept sequence hold `ids`; returns the logits (vocab_size,) after the last of them.

        Raises BadRequest, ContextOverflow (before anything is computed) or Cancelled (what was computed stays).
        """
        task = LastLogits(self, self._checked(ids), progress, cancel)
        while task.logits is None:
            self.advance(task)
        return task.logits

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """Logits (len(ids), vocab_size) at every position. Computes every position again: the cache holds no logits."""
        task = AllLogits(self, self._checked(ids))
        while not task.done:
            self.advance(task)
        return task.logits

    def prompt_logprobs(self, ids: Ids, top: int) -> list[Logprobs | None]:
        """`Logprobs` of each of `ids` given those before it, with the `top` likeliest ids there; None for the first."""
        task = self.score(ids, top)
        while not task.done:
            self.advance(task)
        return task.logprobs

    def score(self, ids: Ids, top: int) -> PromptLogprobs:
        """The task of `prompt_logprobs`, for `step`. Nothing is computed yet."""
        return PromptLogprobs(self, self._checked(ids), top)

    def generate(
        self,
        ids: Ids,
        params: SamplingParams,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
        home: segments.Sequence | None = None,
    ) -> Generation:
        """Continue `ids` until an end of turn, `max_new_tokens` or the end of the context. Nothing is computed before the first
        token is requested; errors in the arguments are raised here (see `prefill`).

        home: the pinned sequence that will hold all ids.
        """
        if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 0):
            message = f"max_new_tokens is {max_new_tokens!r}: it must be a whole number, at least 0"
            raise BadRequest(message, "max_new_tokens")
        params.check_vocabulary(self.config.vocab_size)
        made = Generation(self, self._checked(ids), Sampler(params), max_new_tokens, progress, cancel)
        made.home = home
        return made

    def pin(self, make: Callable[[SegmentPool], Pinned]) -> Pinned:
        """Keep the sequence that `make` returns until `unpin`: it is never evicted."""
        with self._lock:
            self._open().wait()
            made = make(self._open().pool)
            self._kept.pin(made)
            return made

    def unpin(self, sequence: segments.Sequence) -> None:
        """Close a pinned sequence, after its `save`. Generations that write to it continue in another sequence."""
        with self._lock:
            if self._transformer is None or not self._kept.is_pinned(sequence):
                return
            self._transformer.wait()
            self._close_pinned(sequence)

    def writes_to(self, sequence: segments.Sequence) -> bool:
        """Whether a generation writes to a pinned sequence now."""
        with self._lock:
            return self._kept.is_written(sequence)

    @property
    def sessions_over_budget(self) -> bool:
        """Whether the pinned sequences alone need more than the pool's budget."""
        with self._lock:
            return sum(len(one.segments) for one in self._kept.pinned) > self._open().pool.capacity

    def save(self, sequence: segments.Sequence, notes: str | None = None, length: int | None = None) -> None:
        """Save a pinned sequence; if given, with these notes and cut to this length. SessionFailed: it cannot be saved."""
        with self._lock:
            self._open().wait()
            if not self._kept.is_pinned(sequence):
                raise EdgeMistralError("the session is closed")
            if length is not None and length < sequence.length:
                self._kept.cut_home(sequence, length)
            sequence.save(notes)

    def advance(self, task: Task) -> None:
        """Advance a task by one step, which it shares with the tasks of other waiting threads.

        Raises the error that stopped the task: Cancelled, or an exception of its sampler or callback.
        """
        news, me = task.news, threading.get_ident()
        with self._demanded:
            self._demands[task] = me
            self._demanded.notify_all()
        try:
            with self._rested(lambda: task.news > news or task.cancelled):
                if task.news == news and task.error is None:     # otherwise another thread's step advanced it
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
        """One step for these tasks. An error of one task is put in its `error`; the other tasks continue."""
        with self._rested(lambda: all(task.cancelled for task in tasks)):
            self._step(tasks)

    @contextlib.contextmanager
    def _rested(self, over: Callable[[], bool]) -> Iterator[None]:
        """Wait until the rest that `duty` asks for after a step is over, or `over` returns True; then hold the lock.

        The lock is free during the rest, so saving and closing do not wait.
        """
        while True:
            while (left := self.duty.left()) > 0 and self._transformer is not None and not over():
                time.sleep(min(left, RESTING))
            with self._lock:
                if self.duty.left() <= 0 or self._transformer is None or over():
                    yield
                    return

    def close(self) -> None:
        """Wait for the call in progress, then free the transformer. Any later call raises EdgeMistralError."""
        if self._store is not None:
            self._store.close()
        with self._lock:
            if self._transformer is not None:
                self._transformer.wait()
                for sequence in self._kept.pinned:
                    with contextlib.suppress(EdgeMistralError):      # the last save stays valid
                        self._close_pinned(sequence)
                self._kept.evict_all()
                self._transformer.close()
                self._transformer = None

    def use_store(self, store: KVStore) -> None:
        """Look for prefixes in a store, and store there what is computed."""
        self._store = StoredPrefixes(store, self._release)

    def _release(self, segment: segments.Segment) -> None:
        with self._lock:
            if self._transformer is not None:
                self._transformer.pool.release(segment)

    def _close_pinned(self, sequence: segments.Sequence) -> None:
        try:
            sequence.save()
        finally:
            self._kept.unpin(sequence)
            sequence.close()

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
        """Wait a moment for the threads whose tasks shared the last step: they will soon request their next tokens."""
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
        decoded = sum(len(row.ids) for _, row in rows if row.n_logits == len(row.ids))
        prompt = sum(len(row.ids) for _, row in rows) - decoded
        self._pace.note(decoded, prompt, seconds)
        self.duty.note(seconds)
        self.counts.add(decoded, prompt, seconds)
        for task, row in rows:
            task.take(logits[first : first + row.n_logits], seconds)
            first += row.n_logits
            if self._store is not None and task.sequence is not None:
                self._store.offer(task.sequence)
            if task.done and task.sequence is not None:
                self._kept.leave(task.sequence)
                self._save(task)

    def _save(self, task: Task) -> None:
        """Save at the end of a turn. A disk error is reported by the next turn or `save`."""
        if task.sequence is not None and task.sequence.pinned:
            with contextlib.suppress(EdgeMistralError):
                task.sequence.save()

    def _compute(self, transformer: Transformer, rows: list[Row]) -> NDArray[np.float32]:
        try:
            return transformer.step(rows)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._kept.evict_all(but=[row.sequence for row in rows])     # the disk is full: evict what no row uses
            return transformer.step(rows)

    def _compose(self, transformer: Transformer, tasks: Sequence[Task]) -> list[tuple[Task, Row]]:
        """The rows of the next step: one token of every generation, then prompts in turn in the remaining room."""
        in_use = {task.sequence for task in tasks if task.sequence is not None}
        decoding = sorted((task for task in tasks if task.pending == 1), key=lambda task: task.turn)
        prompts = sorted((task for task in tasks if task.pending != 1), key=lambda task: task.turn)
        rows: list[tuple[Task, Row]] = []
        left, guesses = self.duty.most(transformer.chunk), 0 if prompts or not self._lookup else MOST_DECODED - len(decoding)
        others = len(decoding) - 1   # tokens of the step beside the one of a generation that guesses
        share: int | None = None     # prompt tokens that a step with readers may have
        promised = 0                 # segments that the rows will take
        for task in (*decoding, *prompts):
            if len(rows) == transformer.max_rows:
                break                                 # the other tasks come first in the next step
            task.guessed = ()
            if task.sequence is None and not self._attach(task, tasks, in_use):
                continue
            assert task.sequence is not None
            if task.pending > 1 and decoding and share is None:
                share = self._pace.prompt_tokens(len(rows))
                left = min(left, share)
            if task.pending == 1 and guesses > 0:
                guessed = task.guess(guesses, self._pace, others)
                guesses, others = guesses - guessed, others + guessed
            n = min(task.pending, left)
            needed = max(0, segments_of(task.sequence.length + n + len(task.guessed)) - len(task.sequence.addresses))
            if n == 0 or not self._has_room(task.sequence, needed, promised, [row.sequence for _, row in rows]):
                continue
            promised += needed
            if task.sequence.pinned and not self._reserve(task, task.sequence.length + n + len(task.guessed)):
                continue
            self._turns += 1
            task.turn = self._turns
            self._kept.touch(task.sequence)
            rows.append((task, task.row(n)))
            left -= len(rows[-1][1].ids)
        return rows

    def _attach(self, task: Task, tasks: Sequence[Task], in_use: set[segments.Sequence]) -> bool:
        """Give a task the kept sequence with the longest prefix of its ids; False: it has to wait."""
        if task.keeps_nothing:
            task.sequence = self._kept.new(task)
        else:
            known = task.history[: task.length - 1]       # the last id is always computed, for its logits
            self._restore(known, in_use)
            _, common = self._kept.longest_prefix(known)
            for other in tasks:    # wait for a task that is about to compute more of the same prompt
                if other is task or other.sequence is None or other.pending <= 1:
                    continue
                if common_prefix(other.history[: other.length], known) >= common + WORTH_WAITING:
                    return False
            if task.home is not None and self._kept.is_pinned(task.home):
                try:
                    if not self._kept.take_home(task, task.home, known, tasks, in_use):
                        return False
                except (OSError, EdgeMistralError) as error:
                    task.error = error
                    return False
                task.sequence = task.home
            else:
                task.sequence = self._kept.take(task, known, in_use)
        in_use.add(task.sequence)
        task.attached()
        return True

    def _restore(self, ids: NDArray[np.int32], in_use: set[segments.Sequence]) -> None:
        """Load the stored prefix of a prompt, if it is longer than that of any sequence and there is room."""
        if self._store is None:
            return
        _, common = self._kept.longest_prefix(ids)
        stored = self._store.known(ids)
        if stored < common + WORTH_WAITING or not self._kept.make_room(segments_of(stored), in_use):
            return
        self._kept.add(self._store.restore(self._open().pool, ids[:stored]))

    def _reserve(self, task: Task, length: int) -> bool:
        """Make room in a session's file. False: it cannot grow; only this task stops."""
        assert task.sequence is not None
        try:
            task.sequence.reserve(length)
        except EdgeMistralError as error:
            task.error = error
        return task.error is None

    def _has_room(self, sequence: segments.Sequence, needed: int, promised: int, in_step: list[segments.Sequence]) -> bool:
        """Whether there are `needed` more segments, besides those promised. A sequence alone in a step always has room."""
        return not needed or self._kept.make_room(promised + needed, [sequence, *in_step]) or not in_step
