"""What command line and chat need of a terminal: one changing line, wrapped text that cannot harm it, Ctrl-C as a wish."""

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
# A model may write any character, and a terminal obeys some: all control characters but tab and line feed. Half a
# surrogate pair, which a name of a file may hold, cannot be written at all.
_CONTROLS = {code: REPLACEMENT for code in (*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000)) if code not in (9, 10)}


def printable(text: str) -> str:
    """The text without characters that could move the cursor, change colours or worse."""
    return text.translate(_CONTROLS)


def columns(stream: TextIO) -> int:
    """The width of the terminal that a stream writes to, asked anew because windows change; 80 if nobody knows."""
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
    """The text if it fits into `width` columns, else its beginning and dots: plain ones, for terminals that know no others."""
    if cells(text) <= width:
        return text
    dots = "..."[: max(width, 0)]
    while text and cells(text) + len(dots) > width:
        text = text[:-1]
    return text + dots


class StatusLine:
    """A line on standard error that is overwritten and leaves nothing behind; silent when that is no terminal.

    A text wider than the terminal is cut: a line that wraps could not be overwritten.
    """

    def __init__(self) -> None:
        self._shown = 0   # columns
        self._enabled = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._enabled:
            room = columns(sys.stderr) - 1   # a cursor after the last column may already be on the next line
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
        """A `progress` for the engine: how far the prompt is read, then a word that stays until the first of the answer."""
        self.show(f"reading the prompt: {done} of {total} tokens" if done < total else "thinking ...")

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clear()


class WordWrap:
    """Text that comes in pieces, to be printed on a terminal: a word that does not fit goes whole into the next line.

    width: a function, because a window may change while an answer comes. Lines of code (between ``` fences) are left
    as they are, so that they can be copied, and so is a word that is wider than a whole line. The last word is held
    back until it ends.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0      # of the cursor
        self._line = ""       # the text of the line so far, as it came: tells fences
        self._blanks = ""     # held back: they vanish where a line is wrapped
        self._word = ""       # held back: it may go on
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
        # A line may break at both sides of a wide character, such as a Chinese one, but not before a combining mark.
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
    """A text for a stream: safe, and wrapped at words where that is a terminal; later lines begin with `indent` blanks."""
    if not stream.isatty():
        return text
    width = columns(stream)
    wrap = WordWrap(lambda: width - indent)
    lines = (wrap.push(printable(text)) + wrap.flush()).split("\n")
    return f"\n{' ' * indent}".join(lines)


def print_answer(pieces: Iterator[str], status: StatusLine) -> None:
    """Print an answer as it comes, safe and wrapped where standard output is a terminal; the line ends whatever happens.

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
                seconds = time.monotonic() - self._start
                # The clock first: a narrow window cuts the end.
                status.show(f"{seconds:.0f} s{' of about 30' if seconds < 30 else ''}: {COMPILING}")
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
