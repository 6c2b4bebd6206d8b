"""An answer for programs with an event loop: the same pieces, computed on a thread, and the loop is never blocked."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from edgemistral.errors import EdgeMistralError

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from edgemistral.generate.tasks import Usage
    from edgemistral.model import Reply

MOST = 64      # answers at once that have a thread


class Threads:
    """The threads of a model's `achat`: none before the first answer, none after `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def get(self) -> ThreadPoolExecutor:
        """Raises EdgeMistralError once they are closed."""
        from concurrent.futures import ThreadPoolExecutor  # here and below: what takes a while to import, when it is wanted

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
    """`async for piece in reply`. Made by `Model.achat`; nothing happens before the first piece is asked for.

    When the task that waits for a piece is cancelled, the answer is, too; `await reply.aclose()` ends it from outside. An
    answer that is dropped computes nothing more. One task at a time may ask for pieces.
    """

    def __init__(self, start: Callable[[], Reply], threads: Threads) -> None:
        """start: makes the reply; called on a thread, for tokenizing a long conversation takes a while."""
        self._start, self._threads = start, threads
        self._reply: Reply | None = None
        self._cancelled = False

    @property
    def reply(self) -> Reply | None:
        """The answer behind it; None before the first piece was asked for."""
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
        """As of `Reply`."""
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
        """The next piece, None at the end: a StopIteration cannot leave a thread."""
        if self._reply is None:
            self._reply = self._start()
            if self._cancelled:
                self._reply.cancel()
        return next(self._reply, None)
