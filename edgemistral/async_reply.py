"""An answer for programs with an event loop: the same pieces, computed on a thread. The loop is never blocked."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from edgemistral.errors import EdgeMistralError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from edgemistral.generate.tasks import Usage
    from edgemistral.model import Reply

MOST = 64      # threads: answers computed at the same time


class Threads:
    """The threads of a model's `achat`. They start with the first answer and end with `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def get(self) -> ThreadPoolExecutor:
        """Raises EdgeMistralError once they are closed."""
        from concurrent.futures import ThreadPoolExecutor  # here and below: slow imports happen at first use

        with self._lock:
            if self._closed:
                raise EdgeMistralError("the model is closed")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(MOST, "edgemistral-answer")
            return self._pool

    def close(self) -> None:
        with self._lock:
            pool, self._pool, self._closed = self._pool, None, True
        if pool is not None:
            pool.shutdown()


class AsyncReply(AsyncIterator[str]):
    """`async for piece in reply`. Made by `Model.achat`. Nothing is computed before the first piece is requested.

    Cancelling the task that waits for a piece cancels the answer; `await reply.aclose()` ends it from outside. A deleted
    answer computes nothing more. Only one task at a time may request pieces.
    """

    def __init__(self, start: Callable[[], Reply], threads: Threads) -> None:
        """start: makes the reply; called on a thread, because tokenizing a long conversation is slow."""
        self._start, self._threads = start, threads
        self._reply: Reply | None = None
        self._cancelled = False

    @property
    def reply(self) -> Reply | None:
        """The answer behind it; None until the first piece was requested."""
        return self._reply

    @property
    def text(self) -> str:
        """All pieces so far."""
        return self._reply.text if self._reply is not None else ""

    @property
    def usage(self) -> Usage | None:
        return self._reply.usage if self._reply is not None else None

    @property
    def finish_reason(self) -> str | None:
        """See `Reply`."""
        return self._reply.finish_reason if self._reply is not None else None

    def cancel(self) -> None:
        """See `Reply.cancel`; from any thread."""
        self._cancelled = True
        if self._reply is not None:
            self._reply.cancel()

    async def aclose(self) -> None:
        """Cancel it."""
        self.cancel()

    async def __anext__(self) -> str:
        import asyncio

        try:
            piece = await asyncio.get_running_loop().run_in_executor(self._threads.get(), self._next)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    def _next(self) -> str | None:
        """The next piece; None at the end, because a thread's future cannot raise StopIteration."""
        if self._reply is None:
            self._reply = self._start()
            if self._cancelled:
                self._reply.cancel()
        return next(self._reply, None)
