"""The terminal, for the command line and the chat: a status line, wrapped and safe text, Ctrl-C as a request to stop."""

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
from typing import TextIO

COMPILING = "compiling for this processor, the first time only"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A model may write any character, and a terminal obeys control characters: all but tab and line feed are replaced. Half a
# surrogate pair, which a file name may contain, cannot be written at all.
_CONTROLS = {code: REPLACEMENT for code in (*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000)) if code not in (9, 10)}


def printable(text: str) -> str:
    """The text without characters that control a terminal, such as moves of the cursor."""
    return text.translate(_CONTROLS)


def columns(stream: TextIO) -> int:
    """The current width of the terminal that a stream writes to; 80 if it is unknown."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):   # no terminal, or a stream without a file
        return 80


def cells(text: str) -> int:
    """Columns that a text without line ends takes: 2 for most East Asian characters and emoji, 0 for combining marks."""
    if text.isascii():
        return len(text)
    from wcwidth import wcwidth  # its tables take a while to load

    return sum(max(wcwidth(character), 0) for character in text)


def cut(text: str, width: int) -> str:
    """The text if it fits into `width` columns, else its beginning and three ASCII dots, which every terminal can show."""
    if cells(text) <= width:
        return text
    dots = "..."[: max(width, 0)]
    while text and cells(text) + len(dots) > width:
        text = text[:-1]
    return text + dots


class StatusLine:
    """A line on standard error that is overwritten and leaves nothing behind. It prints nothing if that is not a terminal.

    A text wider than the terminal is cut: a line that wraps could not be overwritten.
    """

    def __init__(self) -> None:
        self._shown = 0   # columns
        self._enabled = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._enabled:
            room = columns(sys.stderr) - 1   # after the last column the cursor may already be on the next line
            text = cut(printable(text), room)
            blanks = max(0, min(self._shown, room) - cells(text))
            print(f"\r{text}{' ' * blanks}", end="", file=sys.stderr, flush=True)
            self._shown = cells(text)

    def clear(self) -> None:
        if self._shown:
            blanks = " " * min(self._shown, columns(sys.stderr) - 1)
            print(f"\r{blanks}\r", end="", file=sys.stderr, flush=True)
            self._shown = 0

    def prompt_progress(self, done: int, total: int) -> None:
        """The engine's `progress` callback: shows how much of the prompt is read, then "thinking" until the answer begins."""
        self.show(f"reading the prompt: {done} of {total} tokens" if done < total else "thinking ...")

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clear()


class WordWrap:
    """Wraps text that comes in pieces: a word that does not fit moves to the next line.

    width: a function, because a window may change during an answer. Lines of code (between ``` fences) are not wrapped, so
    that they can be copied; nor is a word wider than a line. The last word is held back until it ends.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0      # of the cursor
        self._line = ""       # the line so far, before wrapping: to find fences
        self._blanks = ""     # held back: dropped if the line is wrapped there
        self._word = ""       # held back: it may continue
        self._in_code = False

    def push(self, piece: str) -> str:
        """What to print now."""
        return "".join(self._take(character) for character in piece)

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._end_word() + self._end_blanks()

    def _take(self, character: str) -> str:
        if character == "\n":
            printed = self.flush() + "\n"
            if self._line.lstrip().startswith("```"):
                self._in_code = not self._in_code
            self._column, self._line = 0, ""
            return printed
        self._line += character
        if self._in_code:
            return character
        if character in " \t":
            printed = self._end_word()
            self._blanks += character
            return printed
        # A line may break on both sides of a wide (for example Chinese) character, but not before a combining mark.
        wide = cells(character) == 2 or (cells(self._word[:1]) == 2 and cells(character) > 0)
        printed = self._end_word() if wide else ""
        self._word += character
        return printed

    def _end_word(self) -> str:
        """The word, behind the blanks before it or on a new line."""
        if not self._word:
            return ""
        word, width = self._word, self._width()
        needed = cells(word)
        after = self._after_blanks()
        wraps = self._column > 0 and after + needed > width
        printed = f"\n{word}" if wraps else f"{self._blanks}{word}"
        self._column = (0 if wraps else after) + needed
        if self._column > width:   # wider than a line: the terminal breaks it
            self._column = self._column % width or width
        self._blanks = self._word = ""
        return printed

    def _end_blanks(self) -> str:
        """The blanks at the end of a line, if they fit."""
        after, blanks = self._after_blanks(), self._blanks
        self._blanks = ""
        if after > self._width():
            return ""
        self._column = after
        return blanks

    def _after_blanks(self) -> int:
        """The column after the blanks."""
        column = self._column
        for blank in self._blanks:
            column += 8 - column % 8 if blank == "\t" else 1
        return column


def wrapped(text: str, stream: TextIO, indent: int = 0) -> str:
    """A safe text for a stream, wrapped at words if it is a terminal. Later lines begin with `indent` blanks."""
    if not stream.isatty():
        return text
    width = columns(stream)
    wrap = WordWrap(lambda: width - indent)
    lines = (wrap.push(printable(text)) + wrap.flush()).split("\n")
    return f"\n{' ' * indent}".join(lines)


def print_answer(pieces: Iterator[str], status: StatusLine) -> None:
    """Print an answer as it comes; if standard output is a terminal, safe and wrapped. Always ends the line, even on errors.

    The status line stays until there is a word to print.
    """
    wrap = WordWrap(lambda: columns(sys.stdout)) if sys.stdout.isatty() else None
    begun = False
    try:
        for piece in pieces:
            text = wrap.push(printable(piece)) if wrap else piece
            begun = True
            if text:
                status.clear()
                print(text, end="", flush=True)
    finally:
        status.clear()
        if begun:
            print(wrap.flush() if wrap else "", flush=True)


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
    """While inside, report on standard error when kernels are compiled; with a clock if it is a terminal."""
    from edgemistral.kernels import jit  # imports numba

    before, notice = (jit.on_compile, jit.on_compiled), _CompileNotice()
    jit.on_compile, jit.on_compiled = notice.begin, notice.end
    try:
        yield
    finally:
        notice.end()
        jit.on_compile, jit.on_compiled = before


class _CompileNotice:
    """Reports compilations, one after another. The compiler gives no progress, so a clock is shown."""

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
                seconds = time.monotonic() - self._start
                # The clock first: a narrow window cuts the end.
                status.show(f"{seconds:.0f} s{' of about 30' if seconds < 30 else ''}: {COMPILING}")
                if self._over.wait(1):
                    break


@cache
def _tell_of_compiling() -> None:
    print(f"{COMPILING}: some ten seconds ...", file=sys.stderr, flush=True)


def human_bytes(n: int) -> str:
    """12345678 -> "11.8 MiB"."""
    size, unit = float(n), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{n} bytes" if unit == "bytes" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
