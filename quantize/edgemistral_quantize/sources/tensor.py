"""A source tensor: its rows are read when needed, and every value is checked to be finite.

Tensors are read with file reads instead of a mapping: a disk error is then an exception with a name instead of a crash, and no
pages stay mapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import BadCheckpoint
from edgemistral.files import regular
from edgemistral.files.safetensors import Entry

Strip = NDArray[Any]   # rows of a tensor in the checkpoint's dtype; numpy has no bfloat16: its bits as uint16

DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"),
}
EXPONENT = {"<u2": 0x7F80, "<f2": 0x7C00, "<f4": 0x7F800000}   # all of these bits set: infinity or NaN


class Tensor(Protocol):
    """A matrix (rows, cols), or a vector, which is one row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the model."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the strips: float32, float16, or uint16 for the bits of bfloat16."""

    @property
    def held_bytes(self) -> int:
        """Memory that reading needs in addition to the strips."""

    def read(self, begin: int, end: int) -> Strip:
        """Rows (end - begin, cols). Raises BadCheckpoint for a NaN, an infinity, or a read error."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file: its name there, and the place of its bytes."""

    name: str
    path: Path
    entry: Entry

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<f4") if self.entry.dtype == "F64" else DTYPES[self.entry.dtype]

    held_bytes = 0

    def read(self, begin: int, end: int) -> Strip:
        cols, stored = self.shape[-1], DTYPES[self.entry.dtype]
        strip = np.empty((end - begin, cols), stored)
        read_into(strip, self.path, self.entry.offset + begin * cols * stored.itemsize, str(self))
        if self.entry.dtype == "F64":
            with np.errstate(over="ignore"):   # an overflow gives an infinity, which is refused below
                strip = strip.astype(np.float32)
        check_finite(strip, begin, str(self))
        if len(self.shape) == 1 and strip.size and not strip.any():     # a norm of zeros: the model would not work
            raise BadCheckpoint(f"{self} is nothing but zeros; was the download finished?")
        return strip


@dataclass(frozen=True)
class HalvedPairs:
    """Rows of whole heads whose rotary pairs are neighbours (2i, 2i + 1), given as pairs (i, i + head_dim / 2).

    `read` takes multiples of head_dim rows.
    """

    tensor: Tensor
    head_dim: int

    def __str__(self) -> str:
        return str(self.tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.tensor.dtype

    @property
    def held_bytes(self) -> int:
        return self.tensor.held_bytes

    def read(self, begin: int, end: int) -> Strip:
        rows = self.tensor.read(begin, end)
        heads = rows.reshape(-1, self.head_dim // 2, 2, rows.shape[1])
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def n_bytes(tensor: Tensor) -> int:
    """Bytes of all strips together."""
    return int(np.prod(tensor.shape)) * tensor.dtype.itemsize


def read_into(array: NDArray[Any], path: Path, offset: int, what: str) -> None:
    """Fill a contiguous array from a place in a file; `what` begins the message of an error."""
    try:
        with regular.reading(path, BadCheckpoint) as file:
            file.seek(offset)
            n_read = file.readinto(array.data.cast("B"))
    except OSError as problem:
        raise BadCheckpoint(f"{what} cannot be read: {problem.strerror or problem}") from None
    if n_read != array.nbytes:
        raise BadCheckpoint(f"{what} ends early: the file was changed while it was read")


def check_finite(strip: Strip, begin: int, what: str) -> None:
    """Raise BadCheckpoint for a NaN or an infinity; row 0 of the strip is row `begin` of the tensor."""
    bits = strip.view(f"<u{strip.dtype.itemsize}")
    exponent = EXPONENT[strip.dtype.newbyteorder("<").str]
    exponents = bits & bits.dtype.type(exponent)
    if exponents.max() == exponent:
        row = begin + int((exponents == exponent).any(axis=1).argmax())
        raise BadCheckpoint(f"{what} has a NaN or infinity in row {row}")
