"""Limits for chat templates, which are not trusted: a template must not run for long or fill the memory."""

from __future__ import annotations

import threading
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000     # passes of loops and calls of macros in one rendering
MAX_TEXT = 1 << 24        # characters, or items of a list, that one operation may make
MAX_WIDTH = 10_000        # columns of a field or an indentation
PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, with a limit of steps and without operations that make huge results."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._count = threading.local()
        del self.globals["lipsum"]           # as much text as it is asked for
        for name in ("indent", "center"):
            self.filters[name] = _with_width(self.filters[name])

    def begin(self) -> None:
        """Reset the count, at the start of a rendering."""
        self._count.steps = 0

    def step(self) -> str:
        self._count.steps = getattr(self._count, "steps", 0) + 1
        if self._count.steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} passes of loops")
        return ""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(block, (nodes.For, nodes.Macro, nodes.CallBlock))
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None, lineno=block.lineno)
            block.body.insert(0, nodes.ExprStmt(step, lineno=block.lineno))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int) and len(many) * times > MAX_TEXT:
                    raise SecurityError(f"a text or list repeated {times} times")
        elif operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= 64):
            raise SecurityError("a power of more than 64")
        elif operator == "%" and isinstance(left, str):
            _check_width(max((int(digits) for digits in _numbers(left)), default=0))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(getattr(function, "__self__", None), str):
            name = getattr(function, "__name__", "")
            if name in PADDING and arguments and isinstance(arguments[0], int):
                _check_width(arguments[0])
            elif name in ("format", "format_map"):
                _check_width(max((int(digits) for digits in _numbers(function.__self__)), default=0))
        return super().call(context, function, *arguments, **named)


def _with_width(function: Any) -> Any:
    def limited(value: Any, width: Any = 4, *arguments: Any, **named: Any) -> Any:
        if isinstance(width, int):
            _check_width(width)
        return function(value, width, *arguments, **named)

    return limited


def _check_width(width: int) -> None:
    if width > MAX_WIDTH:
        raise SecurityError(f"a field of {width} columns")


def _numbers(text: str) -> list[str]:
    """The numbers in a format."""
    return "".join(c if "0" <= c <= "9" else " " for c in text).split()
