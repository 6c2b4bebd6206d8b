"""Freed blocks of the C library's allocator go back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

CODE = """if True:
    import ctypes
    from edgemistral.runtime.memory import LARGE, return_large_blocks

    class Counts(ctypes.Structure):           # struct mallinfo2
        _fields_ = [(name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "used", "free", "keepcost")]

    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype, libc.malloc.restype = Counts, ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    return_large_blocks()
    libc.free(libc.malloc(128 * LARGE))       # after this, glibc alone would keep blocks up to this size
    before = libc.mallinfo2().mapped
    block = libc.malloc(64 * LARGE)
    assert libc.mallinfo2().mapped >= before + 64 * LARGE
    libc.free(block)
    assert libc.mallinfo2().mapped == before
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_large_blocks_have_mappings_of_their_own():
    subprocess.run([sys.executable, "-c", CODE], check=True)
