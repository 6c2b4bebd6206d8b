"""The header of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), read as hostile input.

    4 bytes    "GGUF"
    uint32     version: 2 or 3
    uint64     number of tensors, then of metadata fields
    fields     key, type, value; a string is its length as uint64 and UTF-8; an array its type, its length, its values
    tensors    name, number of dimensions, dimensions (columns first), type, offset from the start of the data
    the data   from the next multiple of `general.alignment` bytes on

Every count is checked against the remaining bytes before it is used, so that a short file cannot ask for much memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from edgemistral.errors import BadCheckpoint
from edgemistral.files import regular

MAX_HEADER = 1 << 28    # bytes: the largest vocabularies take 20 MiB
MAX_COUNT = 1 << 16     # of fields and of tensors
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", BOOL: "<B", 10: "<Q", 11: "<q", 12: "<d"}
NUMPY: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"), 5: np.dtype("<i4"),
    6: np.dtype("<f4"), BOOL: np.dtype("u1"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorType:
    """How values are stored: `block` values of a row in `n_bytes` bytes."""

    name: str
    block: int
    n_bytes: int


TYPES = {   # by their numbers in ggml; all others are not read
    0: TensorType("F32", 1, 4), 1: TensorType("F16", 1, 2), 30: TensorType("BF16", 1, 2),
    2: TensorType("Q4_0", 32, 18), 3: TensorType("Q4_1", 32, 20), 6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24), 8: TensorType("Q8_0", 32, 34), 20: TensorType("IQ4_NL", 32, 18),
    10: TensorType("Q2_K", 256, 84), 11: TensorType("Q3_K", 256, 110), 12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176), 14: TensorType("Q6_K", 256, 210), 23: TensorType("IQ4_XS", 256, 136),
}


@dataclass(frozen=True)
class GgufEntry:
    """A tensor as the header lists it; its offset counts bytes from the start of the file."""

    type: TensorType
    shape: tuple[int, ...]   # rows first
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A header that is consistent in itself and with the size of its file.

    Metadata values: int, float, bool, str; arrays of numbers are NumPy arrays, arrays of strings lists of bytes.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufEntry]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check a header; BadCheckpoint names the file and what is wrong with it."""
    try:
        with regular.reading(path, BadCheckpoint) as file:
            return _Reader(file, path, path.stat().st_size).header()
    except OSError as problem:
        raise BadCheckpoint(f"{path}: cannot be read: {problem.strerror or problem}") from None


class _Reader:
    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size
        self.at = 0   # bytes read so far

    def header(self) -> GgufHeader:
        if self.take(4, "the magic") != b"GGUF":
            raise BadCheckpoint(f"{self.path}: not a GGUF file")
        version = self.number("<I", "the version")
        if version not in (2, 3):
            what = "big-endian" if version >= 1 << 16 else f"of version {version}"
            raise BadCheckpoint(f"{self.path}: a GGUF file {what}; supported: little-endian ones of versions 2 and 3")
        n_tensors, n_fields = self.number("<Q", "the counts"), self.number("<Q", "the counts")
        if max(n_tensors, n_fields) > MAX_COUNT:
            self.fail(f"claims {n_tensors} tensors and {n_fields} metadata fields")
        metadata: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self.text("a key of the metadata")
            if key in metadata:
                self.fail(f"has the metadata field {key[:80]!r} twice")
            metadata[key] = self.value(self.number("<I", key), f"metadata field {key[:80]!r}")
        listed = [self.tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            self.fail(f"has the alignment {alignment!r}")
        return GgufHeader(metadata, self.place(listed, -(-self.at // alignment) * alignment, alignment))

    def tensor(self) -> tuple[str, list[int], int, int]:
        name = self.text("a tensor's name")
        n_dims = self.number("<I", f"tensor {name[:80]!r}")
        if not 1 <= n_dims <= 4:
            self.fail(f"tensor {name[:80]!r} has {n_dims} dimensions")
        dims = [self.number("<Q", f"tensor {name[:80]!r}") for _ in range(n_dims)]
        return name, dims, self.number("<I", name), self.number("<Q", name)

    def place(self, listed: list[tuple[str, list[int], int, int]], start: int, alignment: int) -> dict[str, GgufEntry]:
        """The entries, checked to lie inside the file without overlaps."""
        entries: dict[str, GgufEntry] = {}
        for name, dims, type_number, offset in listed:
            what = f"tensor {name[:80]!r}"
            if name in entries:
                self.fail(f"has {what} twice")
            if type_number not in TYPES:
                supported = ", ".join(kind.name for kind in TYPES.values())
                self.fail(f"{what} has the type number {type_number}; supported: {supported}")
            kind, n_values = TYPES[type_number], 1
            for length in dims:
                n_values *= length
            if not all(0 < length <= 1 << 32 for length in dims) or dims[0] % kind.block:
                self.fail(f"{what} has the dimensions {dims} as {kind.name}")
            n_bytes = n_values // kind.block * kind.n_bytes
            if offset % alignment or start + offset + n_bytes > self.size:
                self.fail(f"{what} lies outside the file or at an odd place (offset {offset}, {n_bytes} bytes); "
                          "is the download complete?")
            shape = tuple(reversed(dims))
            while len(shape) > 1 and shape[0] == 1:   # vectors may be written with further dimensions of 1
                shape = shape[1:]
            entries[name] = GgufEntry(kind, shape, start + offset, n_bytes)
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
            if entry.offset < end:
                self.fail(f"tensor {name[:80]!r} overlaps its neighbour")
            end = entry.offset + entry.n_bytes
        return entries

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.raw(what).decode("utf-8", "replace")
        if kind in SCALARS:
            number = self.number(SCALARS[kind], what)
            return bool(number) if kind == BOOL else number
        if kind != ARRAY:
            self.fail(f"{what} has the unknown type {kind}")
        kind, length = self.number("<I", what), self.number("<Q", what)
        if kind == STRING:
            self.check(8 * length, what)
            return [self.raw(what) for _ in range(length)]
        if kind not in NUMPY:
            self.fail(f"{what} is an array of the unknown type {kind}")
        return np.frombuffer(self.take(length * NUMPY[kind].itemsize, what), NUMPY[kind])

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        return self.raw(what).decode("utf-8", "replace")

    def raw(self, what: str) -> bytes:
        return self.take(self.number("<Q", what), what)

    def check(self, n: int, what: str) -> None:
        if n > self.size - self.at:
            self.fail(f"ends inside {what}, which takes {n} bytes; is the download complete?")
        if self.at + n > MAX_HEADER:
            self.fail(f"has a header of more than {MAX_HEADER >> 20} MiB")

    def take(self, n: int, what: str) -> bytes:
        self.check(n, what)
        data = self.file.read(n)
        if len(data) != n:
            self.fail(f"ends inside {what}; is the download complete?")
        self.at += n
        return data

    def fail(self, what: str) -> NoReturn:
        raise BadCheckpoint(f"{self.path}: a GGUF file that {what}" if not what.startswith(("tensor", "metadata"))
                            else f"{self.path}: {what}")
