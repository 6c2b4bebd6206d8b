"""One turn of a made-up conversation, and what a conversation has said so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from training.wordings import Intent, Unsuitable, fill


@dataclass
class Turn:
    """A question and its answer; the other fields say how an answer of other wording is recognized as right.

    Right is an answer with all of `expect_all`, at least `at_least` of `expect_any` and none of `reject`. `learn` is False
    where the assistant speaks as another model would: to be read, not to be learned.
    """

    question: str
    answer: str
    short: str = ""   # the answer in one sentence, where it has more
    expect_all: list[str] = field(default_factory=list)
    expect_any: list[str] = field(default_factory=list)
    at_least: int = 1
    reject: list[str] = field(default_factory=list)
    learn: bool = True
    slips: bool = True   # may be typed carelessly
    kind: str = ""       # the name of the move that made it


@dataclass
class Talk:
    """What a conversation is about so far. The `last` question of a `heldout` conversation has a wording held out."""

    rng: Random
    heldout: bool = False
    last: bool = False
    turn: int = 0           # turns so far
    city: Any = None        # travel.City
    listed: list[Any] = field(default_factory=list)   # travel.Sight, as numbered in the last list
    things: list[str] = field(default_factory=list)   # the last list that the user wrote, while it is spoken of
    sight: Any = None       # the sight spoken of last
    fact: str = ""          # the kind of fact asked for last
    kind: str = ""          # the name of the last move
    facts: dict[str, str] = field(default_factory=dict)   # what the user said about herself

    def ask(
        self, intents: Mapping[str, Intent], name: str, /, *, needs: str = "", without: str = "", **slots: str
    ) -> str:
        """A question of this intent; only wordings that contain one of the words `needs` and none of `without`."""
        intent = intents[name]
        patterns = [
            pattern
            for pattern in (intent.heldout if self.heldout and self.last else intent.questions)
            if (not needs or any(word in pattern for word in needs.split())) and not (without and without in pattern)
        ]
        if not patterns:
            raise Unsuitable(name)
        return fill(self.rng.choice(patterns), self.rng, **slots)

    def require(self, condition: object) -> None:
        """Raises Unsuitable unless the conversation allows the question."""
        if not condition:
            raise Unsuitable
