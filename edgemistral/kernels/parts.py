"""How the functions that make up an entry are compiled: once, and if there are helpers, in several processes.

numba optimizes every function that it compiles and makes machine code of it, and does both again in every caller. Python never
calls the inner functions of a kernel, so here only the entry becomes machine code. Only the entry and the inlined functions
are optimized: the others end up in the entry. (Inlined ones need it: attention in 4 bits is 30 % slower without.) The results
do not change.

numba holds the interpreter's lock while it compiles, so more cores need more processes. They share a folder: a process claims
the part that it makes, and keeps it there as LLVM bitcode for the process that compiles the entry. See `runtime.compiling`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from numba.core import caching
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from edgemistral.kernels.stored import digest_of

# ---- no machine code but the entry's --------------------------------------------------------------

class _Library(JITCodeLibrary):
    """Code of one function. Only `entry` becomes machine code; the others are linked into it."""

    entry = ""
    inlined: ClassVar[set[str]] = set()      # names of functions that are optimized before their caller

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        self._is_entry = name == self.entry

    def _optimize_final_module(self) -> None:
        if self._is_entry or self.name in self.inlined:
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        if self._is_entry:
            super()._finalize_final_module()
        else:
            self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return int(super().get_pointer_to_function(name)) if self._is_entry else 0

    def serialize_using_object_code(self) -> Any:
        return super().serialize_using_object_code() if self._is_entry else self.serialize_using_bitcode()

    @property
    def codegen(self) -> Any:
        return super().codegen if self._is_entry else _NoCode


def inlined(function: Callable[..., Any]) -> None:
    """Say that this function is always inlined."""
    _Library.inlined.add(function.__qualname__)


class _NoCode:
    """Replaces the engine of a function without machine code, which has no environment to set."""

    @staticmethod
    def set_env(*_: object) -> None:
        pass


@contextmanager
def _only_entry_is_emitted(entry: str) -> Iterator[None]:
    """While inside, numba makes machine code of functions of this qualified name only."""
    with global_compiler_lock:
        codegen = cpu_target.target_context.codegen()
        before, collecting = (codegen._library_class, _Library.entry), gc.isenabled()
        codegen._library_class, _Library.entry = _Library, entry
        gc.disable()      # compiling makes millions of objects and very few cycles
        try:
            yield
        finally:
            codegen._library_class, _Library.entry = before
            if collecting:
                gc.enable()


@contextmanager
def everything_is_emitted() -> Iterator[None]:
    """While inside, numba works as usual: for a cached entry that another entry calls."""
    with global_compiler_lock:
        codegen = cpu_target.target_context.codegen()
        before, codegen._library_class = codegen._library_class, JITCodeLibrary
        try:
            yield
        finally:
            codegen._library_class = before


def as_entry(compile_: Callable[..., Any], name: str) -> Callable[..., Any]:
    """numba's function that compiles the entry `name`, changed to make machine code of the entry only."""

    @functools.wraps(compile_)
    def compile_entry(*arguments: Any) -> Any:
        with _only_entry_is_emitted(name):
            return compile_(*arguments)

    return compile_entry


def compile_part(dispatcher: Any, signature: tuple[Any, ...]) -> None:
    """Compile an inner function on its own, for the entry that will call it."""
    with _only_entry_is_emitted(""):
        dispatcher.compile(signature)


# ---- parts that several processes make -----------------------------------------------------------------------------------

class Workshop:
    """A folder in which processes share the parts of an entry. `others_work()`: whether other processes still work."""

    def __init__(self, folder: Path, others_work: Callable[[], bool]) -> None:
        self.folder, self.others_work = folder, others_work

    def claim(self, key: str) -> bool:
        """Whether this process is the first to take this work."""
        try:
            (self.folder / f"{key}.claim").touch(exist_ok=False)
        except OSError:
            return False
        return True

    def wait_for(self, key: str, there: Callable[[], bool]) -> None:
        """Wait until work claimed by another process is done, or no process is left to do it."""
        while (self.folder / f"{key}.claim").exists() and not there() and self.others_work():
            time.sleep(0.01)


workshop: Workshop | None = None
"""Where this process makes and finds parts; None: it compiles alone."""


@contextmanager
def working_in(shop: Workshop) -> Iterator[None]:
    global workshop
    before, workshop = workshop, shop
    try:
        yield
    finally:
        workshop = before


def key_of(name: str, signature: object) -> str:
    """The name of a part in the workshop."""
    return f"part-{digest_of(name, signature)}"


class PartCache(caching._Cache):
    """The cache that numba uses for an inner function: the workshop. Only claimed parts are written."""

    cache_path = ""

    def __init__(self, name: str) -> None:
        self._name = name

    def load_overload(self, sig: object, target_context: Any) -> Any:
        shop = workshop
        if shop is None:
            return None
        key = key_of(self._name, sig)
        path = shop.folder / key
        if _made.get(key) is not shop:
            shop.wait_for(key, path.exists)
        with contextlib.suppress(OSError):
            return CompileResult._rebuild(target_context, *pickle.loads(path.read_bytes()))
        return None

    def save_overload(self, sig: object, data: Any) -> None:
        shop, key = workshop, key_of(self._name, sig)
        if shop is None or _made.get(key) is not shop:
            return
        with contextlib.suppress(OSError):
            partial = shop.folder / f"{key}.{os.getpid()}"
            partial.write_bytes(pickle.dumps(data._reduce(), protocol=pickle.HIGHEST_PROTOCOL))
            partial.replace(shop.folder / key)

    def enable(self) -> None:
        """Nothing to do: the workshop decides."""

    disable = flush = enable


_made: dict[str, Workshop] = {}      # parts that this process has claimed


def make_part(shop: Workshop, dispatcher: Any, signature: tuple[Any, ...]) -> bool:
    """Compile a part if no other process does."""
    key = key_of(dispatcher.py_func.__qualname__, signature)
    if not shop.claim(key):
        return False
    _made[key] = shop
    compile_part(dispatcher, signature)
    return True
