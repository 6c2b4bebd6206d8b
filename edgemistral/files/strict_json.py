"""JSON from files of other programs: parsed strictly, or refused with one error."""

from __future__ import annotations

import json
from typing import Any

from edgemistral.errors import BadInput

MAX_DIGITS = 64   # of an integer: all counts fit into 64 bits, but transformers writes 10**30 for "no limit"


def parse(text: str | bytes, where: str, error: type[BadInput]) -> Any:
    """The value of a JSON text.

    Refused with `error`, its message starting with `where`: invalid UTF-8 or JSON, a name given twice in one object
    (readers differ in which one they take), NaN and Infinity, integers of more than 64 digits, very deep nesting.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique_names, parse_int=_bounded_integer, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise error(f"{where} is not usable JSON: nested too deeply") from None
    except ValueError as problem:   # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise error(f"{where} is not usable JSON: {problem}") from None


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:80]!r} occurs twice")
    return values


def _bounded_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")
