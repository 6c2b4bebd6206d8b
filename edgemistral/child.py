"""A server as the child process of an application: it announces itself, stops when its parent ends, and locks its sessions.

Two checks tell whether the parent is alive, because each has a gap:

* Our standard input closes when the parent dies, on every system and in every case. But another child may have inherited
  the parent's end of it.
* The system names our parent (POSIX), or lets us wait for it (Windows). But a launcher between the two may outlive it.

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

PROTOCOL = 1          # version of the announcement and of --parent-watch
LOOK_EVERY = 0.25     # seconds between two checks of our parent
LOCK_FILE = ".edgemistral.lock"


def announcement(url: str, key: str) -> str:
    """The line for the parent: requests are answered from now on, and how to make them."""
    return json.dumps({"url": url, "key": key, "pid": os.getpid(), "protocol": PROTOCOL})


class ParentWatch:
    """Calls `on_gone` once, on a separate thread, when the parent process dies or closes our standard input.

    Until `on_gone` is set, the process exits at once: it has nothing to save yet.
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
    """The descriptor of standard input if it is a pipe or socket: a terminal or a file never closes."""
    try:
        number = sys.__stdin__.fileno() if sys.__stdin__ is not None else 0
        mode = os.fstat(number).st_mode
    except (OSError, ValueError):
        return None
    return number if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else None


def _wait_for_end_of(number: int) -> None:
    """Read until the end, and ignore the content. Not through sys.stdin: its lock would be held at our exit."""
    try:
        while os.read(number, 4096):
            pass
    except OSError:      # a broken pipe has ended, too
        pass


def _poll_parent(parent: int) -> Callable[[], None]:
    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)

    return poll


def _wait_for_parent() -> None:
    """Wait on a handle of the parent: Windows may give the number of a dead parent to another process."""
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
    """Lock a folder of sessions for this process. BadInput: another process has it, or it cannot be used.

    The system releases the lock whenever and however the process ends. The lock file stays and has no meaning by itself.
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
            "end that server, or use another --session-dir"
        ) from None
