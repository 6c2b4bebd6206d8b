"""Many clients, one thread that computes: a bounded queue in which the clients take turns.

An event loop handles the requests. A `Job` carries a request's work to the compute thread, and the events back to the loop.
The compute thread writes up to `parallel` answers at once: each step computes one token of each. It never waits for a slow
reader: events collect in the job (never more than its answers) until the loop takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgemistral.errors import Cancelled, EdgeMistralError
from edgemistral.generate.tasks import Task

HAND_OVER = 0.003   # seconds; a reader needs half a millisecond


class Answer(Protocol):
    """One answer of a job, for the compute thread."""

    @property
    def task(self) -> Task: ...

    @property
    def ready(self) -> bool:
        """Whether something can be delivered without another step."""

    def deliver(self) -> bool:
        """Emit what is ready, without computing; True if the answer is complete. An exception ends the job."""


class Unavailable(EdgeMistralError):
    """No work is accepted now; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Unavailable):
    """Too many requests are waiting already."""


@dataclass(frozen=True)
class Progress:
    """How many of the prompt's tokens are computed. total: those that were not in the cache."""

    done: int
    total: int


class Job:
    """One request's work. Create it on the event loop; the compute thread calls `emit` and `cancelled`.

    id: for `Scheduler.cancel`. client: whose turn it takes.
    """

    def __init__(self, job_id: str, client: str, echoed: str | None = None) -> None:
        """echoed: the client's name for the request; it is only sent back."""
        self.id, self.client, self.echoed = job_id, client, echoed or job_id
        self.ended = False                       # no event follows
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._taken = threading.Event()          # the reader has passed on what it got, and waits for more
        self._lock = threading.Lock()
        self._events: list[Any] = []
        self._error: BaseException | None = None
        self._reason: EdgeMistralError | None = None

    def cancelled(self) -> bool:
        """Whether to stop; checked before every chunk of a prompt and every token."""
        return self._reason is not None

    def emit(self, event: Any) -> None:
        """Send an event to the loop."""
        with self._lock:
            self._events.append(event)
            first = len(self._events) == 1
        if first:   # otherwise the loop was already woken and has not taken the events yet
            self._tell()

    def hand_over(self, event: Any) -> None:
        """`emit`, then wait until the reader has passed the event on, for HAND_OVER seconds at most.

        Without the wait, the threads that compute occupy every core, and the reader waits for a time slice.
        """
        self._taken.clear()
        self.emit(event)
        self._taken.wait(HAND_OVER)

    def progress(self, done: int, total: int) -> None:
        """The engine's `progress` callback: an event after each chunk of a long prompt."""
        if done < total:
            self.emit(Progress(done, total))

    def end(self, error: BaseException | None = None) -> None:
        """No event follows. The reader gets the error, or the reason why the job was cancelled."""
        self._error, self.ended = self._reason or error, True
        self._tell()

    async def batches(self, tick: float) -> AsyncIterator[list[Any]]:
        """Lists of all events that have arrived; an empty list after `tick` seconds without any."""
        while True:
            timer = self._loop.call_later(tick, self._arrived.set)
            await self._arrived.wait()
            timer.cancel()
            self._arrived.clear()
            ended = self.ended   # read before taking the events: all events before the end are then included
            with self._lock:
                events, self._events = self._events, []
            if events or not ended:
                yield events
            self._taken.set()
            if ended:
                if self._error is not None:
                    raise self._error
                return

    def cancel_for(self, reason: EdgeMistralError) -> None:
        """For the scheduler: `cancelled` is true from now on."""
        self._reason = self._reason or reason

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):   # the loop is closed: there is no reader
            self._loop.call_soon_threadsafe(self._arrived.set)


class Scheduler:
    """The queue and the compute thread, which starts with the first job. Methods return at once; any thread may call them.

    capacity: jobs that may wait; one client may have half of the places. parallel: answers written at the same time.
    """

    def __init__(self, capacity: int = 128, parallel: int = 4) -> None:
        self.capacity, self.parallel = capacity, parallel
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, deque[tuple[Job, deque[Answer]]]] = OrderedDict()   # the next client comes first
        self._jobs: dict[str, Job] = {}
        self._active: list[_Active] = []
        self._closed: EdgeMistralError | None = None
        self._thread: threading.Thread | None = None
        self._seconds = 1.0   # average time of an answer

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> bool:
        """Whether the compute thread is at work."""
        return bool(self._active)

    def check(self, job: Job) -> None:
        """Raise what `submit` would raise now: QueueFull, or the reason given to `close`."""
        with self._changed:
            if self._closed is not None:
                raise self._closed
            waiting, own = self.waiting, self._waiting.get(job.client, ())
            if waiting >= self.capacity or len(own) >= max(1, self.capacity // 2):
                seconds = max(1, min(60, round(self._seconds * waiting)))
                raise QueueFull(f"{waiting} requests are waiting already", seconds)

    def submit(self, job: Job, answers: Sequence[Answer]) -> None:
        """Put a job into the queue; raises as `check` does."""
        with self._changed:
            self.check(job)
            self._jobs[job.id] = job
            self._waiting.setdefault(job.client, deque()).append((job, deque(answers)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="edgemistral-compute", daemon=True)
                self._thread.start()
            self._changed.notify()

    def cancel(self, job_id: str) -> bool:
        """Stop the job with this id before its next token or chunk, or at once if it waits; False if there is none."""
        with self._changed:
            job = self._jobs.get(job_id)
            return job is not None and self.stop(job)

    def stop(self, job: Job, reason: EdgeMistralError | None = None) -> bool:
        """`cancel`, by the job itself."""
        with self._changed:
            if self._jobs.get(job.id) is not job:
                return False
            job.cancel_for(reason or Cancelled("the request was cancelled"))
            if not self._is_active(job):
                self._end(job)
            return True

    def close(self, reason: EdgeMistralError, grace: float = 0.0) -> None:
        """Accept no more jobs. Cancel waiting jobs now, and active jobs after `grace` seconds."""
        with self._changed:
            self._closed = reason
            active = [job for job in self._jobs.values() if self._is_active(job)]
            for job in list(self._jobs.values()):
                if job not in active:
                    self.stop(job, reason)
            self._changed.notify()
        for job in active:
            timer = threading.Timer(grace, self.stop, (job, reason))
            timer.daemon = True
            timer.start()

    def join(self, timeout: float) -> bool:
        """After `close`: wait for the compute thread; False if it is still at work after `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def _is_active(self, job: Job) -> bool:
        return any(one.job is job for one in self._active)

    def _is_waiting(self, job: Job) -> bool:
        return any(waiting is job for waiting, _ in self._waiting.get(job.client, ()))

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        """Remove a job and end it."""
        if self._jobs.pop(job.id, None) is None:
            return
        self._active = [one for one in self._active if one.job is not job]
        jobs = deque(entry for entry in self._waiting.get(job.client, ()) if entry[0] is not job)
        if jobs:
            self._waiting[job.client] = jobs
        else:
            self._waiting.pop(job.client, None)
        job.end(error)

    def _admit(self) -> None:
        """Begin answers while there is room: the clients take turns, and each client's jobs keep their order."""
        while self._waiting and len(self._active) < self.parallel:
            client, jobs = next(iter(self._waiting.items()))
            job, answers = jobs[0]
            if answers:
                self._active.append(_Active(job, answers.popleft(), time.monotonic()))
            if not answers:
                jobs.popleft()
            if jobs:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
            if not answers and not self._is_active(job):     # a job without answers
                self._end(job)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._active:
                    if self._closed is not None:
                        return
                    self._changed.wait()
                self._admit()
                active = list(self._active)
            self._step(active)

    def _step(self, active: list[_Active]) -> None:
        """Compute one token of every answer, or more of its prompt."""
        failure: BaseException | None = None
        going = [one.answer.task for one in active if not one.job.cancelled() and not one.answer.ready]
        try:
            if going:
                going[0].engine.step(going)
        except BaseException as problem:
            failure = problem
        for one in active:
            error, whole = failure, False
            if error is None and not one.job.cancelled():
                try:
                    whole = one.answer.deliver()
                except BaseException as problem:
                    error = problem
            with self._changed:
                if error is not None or one.job.cancelled():
                    self._end(one.job, error)
                elif whole and one in self._active:
                    self._seconds += 0.2 * (time.monotonic() - one.since - self._seconds)
                    self._active.remove(one)
                    if not self._is_active(one.job) and not self._is_waiting(one.job):
                        self._end(one.job)


@dataclass(frozen=True, eq=False)
class _Active:
    """An answer that is being written."""

    job: Job
    answer: Answer
    since: float
