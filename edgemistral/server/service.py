"""Shared by the endpoints: the model (or its loading), the queue, the host's review, and the events of answers."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import secrets
import threading
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request

from edgemistral.errors import BadRequest, Cancelled, EdgeMistralError
from edgemistral.generate.grammar import GrammarCompiler
from edgemistral.generate.sampler import Logprobs
from edgemistral.generate.tasks import Task, Usage
from edgemistral.model import Model, Reply
from edgemistral.server.metrics import Metrics
from edgemistral.server.scheduler import Job, Progress, Scheduler, Unavailable
from edgemistral.session import Session, SessionFolder

logger = logging.getLogger(__name__)

KEEP_ALIVE = 5.0     # seconds without news after which a stream gets a comment
MAX_WARNINGS = 50    # of one request
MAX_HEADER = 1000    # characters
REQUEST_ID = re.compile(r"[!-~]{1,200}")

Review = Callable[[str, Any], Any | Awaitable[Any]]
Result = TypeVar("Result")
HELPERS = 2   # threads


class Refused(EdgeMistralError):
    """Raise this in a `review` to refuse a prompt or an answer; the message is shown to the client."""


@dataclass(frozen=True)
class Token:
    """One token of an answer with log probabilities; start: where its text begins."""

    token_id: int
    start: int
    logprobs: Logprobs | None


@dataclass(frozen=True)
class Piece:
    """More text of answer number `index`, and the tokens that begin in it if log probabilities were asked for."""

    index: int
    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Finished:
    """Answer number `index` is complete; finish_reason: "stop", "length" or "content_filter"."""

    index: int
    finish_reason: str
    usage: Usage


Event = Progress | Piece | Finished


class Service:
    """The model behind the endpoints, and what they share. `ready` is false until `load` has finished."""

    def __init__(
        self, model: Model | None, queue: int, review: Review | None, parallel: int = 4,
        session_dir: Path | None = None,
    ) -> None:
        self.name = "" if model is None else model_name(model)
        self.scheduler = Scheduler(queue, parallel)
        self.metrics = Metrics(lambda: self.scheduler.waiting, lambda: self.scheduler.running, self._kv_bytes)
        self.started = int(time.time())
        self._model, self._review = model, review
        self._sessions = None if session_dir is None else SessionFolder(session_dir)
        # Few threads, because each keeps some memory for ever. The default executor would add more and more.
        self._helpers = ThreadPoolExecutor(HELPERS, "edgemistral-text")
        self._compiler: GrammarCompiler | None = None
        self._compiler_lock = threading.Lock()
        self._loader: threading.Thread | None = None
        self._stopping: float | None = None   # when the shutdown began

    @property
    def ready(self) -> bool:
        return self._model is not None

    @property
    def loading(self) -> bool:
        """Whether the thread that loads the model is at work."""
        return self._loader is not None and self._loader.is_alive()

    @property
    def model(self) -> Model:
        """Raises Unavailable while it loads."""
        if self._model is None:
            raise Unavailable("the model is loading", retry_after=5)
        return self._model

    @property
    def reviewed(self) -> bool:
        return self._review is not None

    def load(
        self, loader: Callable[[], Model], loaded: Callable[[], None], failed: Callable[[BaseException], None]
    ) -> None:
        """Load the model on a new thread. `loaded` is called there at the end, `failed` if loading raises."""
        def work() -> None:
            try:
                model = loader()
                self.name, self._model = model_name(model), model
                loaded()
            except BaseException as problem:
                failed(problem)

        self._loader = threading.Thread(target=work, name="edgemistral-load", daemon=True)
        self._loader.start()

    def session(self, name: str | None) -> Session | None:
        """The session that a request names. BadRequest: the server keeps none. Slow: call it on a helper thread."""
        if name is None:
            return None
        if self._sessions is None:
            raise BadRequest("this server keeps no sessions: start it with --session-dir", "session")
        return self._sessions.get(self.model, name)

    def compiler(self) -> GrammarCompiler:
        """The compiler of grammars, made at its first use."""
        with self._compiler_lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(self.model.tokenizer)
            return self._compiler

    def job(self, request: Request, kind: str, user: str | None = None) -> Job:
        """A job for a request. Its id is new and cannot be guessed; a client's X-Request-Id is only sent back.

        Address, User-Agent and the `user` of the request identify a client: on loopback all have the same address.
        """
        job_id = f"{kind}-{secrets.token_hex(16)}"
        address = request.client.host if request.client else ""
        named = request.headers.get("x-request-id", "")
        echoed = named if REQUEST_ID.fullmatch(named) else None
        return Job(job_id, f"{address} {request.headers.get('user-agent', '')} {user or ''}", echoed)

    async def aside(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a slow function, such as tokenizing a long text, on a helper thread."""
        return await asyncio.get_running_loop().run_in_executor(self._helpers, function, *arguments)

    async def review(self, kind: str, value: Any) -> Any:
        """A "prompt" (messages or a text) or an "answer" (a text) after the host's review, which may change it."""
        if self._review is None:
            return value
        if inspect.iscoroutinefunction(self._review):
            return await self._review(kind, value)
        result = await asyncio.to_thread(self._review, kind, value)
        return await result if inspect.isawaitable(result) else result

    async def events(
        self, request: Request, job: Job, make: Callable[[], Sequence[Reply]]
    ) -> AsyncGenerator[Event | None, None]:
        """Queue the replies that `make` returns, and yield their events; None once they are queued, and after KEEP_ALIVE
        seconds without an event. The work stops if the client disconnects or the caller stops reading.

        With a review every answer comes as one piece, after the review. Raises what `make` raises, QueueFull and
        Unavailable before the first event.
        """
        self.scheduler.check(job)
        with _told(job):
            replies = await self.aside(make)
            events = self._run(request, job, replies)
            async with aclosing(events if self._review is None else self._reviewed(events)) as given:
                async for event in given:
                    yield event

    async def compute(self, request: Request, job: Job, make: Callable[[], Sequence[Task]]) -> None:
        """Queue the tasks that `make` returns, which give no text, and wait for them. Stops and raises as `events` does."""
        self.scheduler.check(job)
        with _told(job):
            self.scheduler.submit(job, [_Computed(task) for task in await self.aside(make)])
            watcher = asyncio.create_task(self._watch(request, job))
            try:
                async for _ in job.batches(KEEP_ALIVE):
                    pass
            finally:
                watcher.cancel()
                self.scheduler.stop(job)

    async def _run(self, request: Request, job: Job, replies: Sequence[Reply]) -> AsyncGenerator[Event | None, None]:
        arrived, told = time.monotonic(), False
        self.scheduler.submit(job, [_Answer(job, index, reply) for index, reply in enumerate(replies)])
        watcher = asyncio.create_task(self._watch(request, job))
        try:
            yield None
            async for batch in job.batches(KEEP_ALIVE):
                if not told and any(isinstance(event, Piece) for event in batch):
                    told = True
                    self.metrics.first_token.observe(time.monotonic() - arrived)
                for event in _merged(batch) if batch else (None,):
                    yield event
        finally:
            watcher.cancel()
            self.scheduler.stop(job)
            for reply in replies:
                self.metrics.count(reply.usage)

    async def _reviewed(
        self, events: AsyncGenerator[Event | None, None]
    ) -> AsyncGenerator[Event | None, None]:
        texts: dict[int, str] = {}
        told = time.monotonic()
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Piece):
                    texts[event.index] = texts.get(event.index, "") + event.text
                    if time.monotonic() - told < KEEP_ALIVE:
                        continue
                    yield None
                elif isinstance(event, Finished):
                    try:
                        text = await self.review("answer", texts.pop(event.index, ""))
                    except Refused:
                        yield replace(event, finish_reason="content_filter")
                    else:
                        yield Piece(event.index, text, ())
                        yield event
                else:
                    yield event
                told = time.monotonic()

    def close(self, timeout: float = 4.5) -> bool:
        """`shut_down`, and wait for the compute thread; False if it still works `timeout` seconds after the first call of
        this or `shut_down`. The model stays open."""
        self.shut_down()
        assert self._stopping is not None
        return self.scheduler.join(max(0.0, self._stopping + timeout - time.monotonic()))

    def shut_down(self, grace: float = 0.0) -> None:
        """Accept no more requests. Cancel waiting requests now, and active ones after `grace` seconds."""
        if self._stopping is None:
            self._stopping = time.monotonic()
        self.scheduler.close(Unavailable("the server is shutting down", retry_after=10), grace)

    async def _watch(self, request: Request, job: Job) -> None:
        """Stop the work of a client that disconnects."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.scheduler.stop(job, Cancelled("the client has gone away"))

    def _kv_bytes(self) -> int:
        return self._model.kv_bytes if self._model is not None else 0


async def service_of(request: Request) -> Service:   # async: FastAPI would call a plain function on another thread
    """The service of the app that handles a request."""
    service: Service = request.app.state.service
    return service


def warnings_header(warnings: Iterable[str]) -> dict[str, str]:
    """The warnings as a header, cut to its length."""
    text = "; ".join(warning[:MAX_HEADER] for warning in islice(warnings, MAX_WARNINGS))[:MAX_HEADER]
    text = text.encode("ascii", "backslashreplace").decode()[:MAX_HEADER]
    text = "".join(c if c.isprintable() else "?" for c in text).strip()   # HTTP allows no spaces around a header
    return {"warnings": text} if text else {}


def model_name(model: Model) -> str:
    """The name that clients see: the model's file name, without the folder and the ending."""
    name = model.path.stem if model.path is not None else "edgemistral"
    return name.encode("utf-8", "replace").decode()   # a file name may be invalid Unicode


class _Answer:
    """Answer number `index` of a job, on the compute thread."""

    def __init__(self, job: Job, index: int, reply: Reply) -> None:
        self._job, self._index, self._reply = job, index, reply
        self._told = 0   # tokens

    @property
    def task(self) -> Task:
        return self._reply.generation

    @property
    def ready(self) -> bool:
        return self._reply.generation.ready

    def deliver(self) -> bool:
        reply, told = self._reply, self._told
        piece = reply.ready_text()
        if piece:
            self._told = end = bisect_left(reply.starts, len(reply.text), told)
            tokens = zip(reply.token_ids[told:end], reply.starts[told:end], reply.logprobs[told:end], strict=False)
            send = self._job.emit if told else self._job.hand_over   # only the time to the first token matters
            send(Piece(self._index, piece, tuple(Token(*token) for token in tokens)))
        if reply.ended:
            self._job.emit(Finished(self._index, "stop" if reply.finish_reason == "stop" else "length", reply.usage))
        return reply.ended


class _Computed:
    """Work of a job that gives no answer, on the compute thread."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    def ready(self) -> bool:
        return self.task.done or self.task.error is not None

    def deliver(self) -> bool:
        if self.task.error is not None:
            raise self.task.error
        return self.task.done


@contextmanager
def _told(job: Job) -> Iterator[None]:
    """An unexpected exception becomes an EdgeMistralError, so that the connection stays open."""
    try:
        yield
    except EdgeMistralError:
        raise
    except Exception as error:
        logger.exception("request %s failed", job.id)
        raise EdgeMistralError("an error inside the server") from error


def _merged(batch: list[Event]) -> list[Event]:
    """Join consecutive pieces of one answer, and keep the last of consecutive progress events."""
    merged: list[Event] = []
    for event in batch:
        last = merged[-1] if merged else None
        if isinstance(last, Piece) and isinstance(event, Piece) and last.index == event.index:
            merged[-1] = Piece(last.index, last.text + event.text, last.tokens + event.tokens)
        elif isinstance(last, Progress) and isinstance(event, Progress):
            merged[-1] = event
        else:
            merged.append(event)
    return merged
