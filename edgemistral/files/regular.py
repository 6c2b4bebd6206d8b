"""Opens all files that a user names: anything except a regular file is refused before it is opened.

Opening a FIFO waits for a writer, reading a device may never end, and opening some devices does something.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from edgemistral.errors import BadInput

KINDS = (
    (stat.S_ISDIR, "a directory, not a file"),
    (stat.S_ISFIFO, "a FIFO (named pipe), not a file; write its content to a file first"),
    (stat.S_ISCHR, "a device, not a file"),
    (stat.S_ISBLK, "a device, not a file"),
    (stat.S_ISSOCK, "a socket, not a file"),
)
# A shell's <(command) and /dev/stdin: their writer exists already.
PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


def refusal(path: Path) -> str | None:
    """The reason not to open a path: not a regular file, or a loop of links. None: it may be opened, or does not exist."""
    try:
        mode = path.stat().st_mode
    except OSError as problem:
        return "a loop of links, without a file" if problem.errno == errno.ELOOP else None
    except ValueError:
        return "not a path: it has a zero byte"
    return next((what for is_kind, what in KINDS if is_kind(mode)), None)


def there(path: Path) -> bool:
    """Whether a name exists, even as a broken link or something other than a file: opening it then gives the error."""
    return path.is_symlink() or path.exists()


def check(path: Path, error: type[BadInput]) -> None:
    """Raise `error` if a path must not be opened."""
    if what := refusal(path):
        raise error(f"{path}: {what}")


@contextlib.contextmanager
def reading(path: Path, error: type[BadInput]) -> Iterator[BufferedReader]:
    """A regular file, open for reading. Raises `error` if it is not a regular file, OSError if it cannot be opened."""
    check(path, error)
    # Non-blocking: the path may have become a FIFO since the check.
    flags = sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK"))
    number = os.open(path, os.O_RDONLY | flags)
    with os.fdopen(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise error(f"{path}: not a regular file")
        yield file


def read(path: Path, error: type[BadInput], pipes: bool = False) -> bytes:
    """All bytes of a file. Raises `error` if it is not a regular file or cannot be read.

    pipes: accept a shell's <(command), too.
    """
    try:
        if pipes and str(path).startswith(PIPES):
            return path.read_bytes()
        with reading(path, error) as file:
            return file.read()
    except FileNotFoundError as problem:
        raise error(f"{path}: {problem.strerror}") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from None
