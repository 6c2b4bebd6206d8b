"""Changes to JSON values, texts and bytes that keep most of their structure."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

INTEGERS = (
    0, 1, -1, 2, 3, 7, 8, 31, 32, 63, 64, 65, 127, 128, 255, 256, 1000, 4096, 65535, 65536, 2**20, 2**31 - 1, 2**31, 2**32,
    2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**18, 10**30, -2, -128, -(2**31), -(2**63),
)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-30, 1e30, 1e308, -1.5, 5e-324)
TEXTS = (
    "", " ", "\n", "\0", "a", "é", "\ud800", "\udfff", "\U0001f600", "\ufeff", "\u202e", "\ue000", "\x1b[2J", "\\", "/", "..",
    "../../etc/passwd", "<s>", "</s>", "[INST]", "<|im_end|>", "{{ 1 }}", "{% raw %}", "%s", "${x}", "<script>", "null", "true",
    "NaN", "1e999", "x" * 300, "\u0301" * 50, "ﬃ", "مرحبا", "日本語", "-1", "0x10",
)
OTHERS = (None, True, False, [], {}, [[]], [{}], {"": None})


def scalar(chance: Random) -> Any:
    """A value that some check may not expect."""
    kind = chance.randrange(4)
    return copy.deepcopy(chance.choice((INTEGERS, FLOATS, TEXTS, OTHERS)[kind]))


def value(chance: Random, root: Any, changes: int | None = None) -> Any:
    """A copy of a JSON value with a few nodes changed."""
    root = copy.deepcopy(root)
    for _ in range(changes or chance.choice((1, 1, 1, 2, 3, 6))):
        root = _changed(chance, root)
    return root


def _changed(chance: Random, root: Any) -> Any:
    places = list(_places(root))
    if not places:
        return scalar(chance)
    parent, key = chance.choice(places)
    kind = chance.randrange(12)
    if kind < 4:
        parent[key] = scalar(chance)
    elif kind == 4 and isinstance(parent, dict):
        del parent[key]
    elif kind == 4:
        parent.pop(key)
    elif kind == 5 and isinstance(parent, dict):
        parent[chance.choice(TEXTS)] = parent.pop(key)
    elif kind == 5:
        parent.insert(key, copy.deepcopy(parent[key]))
    elif kind == 6:
        other, name = chance.choice(places)
        parent[key] = copy.deepcopy(other[name]) if name in range(len(other)) or isinstance(other, dict) else None
    elif kind == 7 and isinstance(parent[key], str):
        parent[key] = text(chance, parent[key])
    elif kind == 8 and isinstance(parent[key], (int, float)):
        parent[key] = nearby(chance, parent[key])
    elif kind == 9:
        parent[key] = [parent[key]] if chance.random() < 0.5 else {chance.choice(TEXTS): parent[key]}
    elif kind == 10 and chance.random() < 0.1:
        nested: Any = parent[key]
        for _ in range(chance.choice((10, 100, 300))):
            nested = [nested]
        parent[key] = nested
    elif kind == 10 and isinstance(parent, list):
        chance.shuffle(parent)
    elif isinstance(parent[key], str):
        parent[key] = text(chance, parent[key])
    elif isinstance(parent[key], (int, float)):
        parent[key] = nearby(chance, parent[key])
    elif isinstance(parent[key], dict):
        parent[key][chance.choice(TEXTS)] = scalar(chance)
    elif isinstance(parent[key], list):
        parent[key].append(scalar(chance))
    return root


def _places(node: Any) -> Any:
    """(container, key) of every node but the root."""
    stack = [node]
    while stack:
        at = stack.pop()
        for key in list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ():
            yield at, key
            if isinstance(at[key], (dict, list)):
                stack.append(at[key])


def nearby(chance: Random, number: float) -> Any:
    """A number that a bound may be off by."""
    try:
        return chance.choice((number + 1, number - 1, number * 2, -number, number // 2, number * 1000, float(number),
            str(number)))
    except OverflowError:
        return 0


def text(chance: Random, source: str, words: tuple[str, ...] = TEXTS) -> str:
    """A text with some pieces cut out, doubled, moved, or replaced by words."""
    for _ in range(chance.choice((1, 1, 2, 3, 5))):
        at = chance.randint(0, len(source))
        end = min(len(source), at + chance.choice((0, 1, 1, 2, 5, 20)))
        kind = chance.randrange(6)
        if kind == 0:
            source = source[:at] + source[end:]
        elif kind == 1:
            source = source[:at] + source[at:end] * chance.choice((2, 3, 40)) + source[end:]
        elif kind == 2:
            to = chance.randint(0, len(source))
            source = source[:to] + source[at:end] + source[to:]
        else:
            source = source[:at] + chance.choice(words) + source[end:]
    return source[: 1 << 16]


def data(chance: Random, source: bytes) -> bytes:
    """Bytes with bits flipped, numbers overwritten, pieces cut out or doubled, or an end cut off."""
    made = bytearray(source)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randint(0, len(made))
        kind = chance.randrange(7)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(made):
            made[at] = chance.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            size = chance.choice((2, 4, 8))
            made[at : at + size] = (chance.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == 3:
            del made[at : at + chance.choice((1, 2, 8, 64, 4096))]
        elif kind == 4:
            made[at:at] = made[at : at + chance.choice((1, 8, 64))] * chance.choice((1, 3))
        elif kind == 5 and chance.random() < 0.3:
            del made[at:]
        else:
            made[at:at] = chance.choice((b"\0", b"\xff" * 8, b"\x80" * 11, b"{}", b'"', b"\xed\xa0\x80"))
    return bytes(made)


def as_text(chance: Random, fields: Any) -> str:
    """JSON of a value, at times with a fault in the spelling."""
    written = json.dumps(fields)
    kind = chance.randrange(12)
    if kind == 0:
        return text(chance, written, ("{", "}", "[", "]", ",", ":", '"', "\\u", "NaN", "Infinity", "1e999", "\0", '"a":1,' * 3))
    if kind == 1 and written[:1] == "{" and len(written) > 2:
        return '{"' + chance.choice(("a", "config", "model_type")) + '":1,' + written[1:]
    return written
