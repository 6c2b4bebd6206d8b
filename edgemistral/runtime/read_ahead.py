"""If weights and KV cache together do not fit into memory: chooses layers to keep, and reads the others ahead of their use.

Every step reads all weights in the same order. A system that drops the pages unused for longest drops exactly those that are
needed next, and reads nearly everything again for each token. So some layers are streamed: their weights are read shortly
before the step needs them, and dropped after it. All other layers stay. Without a shortage, only the free memory is checked
now and then. Linux only: other systems have no such calls.

The advice changes no result: missing pages are read when they are used.
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
AHEAD = 2                # streamed layers in memory: the one in use and the next
LOOK = 2.0               # seconds between two checks of the memory
FULL = 0.95              # share of the room that is used
POLL = 0.001             # seconds between two checks of a step's position


class ReadAhead:
    """For one blob. Call `begin` and `end` around each step; in between a thread gives advice if layers are streamed."""

    def __init__(self, blob: Blob, layer: Callable[[], int], room: Callable[[], int | None] = memory_for_files) -> None:
        """layer: in which the current step is. room: bytes of files that fit into memory, or None if unknown."""
        self.streamed: list[int] = []                # layers
        self._layer_now, self._room = layer, room
        self._blob: Blob | None = blob
        self._pieces = [_layer(blob, layer) for layer in range(blob.config.n_layers)]
        self._weights = blob.data.nbytes - blob.tensors["tok_embeddings"].n_bytes      # a step reads few embeddings
        self._looked = -LOOK
        self._file = -1
        self._at = 0                                 # index in `streamed` of the next layer to drop
        self._layer = 0                              # the step's layer at the last check
        self._working, self._closed = threading.Event(), False
        self._lock = threading.Lock()                # held while the thread gives advice on the mapping
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
        """Stream as many layers as do not fit, spread evenly. Small changes of the memory keep the choice."""
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
        """The main function of the thread."""
        while not self._closed:
            self._working.wait()
            with self._lock:
                self._advise(self._layer_now())
            time.sleep(POLL)

    def _advise(self, layer: int) -> None:
        """The step is in this layer: drop the streamed layers before it, and ask for as many of the next ones."""
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
