"""Work on other threads, a little ahead of who needs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one made in another thread while the caller works on this one."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item   # type: ignore[misc]   # not the sentinel


def map_ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], n: int) -> Iterator[T]:
    """`map` in the threads of a pool, with at most `n` items taken whose results the caller has not got."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == n:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
