"""How the functions that make up an entry are compiled: once, and if there are helpers, in several processes.

numba optimizes every function that it compiles and makes machine code of it, and does both again in every caller. Here an
entry and its parts, the phases and the large kernels, become machine code, each alone; the entry calls its parts. All other
functions are linked into their callers, and optimized there. Only inlined functions are optimized before that. (Attention in
4 bits is 30 % slower without.) The results do not change.

numba holds the interpreter's lock while it compiles, so more cores need more processes. They share a folder: a process claims
the part that it makes, and keeps its machine code there for the others. See `runtime.compiling`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import llvmlite.binding
from numba.core import caching
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from edgemistral.kernels.stored import digest_of

# ---- machine code of entries and parts only ------------------------------------------------------------------------------

class _Library(JITCodeLibrary):
    """Code of one function. That of the `entry` and of parts becomes machine code; other code is linked into them."""

    entry = ""
    inlined: ClassVar[set[str]] = set()      # names of functions that are optimized before their caller
    parts: ClassVar[set[str]] = set()

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        self.is_part = name in self.parts
        self.called_parts: list[_Library] = []      # by this function, and those linked into it
        self._is_emitted = self.is_part or name == self.entry
        self._loaded = b""
        if self.is_part:
            self.enable_object_caching()

    def add_linking_library(self, library: Any) -> None:
        found = [library] if getattr(library, "is_part", False) else called_parts(library)
        self.called_parts += [part for part in found if part not in self.called_parts]
        if library in found:
            library._ensure_finalized()
        else:
            super().add_linking_library(library)

    def _set_compiled_object(self, value: bytes) -> None:
        super()._set_compiled_object(value)
        self._loaded = value      # numba forgets it once it is loaded

    def _get_compiled_object(self) -> Any:
        return self._loaded or super()._get_compiled_object()

    def _optimize_functions(self, module: Any) -> None:
        if self.name in self.inlined:      # others are optimized as a whole, at the end
            super()._optimize_functions(module)
        else:
            module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        if self._is_emitted or self.name in self.inlined:
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        if self._is_emitted:
            super()._finalize_final_module()
        else:
            self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return int(super().get_pointer_to_function(name)) if self.name == self.entry else 0

    def serialize_using_object_code(self) -> Any:
        if not self._is_emitted:
            return self.serialize_using_bitcode()
        if self.is_part:      # nothing is linked with it: without its bitcode
            self._ensure_finalized()
            return self.name, "object", (self._get_compiled_object(), _nothing())
        return super().serialize_using_object_code()

    @property
    def codegen(self) -> Any:
        return super().codegen if self.name == self.entry else _NoCode


def called_parts(library: Any) -> list[Any]:
    """The parts whose machine code a library needs, each behind those that it needs."""
    found: list[Any] = []
    for part in getattr(library, "called_parts", ()):
        found += [one for one in (*called_parts(part), part) if one not in found]
    return found


@cache
def _nothing() -> bytes:
    """An empty module."""
    return bytes(llvmlite.binding.parse_assembly("").as_bitcode())


def part(function: Callable[..., Any]) -> None:
    """Say that this function is compiled to machine code of its own."""
    _Library.parts.add(function.__qualname__)


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


def load(states: Sequence[Any]) -> list[Any]:
    """Load the machine code of parts, as `serialize_using_object_code` gave it: the libraries."""
    with _only_entry_is_emitted(""):
        return [cpu_target.target_context.codegen().unserialize_library(state) for state in states]


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


def _in_one_chunk(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a frame so large that all frames of a compilation fit behind it in one chunk of Python's stack.

    From Python 3.11 on, a call and a return at the border of two chunks of 16 KB map and unmap one. A loop at that depth of
    the compiler did it 250,000 times.
    """
    return function(*arguments)


if sys.implementation.name == "cpython":
    _in_one_chunk.__code__ = _in_one_chunk.__code__.replace(co_stacksize=70_000)     # of 131,072 that the chunk then has


def as_entry(compile_: Callable[..., Any], name: str) -> Callable[..., Any]:
    """numba's function that compiles the entry `name`, changed to make machine code of the entry only."""

    @functools.wraps(compile_)
    def compile_entry(*arguments: Any) -> Any:
        with _only_entry_is_emitted(name):
            return _in_one_chunk(compile_, *arguments)

    return compile_entry


def compile_part(dispatcher: Any, signature: tuple[Any, ...]) -> None:
    """Compile an inner function on its own, for the entry that will call it."""
    with _only_entry_is_emitted(""):
        _in_one_chunk(dispatcher.compile, signature)


# ---- parts that several processes make -----------------------------------------------------------------------------------

class Workshop:
    """A folder in which processes share the parts of an entry. `others_work()`: whether other processes still work."""

    def __init__(self, folder: Path, others_work: Callable[[], bool]) -> None:
        self.folder, self.others_work = folder, others_work
        self._claimed: set[str] = set()           # by this process

    def claim(self, key: str) -> bool:
        """Whether this process is the first to take this work."""
        try:
            (self.folder / f"{key}.claim").touch(exist_ok=False)
        except OSError:
            return False
        self._claimed.add(key)
        return True

    def wait_for(self, key: str, there: Callable[[], bool]) -> None:
        """Wait until work claimed by another process is done, or no process is left to do it."""
        while (self.folder / f"{key}.claim").exists() and not there() and self.others_work():
            time.sleep(0.01)

    def fetch(self, key: str, target_context: Any) -> Any:
        """The part that another process has made or is making; None: make it here."""
        if key in self._claimed or (key not in _here and self.claim(key)):
            return _here.get(key)
        path = self.folder / key
        if key not in _here:
            self.wait_for(key, path.exists)
            with contextlib.suppress(OSError):
                calls, state = pickle.loads(path.read_bytes())
                called = [self.fetch(one, target_context) for one in calls]
                if None not in called:
                    _here[key] = result = CompileResult._rebuild(target_context, *state)
                    result.library.called_parts = [one.library for one in called]
        return _here.get(key)

    def share(self, key: str) -> None:
        """Write a part that this process has claimed, and those that it calls, for other processes."""
        keys = {id(result.library): one for one, result in _here.items()}
        calls = [keys[id(library)] for library in _here[key].library.called_parts]
        for one in calls:
            if self.claim(one):
                self.share(one)
        with contextlib.suppress(OSError):
            partial = self.folder / f"{key}.{os.getpid()}"
            partial.write_bytes(pickle.dumps((calls, _here[key]._reduce()), protocol=pickle.HIGHEST_PROTOCOL))
            partial.replace(self.folder / key)

    def made(self, key: str) -> None:
        """A part was compiled here."""
        if key in self._claimed:
            self.share(key)


workshop: Workshop | None = None
"""Where this process makes and finds parts; None: it compiles alone."""
_here: dict[str, Any] = {}
"""The compile results of parts whose machine code is in this process, by key."""


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
    """The cache that numba uses for a part: the workshop. A part that no process has claimed is claimed."""

    cache_path = ""

    def __init__(self, name: str) -> None:
        self._name = name

    def load_overload(self, sig: object, target_context: Any) -> Any:
        return None if workshop is None else workshop.fetch(key_of(self._name, sig), target_context)

    def save_overload(self, sig: object, data: Any) -> None:
        _here[key_of(self._name, sig)] = data
        if workshop is not None:
            workshop.made(key_of(self._name, sig))

    def enable(self) -> None:
        """Nothing to do: the workshop decides."""

    disable = flush = enable


def make_part(shop: Workshop, dispatcher: Any, signature: tuple[Any, ...]) -> None:
    """Compile a part if no other process does."""
    key = key_of(dispatcher.py_func.__qualname__, signature)
    if not shop.claim(key):
        return
    if key in _here:
        shop.share(key)
    else:
        compile_part(dispatcher, signature)
