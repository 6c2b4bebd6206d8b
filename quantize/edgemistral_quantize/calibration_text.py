"""The calibration text: tokens of all kinds that a model reads, cut into windows.

The package's own text is in `calibration/`: prose from books in the public domain; program code, tables and mark-up;
several languages; conversations, which go through the model's chat template. A user's file is used unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import BadInput
from edgemistral.files import regular

METHODS = ("none", "fast", "full")
VERSION = 5                                    # of the methods: a run of another version cannot resume
WINDOW = 512                                   # tokens that see each other, the first of them <s>
WINDOWS = {"none": 0, "fast": 8, "full": 32}   # at most
FOLDER = Path(__file__).parent / "calibration"
ORDER = ("prose", "chat", "code", "languages")   # windows are taken from these in turn
SPEAKERS = {"system": "system", "user": "user", "assistant": "assistant"}


class Tokenizer(Protocol):
    """The part of the model's tokenizer that is needed."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""

    def encode(self, text: str) -> list[int]:
        """Ids without <s>."""

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of a conversation with <s>."""


@dataclass(frozen=True)
class Calibration:
    """A method and its tokens."""

    method: str                          # fast or full
    windows: list[NDArray[np.int32]]     # ids (n,), each beginning with <s>
    text_sha256: str                     # of the text before it was cut in tokens
    kinds: list[int]                     # the kind of text of each window

    @property
    def different(self) -> int:
        """How many different tokens there are: the number of samples of the statistics."""
        return len(np.unique(np.concatenate(self.windows)))

    def describe(self) -> dict[str, Any]:
        """As stored in a blob's metadata."""
        tokens = sum(map(len, self.windows))
        return {"method": self.method, "version": VERSION, "text_sha256": self.text_sha256, "tokens": tokens}


def read_calibration(method: str, text: Path | None, tokenizer: Tokenizer, context: int) -> Calibration | None:
    """The tokens for a method; None for "none". `text` replaces the package's own.

    Raises BadInput for an unknown method and for a text that cannot be read, is not UTF-8 or is empty.
    """
    if method not in METHODS:
        raise BadInput(f"calibrate is {method!r}; supported: {', '.join(METHODS)}")
    if method == "none":
        if text is not None:
            raise BadInput(f"calibration_text is {text}, but calibrate is 'none': nothing would read it")
        return None
    size = min(WINDOW, context)
    if text is None:
        parts = {kind: (FOLDER / f"{kind}.txt").read_text("utf-8") for kind in ORDER}
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        kinds = [_cut(_ids(kind, part, tokenizer), size, begin) for kind, part in parts.items()]
        content = "".join(parts.values())
    else:
        content = _read(text)
        kinds = [_cut(tokenizer.encode(content), size, [] if tokenizer.bos_id is None else [tokenizer.bos_id])]
    in_turn = list(_in_turn(kinds))[: WINDOWS[method]]
    windows = [window for _, window in in_turn]
    # Of a user's text, quarters stand for kinds.
    labels = [kind if text is None else len(ORDER) * i // len(windows) for i, (kind, _) in enumerate(in_turn)]
    return Calibration(method, windows, hashlib.sha256(content.encode()).hexdigest(), labels)


def conversations(text: str) -> Iterator[list[dict[str, Any]]]:
    """The conversations of chat.txt: separated by blank lines, `role: ` begins a message, other lines continue it."""
    for block in text.split("\n\n"):
        messages: list[dict[str, Any]] = []
        for line in block.splitlines():
            role, colon, content = line.partition(": ")
            if colon and role in SPEAKERS:
                messages.append({"role": role, "content": content})
            elif messages:
                messages[-1]["content"] += "\n" + line
        if messages:
            yield messages


def _ids(kind: str, text: str, tokenizer: Tokenizer) -> list[int]:
    if kind != "chat" or not tokenizer.chats:
        return tokenizer.encode(text)
    ids: list[int] = []
    for messages in conversations(text):
        try:
            ids += tokenizer.encode_chat(messages)
        except BadInput:          # for example, a template that refuses a system text
            ids += tokenizer.encode("\n\n".join(message["content"] for message in messages))
    return ids


def _cut(ids: list[int], size: int, begin: list[int]) -> list[NDArray[np.int32]]:
    """Windows of `size` tokens, `begin` before each. A shorter rest is used if it is all, or at least half a window."""
    step = max(size - 1, 1)
    pieces = [ids[at : at + step] for at in range(0, len(ids), step)]
    if len(pieces) > 1 and len(pieces[-1]) < step / 2:
        pieces.pop()
    return [np.array([*begin, *piece][:size], np.int32) for piece in pieces]


def _in_turn(kinds: Sequence[list[NDArray[np.int32]]]) -> Iterator[tuple[int, NDArray[np.int32]]]:
    for i in range(max(map(len, kinds), default=0)):
        for kind, windows in enumerate(kinds):
            for window in windows[i : i + 1]:
                yield kind, window


def _read(path: Path) -> str:
    try:
        content = regular.read(path, BadInput).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise BadInput(f"{path}: not UTF-8 text: byte {problem.start} is wrong") from None
    if not content.strip():
        raise BadInput(f"{path}: empty; a calibration text needs some thousand words")
    return content
