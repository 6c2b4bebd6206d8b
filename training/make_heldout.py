"""Draw the held-out conversations anew: python training/make_heldout.py. Their cases are fixed; read them after drawing."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from random import Random
from typing import Any

from training import travel
from training.conversations import HERE, Case, check, conversation
from training.talk import Turn

SEED = 8
CASES = {   # how many of each kind of last question: 70 of travel, 10 of this package, 8 sums, 6 of small talk, 6 refusals
    "number": 20, "number_when": 3, "named_sight": 2, "oldest": 4, "newest": 1, "more": 2, "too_far": 1,
    "sights_list": 6, "one_sight": 1, "about_city": 1, "fact": 8, "fact_there": 8, "and_city": 1, "sight": 4, "where": 2,
    "when": 2, "it_when": 1, "not_there": 1, "capital_of": 1, "is_capital": 1,
    "package": 10, "arithmetic": 8,
    "recall": 3, "games": 2, "small": 1,
    "unknown_town": 2, "unknown_of_city": 1, "unknown_sight": 1, "refusal": 2,
}


def draw(rng: Random) -> list[Case]:
    """One case after another, until there are enough of each kind; no two about the same thing."""
    missing, cases = dict(CASES), []
    subjects: set[str] = set()
    while any(missing.values()):
        messages, turn = conversation(rng, heldout=True)
        answer, about = messages.pop()["content"], set(turn.expect_all) - {"do not know", "not know", "Yes", "No"}
        if not missing.get(turn.kind) or about & subjects or is_easy(messages, turn, rng):
            continue
        missing[turn.kind] -= 1
        subjects |= about
        cases.append(case(turn, messages, answer))
    order = list(CASES)
    return sorted(cases, key=lambda case: order.index(case.kind))


def is_easy(messages: list[dict[str, Any]], turn: Turn, rng: Random) -> bool:
    """Whether a drawn conversation shall not be kept: of some that are easy to answer a few are enough."""
    own_list = turn.kind == "number" and all(message.get("learn", True) for message in messages)
    with_system = messages[0]["role"] == "system"
    with_zero_or_one = turn.kind == "arithmetic" and re.search(r"\b[01]\b", turn.question) is not None
    not_told = turn.kind == "recall" and "not told" in turn.answer
    return (own_list and rng.random() < 0.7) or (with_system and rng.random() < 0.7) or with_zero_or_one or not_told


def case(turn: Turn, messages: list[dict[str, Any]], answer: str) -> Case:
    """The case of a drawn conversation; `answer` is the turn's in the form that a system text may ask for."""
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    found = sum(check(Case("", [], "", [words], [], 1, []), answer) for words in turn.expect_any)
    at_least = min(turn.at_least, max(1, (3 * found + 4) // 5))
    made = Case(turn.kind, plain, answer, turn.expect_all, turn.expect_any, at_least, turn.reject)
    assert check(made, answer), (made, answer)
    return made


def card_sample() -> Case:
    """The model card's sample conversation, which ends "What is so great about #1?"."""
    request = HERE.parent / "tests" / "data" / "sample-request.json"
    messages = json.loads(request.read_text(encoding="utf-8"))["input_data"]["input_string"]
    (paris,) = (city for city in travel.cities() if city.name == "Paris")
    turn = travel.about_sight(messages[-1]["content"], paris.sights[0], list(paris.sights))
    turn.kind = "sample"
    return case(turn, messages, turn.answer)


if __name__ == "__main__":
    path = HERE / "heldout.json"
    cases = {"sample": asdict(card_sample()), "cases": [asdict(case) for case in draw(Random(SEED))]}
    path.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
