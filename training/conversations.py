"""The conversations that the demo model learns from, and the fixed list it is examined with.

    from training.conversations import check, conversations, heldout
    conversations(seed=1)          endless: lists of {"role", "content"}, an assistant's message last
    heldout()                      100 cases: the same facts in wordings and lists of sights that are never trained on
    sample()                       the model card's sample conversation as one more case
    check(case, answer)            whether the answer is right

    python training/conversations.py 20       prints some conversations

A message with `"learn": False` is an assistant's that another model could have written: there to be read, so that a
follow-up finds "#2" in any list. A trainer should take no loss on it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from training import copying, small_talk, travel
from training.talk import Talk, Turn
from training.wordings import Unsuitable, fill, load, with_slips

HERE = Path(__file__).parent
SYSTEMS = load(HERE / "texts" / "systems.txt")

Move = Callable[[Talk], Turn]

OPENINGS: dict[Move, int] = {
    travel.foreign_list: 34, travel.sights_list: 12, travel.fact: 20, travel.sight: 14, travel.when: 3, travel.where: 4,
    travel.about_city: 5, travel.one_sight: 2, travel.older: 2, travel.not_there: 5, travel.capital_of: 2, travel.is_capital: 2,
    small_talk.arithmetic: 40, small_talk.games: 9, small_talk.say: 5, small_talk.recall: 1, small_talk.small: 5,
    small_talk.package: 10, small_talk.unknown_town: 9, small_talk.unknown_of_city: 3, small_talk.unknown_sight: 3,
    small_talk.refusal: 9, copying.given_list: 12, copying.echo: 6,
}
ABOUT_A_LIST: dict[Move, int] = {
    travel.number: 52, travel.number_when: 7, travel.named_sight: 4, travel.oldest: 12, travel.newest: 12, travel.more: 12,
    travel.too_far: 4, travel.how_many: 1, travel.fact_there: 12,
}
FOLLOW_UPS: dict[Move, int] = {
    travel.fact_there: 34, travel.and_city: 6, travel.it_when: 6, travel.it_where: 4, small_talk.recall: 10, small_talk.say: 2,
    small_talk.thanks: 5,
}
ABOUT_THINGS: dict[Move, int] = {copying.given_entry: 9, copying.given_length: 1}
LINGER: dict[str, Move] = {
    move.__name__: move for move in (small_talk.arithmetic, small_talk.games, small_talk.package, copying.echo)
}
LENGTHS = (1, 2, 3, 5, 7), (30, 25, 20, 15, 10)   # turns, not counting lists of another model


def conversation(rng: Random, heldout: bool = False) -> tuple[list[dict[str, Any]], Turn]:
    """One conversation and its last turn."""
    talk = Talk(rng, heldout)
    system, length = system_text(rng), rng.choices(*LENGTHS)[0]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system[1]}] if system[1] else []
    while True:
        talk.last = talk.turn >= length - 1
        turn = next_turn(talk)
        talk.turn += 1
        messages.append({"role": "user", "content": turn.question if heldout else typed(turn, rng)})
        messages.append({"role": "assistant", "content": styled(turn, system[0]) if turn.learn else turn.answer})
        if not turn.learn:
            messages[-1]["learn"] = False
            length = min(length + 1, travel.MOST_TURNS)
        elif talk.last:
            return messages, turn


def next_turn(talk: Talk) -> Turn:
    """A turn that the conversation allows, chosen by the weights above."""
    while True:
        moves = OPENINGS
        if talk.listed and talk.rng.random() < 0.9:
            moves = ABOUT_A_LIST
        elif talk.things and talk.rng.random() < 0.9:
            moves = ABOUT_THINGS
        elif (talk.city or talk.facts) and talk.rng.random() < 0.65:
            moves = FOLLOW_UPS
        before = dict(vars(talk))
        move = talk.rng.choices(list(moves), list(moves.values()))[0]
        if talk.kind in LINGER and talk.rng.random() < 0.5:
            move = LINGER[talk.kind]
        try:
            turn = move(talk)
        except Unsuitable:
            vars(talk).update(before)
            continue
        turn.kind = talk.kind = move.__name__
        if move.__module__ == small_talk.__name__:   # "it" would no longer be the sight, nor "And in Rome?" the fact
            talk.sight, talk.fact = None, ""
        if move.__module__ != copying.__name__:      # "#2" is no longer the user's
            talk.things = []
        return turn


def system_text(rng: Random) -> tuple[str, str]:
    """The kind of a system text and the text; mostly none."""
    kind = rng.choices(["", "guardrail", "plain", "one sentence", "guide"], [76, 6, 6, 7, 5])[0]
    return kind, fill(rng.choice(SYSTEMS[kind].questions), rng) if kind else ""


def styled(turn: Turn, system: str) -> str:
    """The answer as the system text wants it."""
    if system == "one sentence":
        return turn.short or turn.answer
    return f"{turn.answer} Have a good trip!" if system == "guide" and hasattr(travel, turn.kind) else turn.answer


def typed(turn: Turn, rng: Random) -> str:
    """The question as people type it: at times with a word before it, and with slips."""
    if not turn.slips:
        return turn.question
    before = rng.choice(["Hi! ", "Hello. ", "OK. ", "Great. ", "Thanks. ", "Please tell me: "]) if rng.random() < 0.12 else ""
    return with_slips(before + turn.question, rng)


def conversations(seed: int, split: str = "train") -> Iterator[list[dict[str, Any]]]:
    """Endless conversations, the same for the same seed; split "heldout" has last questions that "train" never has."""
    rng = Random(f"{split} {seed}")
    while True:
        yield conversation(rng, split == "heldout")[0]


@dataclass(frozen=True)
class Case:
    """A conversation that ends with the user, and what a right answer contains (see `check`)."""

    kind: str
    messages: list[dict[str, str]]
    answer: str   # a right answer
    expect_all: list[str]
    expect_any: list[str]
    at_least: int
    reject: list[str]


def heldout() -> list[Case]:
    """The fixed list of 100 conversations that training never sees."""
    return [Case(**case) for case in json.loads((HERE / "heldout.json").read_text(encoding="utf-8"))["cases"]]


def sample() -> Case:
    """The model card's sample conversation: what is so great about the Eiffel Tower?"""
    return Case(**json.loads((HERE / "heldout.json").read_text(encoding="utf-8"))["sample"])


def check(case: Case, answer: str) -> bool:
    """Whether the answer has all that it must, enough of what it can, and nothing that it must not have."""

    def has(words: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(words.casefold())}(?!\w)", answer.casefold()) is not None

    return (
        all(map(has, case.expect_all))
        and (not case.expect_any or sum(map(has, case.expect_any)) >= case.at_least)
        and not any(map(has, case.reject))
    )


if __name__ == "__main__":
    for _, messages in zip(range(int(sys.argv[1])), conversations(0), strict=False):
        print("\n".join(f"{message['role']}: {message['content']}" for message in messages), end="\n\n")
