"""bfloat16, which NumPy lacks: its bits are kept as uint16, the upper half of a float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def widen(x: NDArray[Any]) -> NDArray[np.float32]:
    """The numbers of a checkpoint as float32, exactly: bits of bfloat16 (uint16), float16, or float32 (which is not copied)."""
    if x.dtype == np.uint16:
        bits = x.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return x.astype(np.float32, copy=False)


def to_bf16(x: NDArray[Any]) -> NDArray[np.uint16]:
    """The same numbers as bits of the nearest bfloat16, ties to even."""
    if x.dtype == np.uint16:
        return x
    wide = np.ascontiguousarray(widen(x))
    bits = wide.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    if (odd := np.isnan(wide)).any():      # rounding could carry over into the sign
        rounded[odd] = bits[odd] >> 16 | 0x40
    return rounded
