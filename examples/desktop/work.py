"""Slow work on threads. Qt passes signals between threads, so receivers run on the window's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from edgemistral_quantize import quantize
from PySide6.QtCore import QObject, Signal

import edgemistral


class Work(QObject):
    """One model and one answer at a time, and quantizing at the same time."""

    loading = Signal(str, int, int)         # stage, done, total
    loaded = Signal()
    piece = Signal(str)
    reading = Signal(int, int)              # tokens of the prompt: done, total
    answered = Signal()
    quantizing = Signal(int)                # percent
    quantized = Signal(str)                 # path
    failed = Signal(str, str)               # what: "load", "answer" or "quantize"; why

    def __init__(self) -> None:
        super().__init__()
        self.model: edgemistral.Model | None = None
        self.reply: edgemistral.Reply | None = None
        self._closing = False
        self._threads: list[threading.Thread] = []

    def load(self, path: Path, kv_store: Path) -> None:
        """Close the loaded model, and load this one."""
        def work() -> None:
            if self.model is not None:
                old, self.model = self.model, None
                old.close()
            model = edgemistral.load(path, on_overflow="drop-oldest", kv_store=kv_store, progress=self._loading)
            self.model = model
            self.loaded.emit()

        self._start("load", work)

    def answer(self, messages: list[dict[str, str]]) -> None:
        def work() -> None:
            assert self.model is not None
            reply = self.reply = self.model.chat(messages, temperature=0.7, top_p=0.95, progress=self.reading.emit)
            if self._closing:
                reply.cancel()
            for piece in reply:
                self.piece.emit(piece)
            self.answered.emit()

        self.reply = None
        self._start("answer", work)

    def stop(self) -> None:
        """Stop the answer within one token."""
        if self.reply is not None:
            self.reply.cancel()

    def quantize(self, source: Path, destination: Path) -> None:
        def work() -> None:
            self.quantized.emit(str(quantize(source, destination, resume=True, progress=self._quantizing)))

        self._start("quantize", work)

    def close(self) -> None:
        """End everything and free the model. Quantizing can be resumed."""
        self._closing = True
        self.stop()
        for thread in self._threads:
            thread.join()
        if self.model is not None:
            self.model.close()

    def _loading(self, stage: str, done: int, total: int) -> None:
        self._check()
        self.loading.emit(stage, done >> 20, total >> 20) if stage == "reading" else self.loading.emit(stage, done, total)

    def _quantizing(self, done: int, total: int) -> None:
        self._check()
        self.quantizing.emit(100 * done // total)

    def _check(self) -> None:
        if self._closing:
            raise edgemistral.Cancelled("the application ends")

    def _start(self, what: str, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except edgemistral.Cancelled:
                pass
            except Exception as error:
                self.failed.emit(what, str(error))

        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=guarded, name=f"desktop-{what}"))
        self._threads[-1].start()
