"""A file with ordered writes: everything written before a `sync` is on the disk before anything written after it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from edgemistral.errors import BadSession
from edgemistral.files import lost, regular

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)      # there is no more room
_LOCKED = 1 << 62                                     # Windows locks bytes: these are far behind the content


class Disk:
    """An open file, locked against other users of this class. The caller must hold the engine's lock."""

    reads_at_once = hasattr(os, "preadv")

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """file: unbuffered, for reading and writing."""
        self.path, self._file = path, file

    @classmethod
    def open(cls, path: Path, create: bool = False, lock: bool = True) -> Disk:
        """Open and lock a file; with `create` a new one, which must not exist, for its owner only. lock: False to only read.

        BadSession: it cannot be opened, is not a regular file, or is in use.
        """
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        regular.check(path, BadSession)
        try:
            number = os.open(path, flags | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)
        except OSError as error:
            raise BadSession(f"{path}: cannot be opened: {error.strerror}") from None
        file = os.fdopen(number, "r+b", buffering=0)
        try:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise BadSession(f"{path}: not a regular file")
            if lock and not locked(number):
                raise BadSession(f"{path}: is in use by another program, or open already")
        except BaseException:
            file.close()
            raise
        return cls(path, file)

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, size: int) -> bytes:
        """As many bytes as there are."""
        self._file.seek(offset)
        parts = []
        while size and (part := self._file.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill a buffer; returns how many bytes were read. Several threads may call it if `reads_at_once`."""
        at = 0
        if sys.platform != "win32" and self.reads_at_once:
            while at < len(buffer) and (n := os.preadv(self._file.fileno(), [buffer[at:]], offset + at)):
                at += n
            return at
        self._file.seek(offset)
        while at < len(buffer) and (n := self._file.readinto(buffer[at:])):  # type: ignore[attr-defined]
            at += n
        return at

    def write(self, offset: int, data: bytes) -> None:
        self._file.seek(offset)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Wait until everything that was written is on the disk."""
        self._file.flush()
        if sys.platform == "darwin":
            import fcntl

            with contextlib.suppress(OSError):       # the file system has no such call
                fcntl.fcntl(self._file, fcntl.F_FULLFSYNC)
                return
        os.fsync(self._file.fileno())

    def flush(self, mapping: mmap.mmap) -> None:
        """Make the next `sync` include what was written to a mapping of this file."""
        mapping.flush()

    def map(self, offset: int, size: int) -> mmap.mmap:
        """Map an existing range of the file for reading and writing."""
        mapping = mmap.mmap(self._file.fileno(), size, offset=offset)
        lost.watch(mapping, self.path)
        return mapping

    def grow(self, size: int) -> None:
        """Make the file at least `size` bytes long, and allocate the disk space now: a full disk is an OSError here instead
        of a crash later. After the error the file is unchanged."""
        had = self.size
        if size <= had:
            return
        file = self._file.fileno()
        try:
            os.truncate(file, size)
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(file, had, size - had)
                    return
                except OSError as error:
                    if error.errno in FULL:
                        raise
            for at in range(had, size, 1 << 20):
                self.write(at, bytes(min(1 << 20, size - at)))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(file, had)
            raise

    def shrink(self, size: int) -> None:
        """Cut the file if the system allows it; nothing depends on it."""
        with contextlib.suppress(OSError):
            os.truncate(self._file.fileno(), size)

    def close(self) -> None:
        """Unlock and close the file. Each remaining mapping holds a duplicate of it, which would keep the lock."""
        if not self._file.closed:
            _unlock(self._file.fileno())
            self._file.close()


def put_in_place(path: Path, write: Callable[[Disk], None]) -> Disk:
    """Make a file under another name, write it, and rename it when it is on the disk; it stays open and locked.

    BadSession: it cannot be made. A file that has the name by then is replaced if it is empty, else not changed.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        partial.unlink()
    try:
        disk = Disk.open(partial, create=True)
    except BadSession as problem:
        raise BadSession(str(problem).replace(f"{partial}: cannot be opened", f"{path}: cannot be made")) from None
    try:
        try:
            write(disk)
            disk.sync()
            if sys.platform == "win32":              # an open file cannot be renamed there
                disk.close()
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size:
                    raise BadSession(f"{path}: was made by another program just now")
            partial.replace(path)
            if sys.platform == "win32":
                return Disk.open(path)
            sync_directory(path.parent)
        except OSError as error:
            raise BadSession(f"{path}: cannot be made: {error.strerror}") from None
    except BaseException:
        disk.close()
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    disk.path = path
    return disk


def sync_directory(path: Path) -> None:
    """Make a rename in it permanent; Windows has no such call and needs none."""
    if os.name != "nt":
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def share(file: int) -> None:
    """Lock an open file for reading while it or a mapping of it is open: programs that check locks do not change it."""
    if sys.platform != "win32":
        import fcntl

        with contextlib.suppress(OSError):          # another process writes it, or the file system has no locks
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _unlock(file: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, _LOCKED, os.SEEK_SET)
        with contextlib.suppress(OSError):
            msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
        return
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


def locked(file: int) -> bool:
    """Lock an open file until it is closed; False if another process has locked it."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, _LOCKED, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)    # a file system without locks
    return True
