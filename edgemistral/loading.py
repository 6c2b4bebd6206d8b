"""Loading with progress: reads the file and compiles the kernels now. Otherwise the first answer does both."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edgemistral.files.blob import Blob

LoadProgress = Callable[[str, int, int], object]     # (stage, done, total)

PIECE = 64 << 20      # bytes between two calls
PAGE = 4096           # the smallest page of any system
_hooks = threading.Lock()      # the compiler has only one callback


def told(progress: LoadProgress, blob: Blob, first_step: Callable[[], object]) -> None:
    """Read the blob into memory if it fits, compile by running a first step, and report both to `progress`."""
    _read(progress, blob)
    _compile(progress, first_step)


def _read(progress: LoadProgress, blob: Blob) -> None:
    from edgemistral.runtime.memory import physical_memory

    data, total = blob.data, blob.data.nbytes
    progress("reading", 0, total)
    if total < 0.8 * physical_memory():      # otherwise the first pages would be dropped before their use
        for start in range(0, total, PIECE):
            np.bitwise_or.reduce(data[start : start + PIECE : PAGE])
            progress("reading", min(start + PIECE, total), total)


def _compile(progress: LoadProgress, first_step: Callable[[], object]) -> None:
    """Report only kernels that are compiled, not those from the cache; without any, the stage is (0, 0)."""
    from edgemistral.kernels import jit

    begun = done = 0

    def on_compile(name: str) -> None:
        nonlocal begun
        begun += 1
        progress("compiling", done, begun)
        if before[0] is not None:
            before[0](name)

    def on_compiled() -> None:
        nonlocal done
        done += 1
        progress("compiling", done, begun)
        if before[1] is not None:
            before[1]()

    progress("compiling", 0, 0)
    with _hooks:
        before = jit.on_compile, jit.on_compiled
        jit.on_compile, jit.on_compiled = on_compile, on_compiled
        try:
            first_step()
        finally:
            jit.on_compile, jit.on_compiled = before
    progress("compiling", done, done)
