"""Finds the array behind an address, so that interpreted kernels can check the bounds of memory that they reach by address."""

from __future__ import annotations

import weakref
from bisect import bisect_right, insort
from typing import Any

from numpy.typing import NDArray

_starts: list[int] = []                                  # sorted
_arrays: dict[int, weakref.ref[NDArray[Any]]] = {}       # by start


def address_of(array: NDArray[Any]) -> int:
    """The address of an array's first byte. The array must live for as long as a kernel uses the address."""
    start = int(array.ctypes.data)
    if start not in _arrays:
        insort(_starts, start)
    _arrays[start] = weakref.ref(array)
    return start


def memory_at(address: int) -> tuple[NDArray[Any], int]:
    """The array that an address lies in, of those given to `address_of`, and its offset in bytes. IndexError: there is none."""
    at = bisect_right(_starts, address) - 1
    array = _arrays[_starts[at]]() if at >= 0 else None
    if array is None or address >= _starts[at] + array.nbytes:
        raise IndexError(f"address {address:#x} lies in no array that was given to `address_of`")
    return array, address - _starts[at]
