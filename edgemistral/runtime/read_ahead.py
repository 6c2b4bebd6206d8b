"""Where weights and keys and values do not fit into memory together: which layers stay there, and which are read in time.

A step reads all weights in the same order as the step before. A system that drops what was not used for longest then drops
always what is needed next, and reads nearly everything again for each token. So some layers are streamed instead: their
weights are asked for before the step comes to them and let go of behind it, and all others stay. Without a shortage nothing is
done but to look, now and then. Linux only: other systems have no such calls.

Advice changes no result: whatever is missing is read when it is touched.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable

from edgemistral.files.blob import Blob
from edgemistral.runtime.memory import memory_for_files

CAN_ADVISE = hasattr(os, "posix_fadvise") and hasattr(mmap, "MADV_DONTNEED")
PHASES_OF_LAYER = 9      # of `forward`, after one for the embeddings
AHEAD = 2                # streamed layers that are in memory: the one in use and the next
LOOK = 2.0               # seconds between two looks at the memory
FULL = 0.95              # share of the room that is used
POLL = 0.001             # seconds between two looks at where a step is


class ReadAhead:
    """For one blob. `begin` and `end` stand around each step; a thread advises meanwhile, if there is anything to advise."""

    def __init__(self, blob: Blob, phase: Callable[[], int], room: Callable[[], int | None] = memory_for_files) -> None:
        """phase: of the step at hand. room: bytes of files that can be in memory, or None if nobody knows."""
        self.streamed: list[int] = []                # layers
        self._phase, self._room = phase, room
        self._blob: Blob | None = blob
        self._pieces = [_layer(blob, layer) for layer in range(blob.config.n_layers)]
        self._weights = blob.data.nbytes - blob.tensors["tok_embeddings"].n_bytes      # of which a step reads some rows
        self._looked = -LOOK
        self._file = -1
        self._at = 0                                 # index in `streamed` of the next layer to let go of
        self._layer = 0                              # that the step was in when the thread last looked
        self._working, self._closed = threading.Event(), False
        self._lock = threading.Lock()                # around what the thread does to the mapping
        self._thread: threading.Thread | None = None

    def begin(self, kv_bytes: int) -> None:
        """A step begins; kv_bytes: of the sequences in it."""
        if not CAN_ADVISE:
            return
        now = time.monotonic()
        if now - self._looked >= LOOK:
            self._looked = now
            self._choose(kv_bytes)
        if self.streamed:
            self._working.set()

    def end(self) -> None:
        """The step has ended."""
        self._working.clear()

    def close(self) -> None:
        with self._lock:
            self._closed, self._blob = True, None
            self._working.set()
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _choose(self, kv_bytes: int) -> None:
        """Stream as many layers as the memory is short of, evenly among the others; few changes keep what is there."""
        room, layers, size = self._room(), len(self._pieces), max(size for _, size in self._pieces)
        short = 0 if room is None else self._weights + kv_bytes - int(FULL * room)
        n = 0 if short <= 0 else min(layers, -(-short // size) + AHEAD)
        if n == len(self.streamed) or (n and self.streamed and abs(n - len(self.streamed)) < 2):
            return
        with self._lock:
            self.streamed = [layer for layer in range(layers) if (layer + 1) * n // layers > layer * n // layers]
            self._at = 0
            if n and self._blob is not None and self._thread is None:
                with contextlib.suppress(OSError):
                    self._file = os.open(self._blob.path, os.O_RDONLY | os.O_CLOEXEC)
                self._thread = threading.Thread(target=self._work, name="edgemistral-read-ahead", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        """The life of the thread."""
        while not self._closed:
            self._working.wait()
            with self._lock:
                self._advise((self._phase() - 1) // PHASES_OF_LAYER)
            time.sleep(POLL)

    def _advise(self, layer: int) -> None:
        """The step is in this layer: let go of the streamed ones behind it, and ask for as many of those that come."""
        streamed = self.streamed
        n = len(streamed)
        if not n or self._blob is None or self._file < 0:
            return
        new_step, self._layer = layer < self._layer, layer
        while self._at < n and (new_step or streamed[self._at] < layer):
            self._let_go(streamed[self._at])
            self._ask_for(streamed[(self._at + AHEAD) % n])
            self._at += 1
        if new_step:
            self._at = 0

    def _ask_for(self, layer: int) -> None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._file, *self._pieces[layer], os.POSIX_FADV_WILLNEED)

    def _let_go(self, layer: int) -> None:
        assert self._blob is not None
        with contextlib.suppress(OSError):
            self._blob.let_go(*self._pieces[layer])
            os.posix_fadvise(self._file, *self._pieces[layer], os.POSIX_FADV_DONTNEED)


def _layer(blob: Blob, layer: int) -> tuple[int, int]:
    """Offset and size of the whole pages that hold a layer's weights only."""
    spans = [(blob.offsets[name], blob.offsets[name] + tensor.n_bytes) for name, tensor in blob.tensors.items()
             if name.startswith(f"layers.{layer}.")]
    page = mmap.PAGESIZE
    first = -(-min(start for start, _ in spans) // page) * page
    return first, max(page, max(end for _, end in spans) // page * page - first)
