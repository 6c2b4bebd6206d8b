"""Mapped files that are cut, or whose disk disappears, while they are in use.

A read of such a page raises SIGBUS, which ends the process without a message. Here a handler of a few machine instructions maps
zeros in place of the lost part, notes the file, and lets the thread continue: threads inside kernels run no Python handlers.
After computing, the caller calls `check`, which raises `FileLost`.

Faults outside of the watched files go to the previous handler. Windows does not allow a mapped file to be cut.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import FileLost

logger = logging.getLogger(__name__)

ENTRIES, FIELDS = 1 << 14, 3          # (start, end, whether it was lost), in addresses
SUPPORTED = sys.platform in ("linux", "darwin") and ctypes.sizeof(ctypes.c_void_p) == 8
_SIGBUS, _SIGINFO, _ADDRESS_AT, _MAP_FLAGS = (
    (10, 0x40, 24, 0x1000 | 0x10 | 0x2 | 0x40) if sys.platform == "darwin" else (7, 0x4, 16, 0x20 | 0x10 | 0x2 | 0x4000)
)

_table: NDArray[np.int64] = np.zeros((ENTRIES, FIELDS), np.int64)
_any: NDArray[np.int64] = np.zeros(1, np.int64)          # whether any file was lost; the handler only sets it
_paths: dict[int, Path] = {}
_free = list(range(ENTRIES - 1, -1, -1))
_lock = threading.Lock()
_kept: list[Any] = []                 # the handler's code and the handler before: they must outlive everything
_tried = False


def watch(mapping: mmap.mmap, path: Path) -> None:
    """Watch a mapping of a file until it is unmapped."""
    if not SUPPORTED:
        return
    with _lock:
        if not _free:
            return
        number = _free.pop()
        start = np.frombuffer(mapping, np.uint8).ctypes.data
        size = -(-len(mapping) // mmap.PAGESIZE) * mmap.PAGESIZE
        _paths[number] = path
        _table[number] = start, start + size, 0
    weakref.finalize(mapping, _forget, number).atexit = False


def check() -> None:
    """Raise FileLost if a file that is still mapped was cut or disappeared."""
    if _any[0]:
        with _lock:
            lost = np.flatnonzero(_table[:, 2])
            if not len(lost):
                _any[0] = 0           # the lost file is not used any more
                return
            path = _paths[int(lost[0])]
        raise FileLost(f"{path}: was cut, or its disk has gone, while it was in use; nothing more can be computed from it")


def _forget(number: int) -> None:
    with _lock:
        _table[number] = 0
        _paths.pop(number, None)
        _free.append(number)


def install() -> None:
    """Set the handler, once, before compiled code reads the first mapping. It needs LLVM."""
    global _tried
    with _lock:
        if SUPPORTED and not _tried:
            _tried = True
            try:
                _set_handler()
            except Exception:      # on an unknown system we work without the handler
                logger.warning("cut files will not be noticed here", exc_info=True)


class _Action(ctypes.Structure):
    """struct sigaction"""

    _fields_ = (
        [("handler", ctypes.c_void_p), ("mask", ctypes.c_uint32), ("flags", ctypes.c_int)] if sys.platform == "darwin"
        else [("handler", ctypes.c_void_p), ("mask", ctypes.c_uint8 * 128), ("flags", ctypes.c_int),
              ("restorer", ctypes.c_void_p)]
    )


def _set_handler() -> None:
    system = ctypes.CDLL(None, use_errno=True)
    before = _Action()
    if system.sigaction(_SIGBUS, None, ctypes.byref(before)):
        return
    engine, address = _compile(system, ctypes.addressof(before))
    action = _Action(handler=address, flags=_SIGINFO)
    if system.sigaction(_SIGBUS, ctypes.byref(action), None) == 0:
        _kept.extend((engine, before, system))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))       # they are needed until the process ends


def _compile(system: Any, before: int) -> tuple[Any, int]:
    """(the owner of the code, address of the handler).

    for every entry: if start <= address of the fault < end: note it, map zeros from the fault's page to the end, return.
    No entry: restore the previous handler and return, so that the fault occurs again and goes there.
    """
    from llvmlite import binding, ir

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    i64, i32, byte = ir.IntType(64), ir.IntType(32), ir.IntType(8)
    module = ir.Module("lost")
    module.triple = binding.get_process_triple()
    handler = ir.Function(module, ir.FunctionType(ir.VoidType(), [i32, byte.as_pointer(), byte.as_pointer()]), "on_sigbus")
    entry, loop, hit, following, miss, end = (
        handler.append_basic_block(name) for name in ("entry", "loop", "hit", "next", "miss", "end"))

    def at(builder: ir.IRBuilder, address: Any) -> Any:
        return builder.inttoptr(address, i64.as_pointer())

    def function(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Type) -> Any:
        pointer = ctypes.cast(getattr(system, name), ctypes.c_void_p).value
        return builder.inttoptr(ir.Constant(i64, pointer), ir.FunctionType(result, arguments).as_pointer())

    def number(value: int) -> Any:
        return ir.Constant(i64, value)

    builder = ir.IRBuilder(entry)
    fault = builder.load(at(builder, builder.add(builder.ptrtoint(handler.args[1], i64), number(_ADDRESS_AT))))
    builder.branch(loop)

    builder = ir.IRBuilder(loop)
    row = builder.phi(i64)
    first, last = _table.ctypes.data, _table.ctypes.data + _table.nbytes
    row.add_incoming(number(first), entry)
    start = builder.load(at(builder, row))
    stop = builder.load(at(builder, builder.add(row, number(8))))
    found = builder.and_(builder.icmp_unsigned(">=", fault, start), builder.icmp_unsigned("<", fault, stop))
    builder.cbranch(found, hit, following)

    builder = ir.IRBuilder(following)
    after = builder.add(row, number(8 * FIELDS))
    row.add_incoming(after, following)
    builder.cbranch(builder.icmp_unsigned("==", after, number(last)), miss, loop)

    builder = ir.IRBuilder(hit)
    builder.store(number(1), at(builder, builder.add(row, number(16))))
    builder.store(number(1), at(builder, number(_any.ctypes.data)))
    page = builder.and_(fault, number(-mmap.PAGESIZE))
    mapped = builder.call(function(builder, "mmap", i64, i64, i64, i32, i32, i32, i64), [
        page, builder.sub(stop, page), ir.Constant(i32, 3), ir.Constant(i32, _MAP_FLAGS), ir.Constant(i32, -1), number(0)])
    builder.cbranch(builder.icmp_signed("==", mapped, number(-1)), miss, end)

    builder = ir.IRBuilder(miss)
    builder.call(function(builder, "sigaction", i32, i32, i64, i64), [handler.args[0], number(before), number(0)])
    builder.branch(end)
    ir.IRBuilder(end).ret_void()

    parsed = binding.parse_assembly(str(module))
    machine = binding.Target.from_triple(module.triple).create_target_machine()
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine, engine.get_function_address("on_sigbus")


