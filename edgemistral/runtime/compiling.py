"""Compiles `forward` on all cores: this process and helpers take its parts from one list, then one of them compiles the rest.

The command line starts helpers as soon as they are needed, while it makes the demo model or opens the blob. Other programs
that import edgemistral start no process: they may not want one, and `sys.executable` may be the program itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgemistral.kernels import jit, parts
from edgemistral.kernels.forward import FORWARD, parts_of
from edgemistral.kernels.lowering import INTERPRET
from edgemistral.kernels.sync import SYNC_SIZE, Member

MOST_HELPERS = 3      # there are few parts, and a third of the work is the last step, which one process does alone
ENTRY = "entry"       # the name under which a process claims that step


class Job(NamedTuple):
    """A part, named so that another process finds it."""

    module: str
    name: str
    signature: tuple[Any, ...]      # numba's types

    @property
    def function(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


def compile_forward(common: Sequence[Any], own: Any) -> None:
    """Load from the cache, or compile, the code of `forward` for these arguments, without running it."""
    if INTERPRET:
        return
    forward, signature = _forward(common), _types(_arguments(common, own))
    if signature in forward.overloads:
        return
    if _helpers is not None and _helpers.forward is forward and not jit.is_cached(forward, signature):
        if jit.on_compile is not None:
            jit.on_compile(forward.__name__)
        _helpers.finish()
        if jit.on_compiled is not None:
            jit.on_compiled()
    forward.compile(signature)


_helpers: Helpers | None = None


@contextmanager
def helpers(common: Sequence[Any], own: Any) -> Iterator[None]:
    """While inside, other processes compile what `compile_forward` needs and the cache does not have."""
    global _helpers
    signature = () if INTERPRET else _types(_arguments(common, own))
    wanted = min(MOST_HELPERS, (os.cpu_count() or 1) - 1)
    if INTERPRET or wanted < 1 or _helpers is not None or not sys.executable or getattr(sys, "frozen", False) \
            or jit.is_cached(_forward(common), signature):
        yield
        return
    named = parts_of(*_arguments(common, own))  # type: ignore[no-untyped-call]
    jobs = [Job(module, name, _types(arguments)) for module, name, arguments in named]
    with Helpers(_kv_bits(common), jobs, signature, wanted) as _helpers:
        try:
            yield
        finally:
            _helpers = None


class Helpers:
    """Processes that compile parts, and the folder where they leave them."""

    def __init__(self, kv_bits: int, jobs: Sequence[Job], signature: tuple[Any, ...], n: int) -> None:
        self.forward, self.jobs, self.signature = FORWARD[kv_bits], jobs, signature
        self._folder = tempfile.TemporaryDirectory(prefix="edgemistral-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        (folder / "jobs").write_bytes(pickle.dumps((kv_bits, jobs, signature)))
        code = f"import json, sys; sys.path[:], folder = json.loads(sys.argv[1]); from {__name__} import *; help_out(folder)"
        given = [str(Path(entry).absolute()) for entry in sys.path], str(folder)
        command = [sys.executable, "-c", code, json.dumps(given)]
        self._processes: list[subprocess.Popen[bytes]] = []
        with contextlib.suppress(OSError):      # no process can be started: this one works alone
            for _ in range(n):
                self._processes.append(subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        self.workshop = parts.Workshop(folder, self._working)

    def finish(self) -> None:
        """Help until `forward` is compiled, or this process must do the last step."""
        with parts.working_in(self.workshop):
            for job in reversed(self.jobs):      # the small ones, while helpers make the large ones
                parts.make_part(self.workshop, job.function, job.signature)
            if not self.workshop.claim(ENTRY):
                self.workshop.wait_for(ENTRY, lambda: jit.is_cached(self.forward, self.signature))
            self.forward.compile(self.signature)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        self._folder.cleanup()

    def _working(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def help_out(folder: str) -> None:
    """The main function of a helper: compiles parts that no process has claimed, and ends with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    shop = parts.Workshop(Path(folder), lambda: True)
    with parts.working_in(shop):
        kv_bits, jobs, signature = pickle.loads((shop.folder / "jobs").read_bytes())
        for job in jobs:
            parts.make_part(shop, job.function, job.signature)
        if shop.claim(ENTRY):
            FORWARD[kv_bits].compile(signature)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()      # the pipe closes when the parent ends, in every case
    os._exit(0)


def _kv_bits(common: Sequence[Any]) -> int:
    return int(common[2].bits)


def _forward(common: Sequence[Any]) -> Any:
    return FORWARD[_kv_bits(common)]


def _arguments(common: Sequence[Any], own: Any) -> tuple[Any, ...]:
    return Member(0, 1, np.zeros(SYNC_SIZE, np.int64), np.zeros(1, np.int64)), *common, own


def _types(arguments: Sequence[Any]) -> tuple[Any, ...]:
    from numba import typeof

    return tuple(typeof(argument) for argument in arguments)  # type: ignore[no-untyped-call]
