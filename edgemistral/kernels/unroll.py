"""Unrolled kernels from ordinary Python: loops over registers become straight code before numba sees them.

    @unrolled(ROWS=4)
    def scale(x, factor):
        v = registers()
        for r in unroll(ROWS):
            v[r] = load_f32(x, 16 * r)
        for r in unroll(ROWS):
            store_f32(x, 16 * r, mul(v[r], factor))

A vector register cannot be an element of an array, so `v[r]` becomes the variable `v_0`, `v_1`, ...; `for r in unroll(n)`
repeats its body with r = 0 ... n - 1; `if static(condition)` keeps one branch; `KERNELS[n](x)`, with a table of kernels of the
module, calls one of them. Everything inside `unroll`, `static` and these indices is computed here, from the constants given
to the decorator and the loops around.
`function.__unrolled_source__` is what numba compiles.

Under EDGEMISTRAL_SIMD=interpret nothing is rewritten: registers are a dictionary, and a debugger stops in the source file.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import linecache
import marshal
import sys
import textwrap
from collections.abc import Callable, Container
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

from edgemistral.kernels import stored
from edgemistral.kernels.lowering import INTERPRET, interpreted

names: list[str] = []
"""Of the stored files with all that was rewritten in this process, for a bundle."""


def unrolled(**constants: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: rewrite the function for these constants. Needs the source file next to the compiled file."""

    def rewrite(function: Callable[..., Any]) -> Callable[..., Any]:
        if interpreted(function):
            return _with_constants(function, constants)
        name = function.__name__ + "".join(f"_{name}{value}" for name, value in constants.items())
        filename = f"<unrolled {function.__module__}.{name}>"
        source, code, entries = _unroll(function, name, filename, constants)
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        scope: dict[str, Any] = {}
        for table, index in entries:
            function.__globals__[_entry_name(table, index)] = function.__globals__[table][index]
        exec(code, function.__globals__, scope)
        result: Callable[..., Any] = scope[name]
        result.__module__, result.__doc__ = function.__module__, function.__doc__
        result.__unrolled_source__ = source   # type: ignore[attr-defined]
        return result

    return rewrite


def _unroll(
    function: Callable[..., Any], name: str, filename: str, constants: dict[str, int]
) -> tuple[str, CodeType, list[tuple[str, int]]]:
    """The rewritten source, its code, and the entries of tables in it: made once, then read from the cache (0.3 s of each start
    for all kernels)."""
    code = function.__code__
    written = _content(source_file(function)), function.__qualname__, code.co_firstlineno, sorted(constants.items())
    stored_as = f"unrolled-{stored.digest_of(_content(Path(__file__)), sys.version, *written)}"
    names.append(stored_as)
    if body := stored.read(stored_as):
        source, code, entries = marshal.loads(body)
        return source, code, entries
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.name, definition.decorator_list = name, []
    tables = {name for name, value in function.__globals__.items() if isinstance(value, dict)}
    unroller = _Unroller(constants, tables)
    source = ast.unparse(ast.fix_missing_locations(unroller.visit(definition)))
    code = compile(source, filename, "exec")
    stored.write(stored_as, marshal.dumps((source, code, unroller.entries)))
    return source, code, unroller.entries


def _entry_name(table: str, index: int) -> str:
    """The global name of a table's kernel."""
    return f"{table}_{index}"


def source_file(function: Callable[..., Any]) -> Path:
    """The source file of a function. In a frozen application a module names its compiled file, next to the source."""
    return Path(inspect.getfile(sys.modules[function.__module__])).with_suffix(".py")


@cache
def _content(path: Path) -> str:
    """A digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _with_constants(function: Callable[..., Any], constants: dict[str, int]) -> Callable[..., Any]:
    """The function itself, which must see the constants around it."""
    around = inspect.getclosurevars(function)
    seen = {**around.globals, **around.nonlocals}
    for name, value in constants.items():
        if name in around.unbound or seen.get(name, value) != value:
            raise TypeError(f"{function.__qualname__} does not see {name} = {value} around it: interpreting needs that")
    return function


class _Unroller:
    """Makes a changed copy of a tree: the body of a loop is visited for every value."""

    def __init__(self, constants: dict[str, int], tables: Container[str] = ()) -> None:
        self.values, self.tables = dict(constants), tables
        self.registers: set[str] = set()
        self.entries: list[tuple[str, int]] = []     # (table, index) of the kernels that are called from tables

    def compute(self, node: ast.expr) -> Any:
        """The value of an expression of constants."""
        return eval(compile(ast.Expression(ast.fix_missing_locations(node)), "<unroll>", "eval"), {"range": range}, self.values)

    def visit(self, node: Any) -> Any:
        """The replacement of a node: another node, or a list of statements; a list of nodes becomes one list."""
        if isinstance(node, list):
            changed = [self.visit(element) for element in node]
            return [each for one in changed for each in (one if isinstance(one, list) else [one])]
        if not isinstance(node, ast.AST):
            return node
        special = getattr(self, f"visit_{type(node).__name__}", None)
        return special(node) if special else self.copy(node)

    def copy(self, node: ast.AST) -> ast.AST:
        return type(node)(**{name: self.visit(getattr(node, name, None)) for name in node._fields})

    def visit_For(self, node: ast.For) -> ast.AST | list[ast.stmt]:
        if not _calls(node.iter, "unroll"):
            return self.copy(node)
        assert isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Call)
        result: list[ast.stmt] = []
        for value in range(*(self.compute(argument) for argument in node.iter.args)):
            self.values[node.target.id] = value
            result += self.visit(node.body)
        self.values.pop(node.target.id, None)
        return result

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if not _calls(node.test, "static"):
            return self.copy(node)
        assert isinstance(node.test, ast.Call)
        kept: list[ast.stmt] = self.visit(node.body if self.compute(node.test.args[0]) else node.orelse)
        return kept

    def visit_Assign(self, node: ast.Assign) -> ast.AST | list[ast.stmt]:
        if not _calls(node.value, "registers"):
            return self.copy(node)
        self.registers.update(target.id for target in node.targets if isinstance(target, ast.Name))
        return []

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id in self.registers:
            index = self.compute(node.slice)
            parts = index if isinstance(index, tuple) else (index,)
            return ast.Name("_".join(map(str, (node.value.id, *parts))), node.ctx)
        if isinstance(node.value, ast.Name) and node.value.id in self.tables:
            entry = node.value.id, self.compute(node.slice)
            self.entries.append(entry)
            return ast.Name(_entry_name(*entry), node.ctx)
        return self.copy(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if isinstance(node.ctx, ast.Load) and node.id in self.values:
            return ast.Constant(self.values[node.id])
        return node


def _calls(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def registers() -> Any:
    """Declares a family of vector variables; only for use inside `unrolled`."""
    if INTERPRET:
        return {}
    raise TypeError("registers() outside of an unrolled function")


def unroll(*bounds: int) -> range:
    """Marks a loop to unroll; only for use inside `unrolled`."""
    if INTERPRET:
        return range(*bounds)
    raise TypeError("unroll() outside of an unrolled function")


def static(condition: bool) -> bool:
    """Marks a condition that the unrolling decides; only for use inside `unrolled`."""
    if INTERPRET:
        return condition
    raise TypeError("static() outside of an unrolled function")
