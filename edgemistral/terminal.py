"""What command line and chat need of a terminal: one changing line, text that cannot harm it, Ctrl-C as a wish."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType

COMPILING = "compiling for this processor, the first time only"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A model may write any character, and a terminal obeys some: all control characters but tab and line feed.
_CONTROLS = {code: REPLACEMENT for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """The text without characters that could move the cursor, change colours or worse."""
    return text.translate(_CONTROLS)


class StatusLine:
    """A line on standard error that is overwritten and leaves nothing behind; silent when that is no terminal."""

    def __init__(self) -> None:
        self._shown = 0
        self._enabled = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._enabled:
            room = _columns() - 1   # a line that fills the last column may wrap
            text = text[:room]
            print(f"\r{text.ljust(min(self._shown, room))}", end="", file=sys.stderr, flush=True)
            self._shown = len(text)

    def clear(self) -> None:
        if self._shown:
            print(f"\r{' ' * min(self._shown, _columns() - 1)}\r", end="", file=sys.stderr, flush=True)
            self._shown = 0

    def prompt_progress(self, done: int, total: int) -> None:
        """A `progress` for the engine: shown while there is more to read, for a prompt of more than one chunk."""
        if done < total:
            self.show(f"reading the prompt: {done} of {total} tokens")
        else:
            self.clear()

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clear()


def _columns() -> int:
    """The terminal's width now: its window may have changed since the last time."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """While inside, Ctrl-C raises nothing: it makes the yielded function return True. Main thread only."""
    pressed = False

    def on_interrupt(*_: object) -> None:
        nonlocal pressed
        pressed = True

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def compile_notice() -> Iterator[None]:
    """While inside, say on standard error when kernels have to be compiled: with a clock, if that is a terminal."""
    from edgemistral.kernels import jit  # imports numba

    before, notice = (jit.on_compile, jit.on_compiled), _CompileNotice()
    jit.on_compile, jit.on_compiled = notice.begin, notice.end
    try:
        yield
    finally:
        notice.end()
        jit.on_compile, jit.on_compiled = before


class _CompileNotice:
    """Tells of compilations, one after another; the compiler itself cannot tell how far it is."""

    def __init__(self) -> None:
        self._start = 0.0
        self._over = threading.Event()
        self._clock: threading.Thread | None = None

    def begin(self, _: str) -> None:
        self._start = self._start or time.monotonic()
        if not sys.stderr.isatty():
            _tell_of_compiling()
        elif self._clock is None:
            self._over.clear()
            self._clock = threading.Thread(target=self._tick, daemon=True)
            self._clock.start()

    def end(self) -> None:
        if self._clock is not None:
            self._over.set()
            self._clock.join()
            self._clock = None

    def _tick(self) -> None:
        with StatusLine() as status:
            while True:
                status.show(f"{COMPILING}: {time.monotonic() - self._start:.0f} s of about 30")
                if self._over.wait(1):
                    break


@cache
def _tell_of_compiling() -> None:
    print(f"{COMPILING}: about half a minute ...", file=sys.stderr, flush=True)


def human_bytes(n: int) -> str:
    """12345678 -> "11.8 MiB"."""
    size, unit = float(n), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{n} bytes" if unit == "bytes" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
