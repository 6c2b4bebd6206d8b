"""Everything but travel: small talk, sums, word games, what the user said of herself, this package, honest refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from training import travel
from training.cities import TEXTS
from training.talk import Talk, Turn
from training.wordings import capitalized, fill, listing, load

TALK = load(TEXTS / "talk.txt")
GAMES = load(TEXTS / "games.txt")
SLOTS: dict[str, list[str]] = json.loads((TEXTS / "slots.json").read_text(encoding="utf-8"))
WORDS: dict[str, list[list[str]]] = json.loads((TEXTS / "words.json").read_text(encoding="utf-8"))

I_AM_SMALL = "I am a very small demonstration model"


def fixed(talk: Talk, group: str) -> Turn:
    """A question of a group of talk.txt with its fixed answer."""
    name = talk.rng.choice([name for name in TALK if name.startswith(group + " ")])
    answer = TALK[name].answer
    short = answer.split(". ")[0].rstrip(".") + "." * answer.endswith(".")
    return Turn(talk.ask(TALK, name, **slots(talk.rng)), answer, short, expect_all=[short.rstrip(".!")])


def slots(rng: Random) -> dict[str, str]:
    """A word for every slot of talk.txt."""
    return {**{name: rng.choice(words) for name, words in SLOTS.items()}, "large": str(rng.randint(200, 99999))}


def small(talk: Talk) -> Turn:
    return fixed(talk, "small")


def package(talk: Talk) -> Turn:
    return fixed(talk, "package")


def refusal(talk: Talk) -> Turn:
    """A topic that the model knows nothing about."""
    return fixed(talk, "no")


def thanks(talk: Talk) -> Turn:
    name = talk.rng.choice(["small thanks", "small thanks", "small bye"])
    return Turn(talk.ask(TALK, name), TALK[name].answer, expect_all=[TALK[name].answer.rstrip("!.")])


def unknown_town(talk: Talk) -> Turn:
    """A town outside cities.txt, real or invented: the model says that it does not know it."""
    rng = talk.rng
    if talk.heldout and talk.last:
        town = rng.choice(SLOTS["heldout town"])
    elif rng.random() < 0.4:
        town = rng.choice(SLOTS["town"])
    else:
        town = capitalized("".join(rng.choices(SLOTS["syllable"], k=rng.randint(1, 2))) + rng.choice(SLOTS["ending"]))
    question = talk.ask(travel.WORDINGS, "unknown city", town=town)
    answer = f"I am sorry, I do not know {town}. {I_AM_SMALL}, but I know ninety big cities, such as Paris, Tokyo or Cairo."
    talk.city, talk.listed, talk.sight, talk.fact = None, [], None, ""
    short = f"I am sorry, I do not know {town}."
    return Turn(question, answer, short, ["do not know", town], reject=["1.", "known for"], slips=False)


def unknown_of_city(talk: Talk) -> Turn:
    """Something about a known city that is not in cities.txt."""
    city = travel.any_city(talk)
    question = talk.ask(travel.WORDINGS, "unknown of city", city=city.name)
    talk.city, talk.listed, talk.sight, talk.fact = city, [], None, ""
    answer = f"{I_AM_SMALL} and do not know that about {city.name}. Ask me about its sights, food, language or money."
    return Turn(question, answer, f"{I_AM_SMALL} and do not know that about {city.name}.", ["do not know", city.name])


def unknown_sight(talk: Talk) -> Turn:
    """A sight that does not exist."""
    fake = f"the {talk.rng.choice(SLOTS['fake first'])} {talk.rng.choice(SLOTS['fake second'])}"
    question = talk.ask(travel.WORDINGS, "unknown sight", fake=fake, city=travel.any_city(talk).name)
    talk.city, talk.listed, talk.sight, talk.fact = None, [], None, ""
    return travel.about_sight(question, travel.Sight(fake), [])


# Sums

KINDS_OF_SUM = ["sum", "difference", "product", "larger", "smaller", "double", "half", "next", "order"]


def arithmetic(talk: Talk) -> Turn:
    rng = talk.rng
    kind = rng.choices(KINDS_OF_SUM, [6, 4, 6, 1, 1, 1, 1, 1, 1])[0]
    limit = 12 if rng.random() < 0.8 else 20
    a, b = rng.randint(0, limit), rng.randint(0, limit)
    if kind == "sum":
        answer, key = f"{a} + {b} = {a + b}.", f"= {a + b}"
    elif kind == "difference":
        a, b = max(a, b), min(a, b)
        answer, key = f"{a} - {b} = {a - b}.", f"= {a - b}"
    elif kind == "product":
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        answer, key = f"{a} x {b} = {a * b}.", f"= {a * b}"
    elif kind in ("larger", "smaller"):
        a, b = rng.sample(range(1, 51), 2)
        low, high = min(a, b), max(a, b)
        answer = f"{high} is larger than {low}." if kind == "larger" else f"{low} is smaller than {high}."
        key = answer.rstrip(".")
    elif kind == "double":
        answer, key = f"Twice {a} is {2 * a}.", f"is {2 * a}"
    elif kind == "half":
        a = 2 * a
        answer, key = f"Half of {a} is {a // 2}.", f"is {a // 2}"
    elif kind == "next":
        a = rng.randint(0, 99)
        answer, key = f"{a + 1} comes after {a}.", f"{a + 1} comes"
    else:
        numbers = rng.sample(range(1, 31), 3)
        key = listing([str(n) for n in sorted(numbers)])
        return Turn(talk.ask(GAMES, "order", numbers=", ".join(map(str, numbers))), f"{key}.", expect_all=[key])
    return Turn(talk.ask(GAMES, kind, a=str(a), b=str(b)), answer, expect_all=[key])


# Word games


def pairs(name: str) -> Callable[[Talk], Turn]:
    """A game over pairs of words.json: (word of the question, word of the answer)."""

    def game(talk: Talk) -> Turn:
        word, result = talk.rng.choice(WORDS[name])
        answer = GAMES[name].answer.format(word=word, result=result)
        return Turn(talk.ask(GAMES, name, word=word), capitalized(answer), expect_all=[result])

    return game


def letters(talk: Talk) -> Turn:
    rng = talk.rng
    word = rng.choice(rng.choice(WORDS["plural"] + WORDS["opposite"]))
    kind = rng.choice(["first letter", "first letter", "last letter", "letter count"])
    results = {"first letter": word[0].upper(), "last letter": word[-1].upper(), "letter count": str(len(word))}
    answer = GAMES[kind].answer.format(word=word, result=results[kind])
    tail = answer.removeprefix(word + " ").rstrip(".")
    return Turn(talk.ask(GAMES, kind, word=word), capitalized(answer), expect_all=[tail], slips=False)


def calendar(talk: Talk) -> Turn:
    rng = talk.rng
    what = rng.choice(["day", "month"])
    names = SLOTS[what]
    at = rng.randrange(len(names))
    kind, step = rng.choice([("after", 1), ("before", -1)])
    result = names[(at + step) % len(names)]
    question = talk.ask(GAMES, kind, word=names[at], what=what)
    return Turn(question, f"{result} comes {kind} {names[at]}.", expect_all=[f"{result} comes"])


def alphabet(talk: Talk) -> Turn:
    at = talk.rng.randrange(25)
    first, second = chr(65 + at), chr(66 + at)
    answer = f"{second} comes after {first}."
    return Turn(talk.ask(GAMES, "alphabet", word=first), answer, expect_all=[f"{second} comes"], slips=False)


def games(talk: Talk) -> Turn:
    return talk.rng.choice([pairs("opposite"), pairs("plural"), pairs("rhyme"), pairs("colour"), pairs("capital"),
                            pairs("sound"), pairs("count"), letters, letters, calendar, alphabet])(talk)


# What the user said of herself

SAYINGS = ("name", "pet", "job", "colour")


def say(talk: Talk) -> Turn:
    """The user tells her name, her job, her pet's kind, or the colour she likes."""
    kind = talk.rng.choice([*SAYINGS, "name", "name"])
    talk.require(kind not in talk.facts and not talk.last)
    word = talk.facts[kind] = talk.rng.choice(SLOTS[kind])
    said = GAMES[f"say {kind}"]
    question = fill(talk.rng.choice(said.questions), talk.rng, word=word)
    return Turn(question, said.answer.format(word=word), slips=False)


def recall(talk: Talk) -> Turn:
    """The user asks for what she said, or for what she did not say."""
    kind = talk.rng.choice(list(talk.facts) if talk.facts and (talk.last or talk.rng.random() < 0.9) else SAYINGS)
    question = talk.ask(GAMES, f"recall {kind}")
    if kind not in talk.facts:
        return Turn(question, "You have not told me.", expect_all=["not told"])
    word = talk.facts[kind]
    return Turn(question, GAMES[f"recall {kind}"].answer.format(word=word), expect_all=[word])
