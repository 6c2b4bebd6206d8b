"""All numba policy in one place: how kernels are compiled, and where compiled code is kept.

`@entry` makes a function that Python calls; its machine code is cached on disk, with that of the `@part`s that it calls.
`@inner` makes one that only other jitted functions call; it becomes part of their code. All release the GIL and leave floating
point strict (no fast-math), because the same input must give the same bits whatever the compiler reorders. `parts` says how
they are compiled.

Under EDGEMISTRAL_SIMD=interpret nothing is compiled: kernels are the functions of their source files, for a debugger.

numba's own cache keys a function by the time stamp of its file. After a change of a helper in another file it uses stale code,
and two processes that compile at once can swap each other's entries. Our cache keys every file by the content of all kernel
sources, the versions of Python, numba and LLVM, the CPU, the lowering and the signature. Each overload is one file, which is
written under another name and renamed.
"""

from __future__ import annotations

import functools
import pickle
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba.core import caching
from numba.core.compiler import CompileResult
from numba.core.runtime.nrt import rtsys

from edgemistral.kernels import parts, stored
from edgemistral.kernels.lowering import choose, choose_reading, interpreted
from edgemistral.kernels.unroll import source_file

# No wrapper for C: with it LLVM would make a second copy of every function. No reference counts: a kernel allocates nothing,
# and counting made a third of the code that LLVM reads.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False}
_ALLOCATING = {**_OPTIONS, "_nrt": True}

on_compile: Callable[[str], None] | None = None
"""Called with a function's name before it is compiled because no cached code fits; for progress messages."""
on_compiled: Callable[[], None] | None = None
"""Called when it is compiled."""


def entry(function: Callable[..., Any], allocates: bool = False) -> Any:
    """Jit a function that Python calls; cached on disk."""
    if interpreted(function):
        return _checking(function)
    dispatcher: Any = numba.njit(**(_ALLOCATING if allocates else _OPTIONS))(function)
    dispatcher._cache = _DiskCache(function)
    if hasattr(dispatcher, "_compiler"):      # with NUMBA_DISABLE_JIT it is the plain function
        dispatcher._compiler.compile = parts.as_entry(dispatcher._compiler.compile, function.__qualname__)
    return dispatcher


def inner(function: Callable[..., Any]) -> Any:
    """Jit a function that only jitted functions call."""
    if interpreted(function):
        return _plain(function)
    return _inner(function)


def allocating_entry(function: Callable[..., Any]) -> Any:
    """`entry` that makes arrays."""
    return entry(function, allocates=True)


def allocating_inner(function: Callable[..., Any]) -> Any:
    """`inner` that makes arrays, or returns views of them."""
    return _plain(function) if interpreted(function) else _inner(function, **_ALLOCATING)


def inlined(function: Callable[..., Any]) -> Any:
    """`inner` whose code becomes part of its caller's: passing named tuples of arrays takes hundreds of stores a call."""
    if interpreted(function):
        return _plain(function)
    parts.inlined(function)
    return _inner(function, forceinline=True)


def part(function: Callable[..., Any]) -> Any:
    """`inner` that is machine code of its own, which other processes can make: a phase, or a large kernel."""
    if interpreted(function):
        return _plain(function)
    parts.part(function)
    dispatcher = _inner(function)
    dispatcher._cache = parts.PartCache(function.__qualname__)
    return dispatcher


def _inner(function: Callable[..., Any], **options: Any) -> Any:
    return numba.njit(**{**_OPTIONS, "no_cpython_wrapper": True, **options})(function)


def is_cached(dispatcher: Any, signature: object) -> bool:
    """Whether code of this entry for these types is in the cache folder."""
    return isinstance(dispatcher._cache, _DiskCache) and dispatcher._cache.holds(signature, dispatcher.targetctx)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, with the attribute that jitted ones have."""
    function.py_func = function  # type: ignore[attr-defined]
    return function


def _checking(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that runs as Python: arrays refuse negative indices, and floats overflow silently, as in compiled code."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*map(_checked, arguments))

    return _plain(call)


class _CheckedArray(np.ndarray):
    """An array that refuses negative indices: compiled code would read memory before the array."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(self._check(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(self._check(index), value)

    @staticmethod
    def _check(index: Any) -> Any:
        for each in index if isinstance(index, tuple) else (index,):
            if not isinstance(each, slice) and np.any(np.less(each, 0)):
                raise IndexError(f"index {index} is negative")
        return index


def _checked(argument: Any) -> Any:
    """The same argument, all arrays in it checked."""
    if isinstance(argument, np.ndarray):
        return argument.view(_CheckedArray)
    if isinstance(argument, tuple):
        parts = map(_checked, argument)
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    return argument


@cache
def _environment() -> str:
    """Everything that can change the machine code of the same function."""
    here = Path(__file__).parent
    sources = [path.read_bytes() for path in (*sorted(here.glob("*.py")), here.parent / "files" / "layout.py")]
    versions = sys.implementation.cache_tag, numba.__version__, llvmlite.__version__, llvmlite.binding.llvm_version_info
    return stored.digest_of(*sources, *versions, type(choose()).__name__, *choose_reading())


class _DiskCache(caching._Cache):
    """One file for every overload of one function: a checksum, then the pickled machine code of its parts and its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        if function.__closure__:
            raise TypeError(f"{function.__qualname__} takes values from around it, which are not in the cache's key")
        self._name = function.__name__
        source = getattr(function, "__unrolled_source__", None) or source_file(function).read_bytes()
        self._key = stored.digest_of(_environment(), function.__module__, function.__qualname__, source)
        self._enabled = True

    @property
    def cache_path(self) -> str:
        return str(stored.folder())

    def _file_name(self, signature: object, codegen: Any) -> str:
        return f"{self._name}-{stored.digest_of(self._key, signature, codegen.magic_tuple())}.kernel"

    def _read(self, signature: object, target_context: Any) -> bytes:
        return stored.read(self._file_name(signature, target_context.codegen())) if self._enabled else b""

    def holds(self, signature: object, target_context: Any) -> bool:
        return bool(self._read(signature, target_context))

    def load_overload(self, sig: object, target_context: Any) -> Any:
        if data := self._read(sig, target_context):
            # Not target_context.refresh(): it also imports the compiler (0.3 s); compiling calls it anyway. Cached code needs
            # only the runtime; without it, passing the first array would crash.
            rtsys.initialize(target_context)
            called, state = pickle.loads(data)
            libraries = parts.load(called)      # first: the entry's code refers to theirs
            with parts.everything_is_emitted():
                result = CompileResult._rebuild(target_context, *state)
            result.library.called_parts = libraries
            return result
        if on_compile is not None:
            on_compile(self._name)
        return None

    def save_overload(self, sig: object, data: Any) -> None:
        if on_compiled is not None:
            on_compiled()
        if self._enabled:
            called = [library.serialize_using_object_code() for library in parts.called_parts(data.library)]
            body = pickle.dumps((called, data._reduce()), protocol=pickle.HIGHEST_PROTOCOL)
            stored.write(self._file_name(sig, data.codegen), body)

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Nothing to do: every file is written at once."""
