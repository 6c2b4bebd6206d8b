"""Wordings as data: files of intents, each with its questions and perhaps one fixed answer.

    == intent
    = the answer, if it is always the same
    a question with [one|another|] choice and a {slot}
    ? a question that only the held-out conversations use
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

CHOICE = re.compile(r"\[([^\[\]]*)\]")


class Unsuitable(Exception):
    """This question cannot be asked here: something it needs was not said before, or it has no held-out wording."""


@dataclass
class Intent:
    """One thing to ask: its questions for training, those held out, and the answer if it is always the same."""

    answer: str = ""
    questions: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)


def load(path: Path) -> dict[str, Intent]:
    """The intents of a file, by name."""
    intents: dict[str, Intent] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            intent = intents[line[3:]] = Intent()
        elif line.startswith("= "):
            intent.answer = line[2:]
        elif line.startswith("? "):
            intent.heldout.append(line[2:])
        elif line and not line.startswith("# "):
            intent.questions.append(line)
    return intents


def fill(pattern: str, rng: Random, /, **slots: str) -> str:
    """The pattern with one alternative of each [choice] and its {slots} filled; "{nth}" at its start gets a capital."""
    while "[" in pattern:
        pattern = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), pattern)
    text = pattern.format(**slots) if "{" in pattern else pattern
    return text[0].upper() + text[1:] if pattern.startswith("{") else text


def listing(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def capitalized(text: str) -> str:
    """The text with its first letter large, the others as they are."""
    return text[:1].upper() + text[1:]


def with_slips(text: str, rng: Random) -> str:
    """The text as people type: sometimes in small letters, without its last mark, or with two letters swapped."""
    if rng.random() < 0.10:
        text = text.lower()
    if rng.random() < 0.10:
        text = text.rstrip("?. ")
    if rng.random() < 0.05 and len(text) > 8:
        at = rng.randrange(1, len(text) - 1)
        if text[at : at + 2].isalpha():
            text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text
