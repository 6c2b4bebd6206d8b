"""Compiles `forward` on all cores: this process and helpers take its parts from one list, then one of them compiles the rest.

There is one `forward` for each format of the KV cache; only attention and what precedes it differ between them.

The command line starts helpers as soon as they are needed, while it opens the blob. Other programs that import edgemistral
start no process: they may not want one, and `sys.executable` may be the program itself.
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

MOST_HELPERS = 3      # there are few parts, and each process imports the compiler


class Job(NamedTuple):
    """A part, named so that another process finds it."""

    module: str
    name: str
    signature: tuple[Any, ...]      # numba's types

    @property
    def function(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


class Goal(NamedTuple):
    """`forward` for one format of the KV cache, and its parts."""

    kv_bits: int
    signature: tuple[Any, ...]
    jobs: Sequence[Job] = ()

    @property
    def forward(self) -> Any:
        return FORWARD[self.kv_bits]

    @property
    def is_reached(self) -> bool:
        """Whether its code is in the cache."""
        return jit.is_cached(self.forward, self.signature)


def compile_forward(common: Sequence[Any], own: Any) -> None:
    """Load from the cache, or compile, the code of `forward` for these arguments, without running it."""
    if INTERPRET:
        return
    goal = _goal(common, own)
    if goal.signature in goal.forward.overloads:
        return
    shared = [one for one in _helpers.goals if one[:2] == goal[:2]] if _helpers is not None else []
    if _helpers is not None and shared and not goal.is_reached:
        if jit.on_compile is not None:
            jit.on_compile(goal.forward.__name__)
        _helpers.finish(*shared)
        if jit.on_compiled is not None:
            jit.on_compiled()
    goal.forward.compile(goal.signature)


_helpers: Helpers | None = None


@contextmanager
def helpers(*calls: tuple[Sequence[Any], Any]) -> Iterator[None]:
    """While inside, other processes compile what `compile_forward` needs for these (common, own) and is not in the cache."""
    global _helpers
    wanted = min(MOST_HELPERS, (os.cpu_count() or 1) - 1)
    able = not INTERPRET and wanted > 0 and _helpers is None and sys.executable and not getattr(sys, "frozen", False)
    goals = [goal._replace(jobs=_jobs(*call)) for call in calls if not (goal := _goal(*call)).is_reached] if able else []
    if not goals:
        yield
        return
    with Helpers(goals, wanted) as _helpers:
        try:
            yield
        finally:
            _helpers = None


class Helpers:
    """Processes that compile parts, and the folder where they leave them."""

    def __init__(self, goals: Sequence[Goal], n: int) -> None:
        self.goals = goals
        self._folder = tempfile.TemporaryDirectory(prefix="edgemistral-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        (folder / "goals").write_bytes(pickle.dumps(goals))
        code = f"import json, sys; sys.path[:], folder = json.loads(sys.argv[1]); from {__name__} import *; help_out(folder)"
        given = [str(Path(entry).absolute()) for entry in sys.path], str(folder)
        command = [sys.executable, "-c", code, json.dumps(given)]
        self._processes: list[subprocess.Popen[bytes]] = []
        with contextlib.suppress(OSError):      # no process can be started: this one works alone
            for _ in range(n):
                self._processes.append(subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        self.workshop = parts.Workshop(folder, self._working)

    def finish(self, goal: Goal) -> None:
        """Help until the goal is reached, or this process must do the last step."""
        with parts.working_in(self.workshop):
            for job in reversed(goal.jobs):      # the small ones, while helpers make the large ones
                parts.make_part(self.workshop, job.function, job.signature)
            if not self.workshop.claim(_entry(goal)):
                self.workshop.wait_for(_entry(goal), lambda: goal.is_reached)
            goal.forward.compile(goal.signature)

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
        for goal in pickle.loads((shop.folder / "goals").read_bytes()):
            for job in goal.jobs:
                parts.make_part(shop, job.function, job.signature)
            if shop.claim(_entry(goal)):
                goal.forward.compile(goal.signature)


def _entry(goal: Goal) -> str:
    """The name under which a process claims the last step of a goal."""
    return f"entry-{goal.kv_bits}"


def _end_with_parent() -> None:
    sys.stdin.buffer.read()      # the pipe closes when the parent ends, in every case
    os._exit(0)


def _goal(common: Sequence[Any], own: Any) -> Goal:
    return Goal(common[2].bits, _types(_arguments(common, own)))


def _jobs(common: Sequence[Any], own: Any) -> list[Job]:
    named = parts_of(*_arguments(common, own))  # type: ignore[no-untyped-call]
    return [Job(module, name, _types(arguments)) for module, name, arguments in named]


def _arguments(common: Sequence[Any], own: Any) -> tuple[Any, ...]:
    return Member(0, 1, np.zeros(SYNC_SIZE, np.int64), np.zeros(1, np.int64)), *common, own


def _types(arguments: Sequence[Any]) -> tuple[Any, ...]:
    from numba import typeof

    return tuple(typeof(argument) for argument in arguments)  # type: ignore[no-untyped-call]
