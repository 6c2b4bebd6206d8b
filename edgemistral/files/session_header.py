"""The header and the slots of a session file; `files.session` describes the whole file."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any, NamedTuple

from edgemistral.errors import BadSession
from edgemistral.files import records, regular, strict_json
from edgemistral.files.disk import Disk
from edgemistral.files.layout import round_up
from edgemistral.files.records import RECORD, SEGMENT, TRAILER, Geometry, Record

VERSION = 1
GRANULE = 1 << 16             # offsets of mappings are multiples of this
NOTES_OF_POSITION = 8         # bytes of compressed notes reserved for each position

MAGIC = b"edgemistral session\n"
HEAD = struct.Struct("<20sII")
STATE = struct.Struct("<8sQQ")
STATE_MAGIC = b"KVSTATE\n"
DIGEST = 32
# The message if a part of the binding differs; if several do, the first.
DIFFERENT = {
    "kv_bits": "holds keys and values of {theirs} bits; this model runs with --kv-bits {ours}",
    "kv_version": "holds keys and values in a format of another edgemistral ({theirs}; this one has {ours}): delete it to "
    "start again, or use that edgemistral",
    "tokenizer": "is of another model: the tokenizers differ",
    "template": "is of another model: the chat templates differ",
    "blob": "is of another model, {model}",
}


class State(NamedTuple):
    """A slot: the partial segment at the end of a turn, and the notes."""

    counter: int
    record: Record
    notes: bytes

    @property
    def positions(self) -> int:
        return SEGMENT * self.record.number + len(self.record.ids)


class Header(NamedTuple):
    binding: dict[str, Any]      # what the file is for
    model: str                   # name of the model's file when the session was made
    geometry: Geometry
    slot_bytes: int

    @property
    def start(self) -> int:
        """Where the segments begin."""
        return GRANULE + 2 * self.slot_bytes


def read_header(disk: Disk) -> Header:
    """The binding of a file, and the places of its parts. BadSession: it is not a session, is newer, or is damaged here."""
    path, head = disk.path, disk.read(0, HEAD.size)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise BadSession(f"{path}: not a session file; it was left as it is")
    _, version, size = HEAD.unpack(head)
    if version != VERSION:
        raise BadSession(f"{path}: has session format {version}, and this edgemistral reads format {VERSION}")
    rest = disk.read(HEAD.size, min(size, GRANULE) + DIGEST)
    text, digest = rest[:size], rest[size:]
    if digest_of(head + text) != digest:
        raise BadSession(f"{path}: its header is damaged, so it cannot be used; delete it to start again")
    fields = strict_json.parse(text, f"{path}: header", BadSession)
    try:
        geometry = Geometry(*(int(fields[name]) for name in Geometry._fields))
        header = Header(dict(fields["binding"]), str(fields["model"]), geometry, int(fields["slot_bytes"]))
    except (KeyError, TypeError, ValueError):
        raise BadSession(f"{path}: its header lacks fields that this edgemistral needs") from None
    if (
        not all(1 <= size < 1 << 40 for size in (*geometry, header.slot_bytes)) or geometry.block_bytes % 8
        or geometry.data_bytes + TRAILER > geometry.stride
    ):
        raise BadSession(f"{path}: its header does not describe the segments")
    return header


def is_session(path: Path) -> bool:
    """Whether a file begins like a session."""
    try:
        with regular.reading(path, BadSession) as file:
            return file.read(len(MAGIC)) == MAGIC
    except (BadSession, OSError):
        return False


def check(path: Path, found: Header, ours: Header) -> None:
    """Raise BadSession unless a file is for this model, this tokenizer, and this KV format."""
    for name, message in DIFFERENT.items():
        if found.binding.get(name) != ours.binding.get(name):
            words = {"theirs": found.binding.get(name), "ours": ours.binding.get(name), "model": found.model}
            raise BadSession(f"{path}: {message.format(**words)}")
    if found.binding != ours.binding or found.geometry != ours.geometry:
        raise BadSession(f"{path}: is of a model of another shape")


def encode_state(state: State) -> bytes:
    body = STATE.pack(STATE_MAGIC, state.counter, len(state.notes)) + records.encode(state.record) + state.notes
    return body + digest_of(body)


def digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def slot_bytes_of(context: int) -> int:
    return round_up(STATE.size + RECORD + DIGEST + NOTES_OF_POSITION * context, GRANULE)
