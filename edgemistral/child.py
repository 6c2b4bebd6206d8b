"""A server as the child process of an application: what it tells its parent, how it ends with it, and that it is alone.

Whether the parent lives is asked in two ways, because each has a gap:

* The parent's end of our standard input closes when it dies, on every system, however it dies. But another child may have
  inherited that end.
* The system says who our parent is (POSIX), or lets us wait for it (Windows). But a launcher between the two may outlive it.

Linux' PR_SET_PDEATHSIG is not used: its signal comes when the thread that started us ends, not the process.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgemistral.errors import BadInput, BadSession
from edgemistral.files.disk import Disk

PROTOCOL = 1          # of the announcement and of --parent-watch: counts changes that a parent would notice
LOOK_EVERY = 0.25     # seconds between two looks at who our parent is
LOCK_FILE = ".edgemistral.lock"


def announcement(url: str, key: str) -> str:
    """The line that tells the parent that requests are answered from now on, and how to make them."""
    return json.dumps({"url": url, "key": key, "pid": os.getpid(), "protocol": PROTOCOL})


class ParentWatch:
    """Calls `on_gone` once, on a thread of its own, when the parent process dies or closes our standard input.

    Until `on_gone` is set, the process ends at once: nothing that has begun by then must be kept.
    """

    def __init__(self) -> None:
        self.on_gone: Callable[[], object] = lambda: os._exit(0)
        self._lock = threading.Lock()
        self._gone = False
        watches = [_wait_for_parent] if sys.platform == "win32" else [_poll_parent(os.getppid())]
        if (number := _piped_input()) is not None:
            watches.append(lambda: _wait_for_end_of(number))
        for watch in watches:
            threading.Thread(target=self._watch, args=(watch,), name="edgemistral-parent", daemon=True).start()

    def _watch(self, watch: Callable[[], None]) -> None:
        watch()
        with self._lock:
            first, self._gone = not self._gone, True
        if first:
            self.on_gone()


def _piped_input() -> int | None:
    """The descriptor of standard input if a process is at its other end: a terminal, a file or nothing never closes."""
    try:
        number = sys.__stdin__.fileno() if sys.__stdin__ is not None else 0
        mode = os.fstat(number).st_mode
    except (OSError, ValueError):
        return None
    return number if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else None


def _wait_for_end_of(number: int) -> None:
    """Until nothing more can come; what comes means nothing. Not through sys.stdin: its lock would be held at our exit."""
    try:
        while os.read(number, 4096):
            pass
    except OSError:      # a pipe that is broken has ended, too
        pass


def _poll_parent(parent: int) -> Callable[[], None]:
    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)

    return poll


def _wait_for_parent() -> None:
    """Windows keeps a dead parent's number for us, and may give it to another process: so hold on to the process itself."""
    if sys.platform == "win32":
        import ctypes

        synchronize, forever = 0x00100000, 0xFFFFFFFF
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel32.OpenProcess.restype = ctypes.c_void_p
        handle = kernel32.OpenProcess(synchronize, False, os.getppid())
        if handle:       # else it is dead already
            kernel32.WaitForSingleObject(ctypes.c_void_p(handle), forever)


@contextmanager
def only_user_of(folder: Path | None) -> Iterator[None]:
    """Hold a folder of sessions for this process. BadInput: another one has it, or it cannot be had.

    The system lets go of the lock when a process ends, however it ends; the file stays and means nothing by itself.
    """
    if folder is None:
        yield
        return
    lock = _lock(folder)
    try:
        lock.write(0, f"{os.getpid():<20}\n".encode())
        yield
    finally:
        lock.close()


def _lock(folder: Path) -> Disk:
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        return Disk.open(path)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be the folder of sessions: {error.strerror}") from None
    except BadSession as problem:
        if "in use" not in str(problem):
            raise BadInput(f"{folder}: cannot be the folder of sessions ({problem})") from None
        holder = path.read_bytes()[:20].decode("ascii", "replace").strip()
        raise BadInput(
            f"{folder}: another server uses this folder of sessions (process {holder or 'unknown'}): "
            "end that one, or give this one another --session-dir"
        ) from None
