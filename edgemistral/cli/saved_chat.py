"""Files of the chat in the terminal: typed names, saved conversations, atomic writes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from edgemistral.errors import BadInput

Message = dict[str, str]
MAX_FILE = 64 << 20   # bytes of a conversation to load


def turn_of(message: Any, where: str) -> Message:
    """A message of a saved conversation as one of ours. BadInput: the chat cannot use it."""
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in ("system", "user", "assistant"):
        raise BadInput(f"{where} has the role {role!r}: it must be system, user or assistant")
    if not isinstance(content, str):
        raise BadInput(f"{where} has no text: its content must be a string")
    return {"role": role, "content": content}


def typed_path(file: str, example: str = "/save chat.json") -> Path:
    """The path of a file as typed, with or without quotes. BadInput: no name was typed."""
    if len(file) > 1 and file[0] == file[-1] and file[0] in "\"'":   # as in a shell, for names with spaces
        file = file[1:-1]
    if not file:
        raise BadInput(f"which file? For example {example}")
    try:
        return Path(file).expanduser()
    except RuntimeError:
        raise BadInput(f"{file}: there is no such user") from None


def read_whole(path: Path) -> bytes:
    try:
        is_other = path.exists() and not path.is_file()   # reading a pipe or a device may never end
        size = 0 if is_other else path.stat().st_size
        content = b"" if is_other or size > MAX_FILE else path.read_bytes()
    except (OSError, ValueError) as error:   # ValueError: an invalid file name
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if is_other:
        raise BadInput(f"{path}: it must be a file")
    if size > MAX_FILE:
        raise BadInput(f"{path}: over {MAX_FILE >> 20} MiB, too large for a conversation")
    return content


def write_whole(path: Path, text: str) -> None:
    """Replace a file by a complete new one, or leave it as it was."""
    if path.is_dir():
        raise BadInput(f"{path}: it is a folder; name a file")
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, ValueError) as error:   # ValueError: an invalid file name
        with contextlib.suppress(OSError, ValueError):
            partial.unlink()
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or error}") from None
