"""The safetensors container (https://github.com/huggingface/safetensors), its header read as hostile input.

    8 bytes     little-endian length n of the header
    n bytes     JSON object, padded with spaces: "__metadata__" (strings by name) and, for every tensor by its name,
                {"dtype": "F32", "shape": [rows, cols], "data_offsets": [begin, end]}
    the rest    the tensors' bytes, little-endian and in C order; offsets count from here and leave no holes

Both the checkpoints that we read and the blobs that we write are such files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgemistral.errors import BadInput
from edgemistral.files import sniff, strict_json

MAX_HEADER = 1 << 24   # bytes: thousands of layers; the JSON of a hostile header cannot fill the memory
METADATA = "__metadata__"

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}


@dataclass(frozen=True)
class Entry:
    """One tensor as the header lists it; `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """A header that is consistent in itself and with the size of its file."""

    text: bytes                   # as stored, with its padding
    metadata: dict[str, str]
    tensors: dict[str, Entry]
    data_start: int               # bytes from the start of the file


def make_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str], alignment: int = 64
) -> bytes:
    """The first bytes of a file that holds these tensors (name, dtype, shape) one after another.

    Padded so that the data, which follows, starts at a multiple of `alignment` bytes.
    """
    header: dict[str, Any] = {METADATA: metadata} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def read_header(file: BinaryIO, path: Path, error: type[BadInput]) -> Header:
    """Read and check the header of an open file. Any fault raises `error` with `path` and the tensor's name.

    Then every tensor lies inside the file, has the size of its dtype and shape, and no two overlap.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(sniff.SNIFFED)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or not 2 <= length <= MAX_HEADER:
        what = sniff.describe_text(start)
        raise error(f"{path}: not a safetensors file{f' but {what}' if what else ''}")
    data_start = 8 + length
    if data_start > size:
        raise error(f"{path}: truncated inside its header ({size} bytes of at least {data_start})")
    file.seek(8)
    text = file.read(length)
    if len(text) != length or text[:1] != b"{":
        raise error(f"{path}: not a safetensors file")
    fields = strict_json.parse(text, f"{path}: the header", error)

    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"{path}: {METADATA} is not an object of strings")
    tensors = {name: _entry(fields[name], data_start, f"{path}: tensor {name[:80]!r}", error) for name in fields}

    end = data_start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        if entry.offset != end:
            raise error(f"{path}: tensor {name[:80]!r} overlaps its neighbour or leaves a hole before it")
        end += entry.n_bytes
    if end != size:
        what = "truncated" if end > size else "longer than its header says"
        raise error(f"{path}: {what} ({size} bytes instead of {end})")
    return Header(text, metadata, tensors, data_start)


def _entry(fields: Any, data_start: int, where: str, error: type[BadInput]) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise error(f"{where} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise error(f"{where}: shape and data_offsets must be lists of counts")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise error(f"{where}: {dtype} {shape} does not take the {end - begin} bytes that it is given")
    return Entry(dtype, tuple(shape), data_start + begin, end - begin)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
