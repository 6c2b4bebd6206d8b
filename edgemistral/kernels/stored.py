"""Compiled code on the disk: files with a checksum in the user's cache, or in the bundle of a frozen application."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from edgemistral.paths import bundled_dir, cache_dir


def digest_of(*parts: object) -> str:
    """A short hexadecimal name for the `str` of all parts."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def folder() -> Path:
    """The folder to write to."""
    return cache_dir() / "kernels"


def read(name: str) -> bytes:
    """The content of a file; nothing if there is none, or a damaged one."""
    bundled = bundled_dir()
    for place in (folder(), *([bundled / "kernels"] if bundled is not None else [])):
        data = b""
        with contextlib.suppress(OSError):
            data = (place / name).read_bytes()
        if data[:32] == hashlib.sha256(data[32:]).digest():
            return data[32:]
    return b""


def write(name: str, body: bytes) -> None:
    """Write under another name and rename. On a full or read-only disk nothing is kept, and the next start compiles again."""
    path = folder() / name
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(body).digest() + body)
            Path(partial).replace(path)
        except OSError:
            Path(partial).unlink()
            raise
