"""A conversation in a file: after a restart, a crash or a power cut it continues without reading the prompt again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import BadInput, BadRequest, BadSession, EdgeMistralError
from edgemistral.files import strict_json
from edgemistral.files.blob import SEAL, Blob
from edgemistral.files.records import KV_VERSION
from edgemistral.files.session import SessionFile
from edgemistral.runtime.segments import SegmentPool, Sequence
from edgemistral.runtime.session import FileSequence, geometry_of

logger = logging.getLogger(__name__)

SESSION_NAME = r"^[A-Za-z0-9_-]{1,100}$"
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}      # on Windows
MOST_OPEN = 8

if TYPE_CHECKING:
    from edgemistral.generate.engine import Engine
    from edgemistral.model import Model
    from edgemistral.text.written import WrittenTexts


class Session:
    """One session, open until `close`; a context manager. Made by `Model.session`.

    Give it to `Model.chat`, `complete` or `generate`. Its file then keeps the tokens of prompt and answer, and only the rest of
    a prompt that begins with them is computed. Calls without the session do not read or write the file.

    path: of the file. messages: the conversation after the last `chat`; a new list may be assigned. notice: one line if a part
    of the file was invalid when it was opened, or "".
    """

    def __init__(self, engine: Engine, path: Path, binding: Mapping[str, Any], model: str, written: WrittenTexts) -> None:
        self.path, self.notice = path, ""
        self._engine, self._written = engine, written

        def make(pool: SegmentPool) -> FileSequence:
            file = SessionFile.open(path, binding, geometry_of(pool), engine.config.context, model)
            self.notice = file.cut_back
            try:
                return FileSequence(pool, file)
            except BaseException:
                file.close()
                raise

        self._open = True
        self._sequence = engine.pin(make)
        try:
            self._messages = self._read(getattr(self._sequence, "notes", ""))
        except BaseException:
            engine.unpin(self._sequence)
            raise

    @property
    def sequence(self) -> Sequence:
        """The sequence that the engine continues. Raises EdgeMistralError once the session is closed."""
        if not self._open:
            raise EdgeMistralError(f"{self.path}: the session is closed")
        return self._sequence

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def ids(self) -> NDArray[np.int32]:
        """The ids of its positions, as a copy."""
        ids: NDArray[np.int32] = self.sequence.ids.copy()
        return ids

    @property
    def tokens(self) -> int:
        """The number of its positions."""
        return self.sequence.length

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [dict(message) for message in self._messages]

    @messages.setter
    def messages(self, messages: Iterable[Mapping[str, Any]]) -> None:
        self._messages = [dict(message) for message in messages]
        self.save()

    def save(self) -> None:
        """Write everything to the disk, as `chat` does after each answer. Raises EdgeMistralError if that fails."""
        written = {
            str(n): list(ids) for n, message in enumerate(self._messages)
            if message["role"] == "assistant" and isinstance(text := message.get("content"), str)
            and (ids := self._written.get(text)) is not None
        }
        self._engine.save(self.sequence, json.dumps({"messages": self._messages, "written": written}))

    def clear(self) -> None:
        """Delete the conversation, in the file too."""
        self._messages = []
        self._engine.save(self.sequence, json.dumps({"messages": [], "written": {}}), length=0)

    def close(self) -> None:
        """Save and close the file. Raises EdgeMistralError if saving fails; the file is closed in any case."""
        if self._open:
            self._open = False
            self._engine.unpin(self._sequence)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, notes: str) -> list[dict[str, Any]]:
        """The messages in a file's notes. Answers whose ids differ from the tokenizer's are remembered."""
        if not notes:
            return []
        fields = strict_json.parse(notes, f"{self.path}: notes", BadSession)
        try:
            messages = [dict(one) for one in fields["messages"] if isinstance(one["role"], str)]
            for n, ids in fields["written"].items():
                self._written.remember(messages[int(n)]["content"], [int(token) for token in ids])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise BadSession(f"{self.path}: its notes are not those of a conversation") from None
        return messages


class SessionFolder:
    """Sessions by name, for a server. Threads may share it."""

    def __init__(self, folder: Path, most: int = MOST_OPEN) -> None:
        """most: unused sessions that stay open. BadInput: the folder cannot be used."""
        self.folder, self._most = folder, most
        self._open: OrderedDict[str, Session] = OrderedDict()     # the least recently used first
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise BadInput(f"{folder}: cannot be the folder of sessions: {error.strerror}") from None

    def get(self, model: Model, name: str) -> Session:
        """The session with this name, made if there is none. BadRequest: an invalid name; BadSession: see `Model.session`."""
        if not re.fullmatch(SESSION_NAME, name) or name.lower() in RESERVED:
            raise BadRequest("session must be up to 100 letters, digits, - and _, and not the name of a device", "session")
        with self._lock:
            session = self._open.pop(name, None)
            if session is None:
                self._close_idle(model, self._most - 1)
                try:
                    session = model.session(self.folder / f"{name}.session")
                except BadSession as problem:                        # a client must not learn the path
                    raise BadSession(str(problem).replace(f"{self.folder}{os.sep}", "")) from None
                if session.notice:
                    logger.warning("%s", session.notice)
                self._close_idle(model, self._most - 1)              # it may be large
            self._open[name] = session
            return session

    def _close_idle(self, model: Model, most: int) -> None:
        """Close unused sessions until `most` are open, or fewer if they fill the memory for conversations."""
        for name in [one for one, held in self._open.items() if not model.engine.writes_to(held.sequence)]:
            if len(self._open) <= most and not model.engine.sessions_over_budget:
                break
            with contextlib.suppress(EdgeMistralError):              # the last save stays valid
                self._open.pop(name).close()


def binding_of(blob: Blob, kv_bits: int) -> dict[str, Any]:
    """Everything that decides the bits of the KV cache, so that a session is never used with another model."""
    return {
        "blob": blob.metadata[SEAL],
        "tokenizer": blob.metadata["sha256:tokenizer"],
        "template": hashlib.sha256(blob.metadata.get("text", "").encode()).hexdigest(),
        "kv_bits": kv_bits,
        "kv_version": KV_VERSION,
        "n_layers": blob.config.n_layers,
        "n_kv_heads": blob.config.n_kv_heads,
        "head_dim": blob.config.head_dim,
    }

