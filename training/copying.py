"""Exercises in copying: lists of any words, and words to say again. Wordings: texts/copying.txt.

They teach, on words without end, what a question about an entry of a list needs: to go where the number stands and to say what
stands behind it. Facts of ninety cities alone would be learned by heart instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from training.cities import TEXTS, cities
from training.small_talk import SLOTS, WORDS
from training.talk import Talk, Turn
from training.travel import NUMBERS, place
from training.wordings import capitalized, fill, load

WORDINGS = load(TEXTS / "copying.txt")
LONGEST_LIST = 7
BEGINNINGS = [*"bcdfghjklmnprstvwz", "br", "ch", "cl", "dr", "fl", "gr", "kn", "pl", "sh", "st", "tr", "th", "qu", ""]
MIDDLES = ["a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou", "ie"]
ENDINGS = [*"bdgklmnprst", "ck", "ll", "nd", "ng", "nt", "rt", "st", "x", "", "", "", ""]


def invented(rng: Random) -> str:
    """A word that nobody has heard."""
    syllables = (rng.choice(BEGINNINGS) + rng.choice(MIDDLES) + rng.choice(ENDINGS) for _ in range(rng.randint(1, 3)))
    return "".join(syllables)


def thing(rng: Random) -> str:
    """A word or a name, known or invented, or a number."""
    kind = rng.randrange(8)
    if kind < 3:
        word = invented(rng)
        return capitalized(word) if kind else word
    if kind == 3:
        return rng.choice(SLOTS[rng.choice(["name", "pet", "job", "colour", "town"])])
    if kind == 4:
        return rng.choice(rng.choice(WORDS[rng.choice(["opposite", "plural", "rhyme"])]))
    if kind == 5:
        return str(rng.randint(0, 10 ** rng.randint(1, 4)))
    city = rng.choice(cities())
    return city.name if kind == 6 else rng.choice(city.sights).name


def nth(rng: Random, n: int, length: int) -> str:
    """A way to point at an entry that is not a sight."""
    while any(word in (way := place(rng, n, length)) for word in ("sight", "place", "attraction")):
        pass
    return way


def entry(talk: Talk) -> Turn:
    """Which thing stands at a number."""
    n = talk.rng.randint(1, len(talk.things))
    question = talk.ask(WORDINGS, "number", nth=nth(talk.rng, n, len(talk.things)))
    return Turn(question, f"#{n}, {talk.things[n - 1]}.")


def written(things: Sequence[str], rng: Random) -> str:
    """A list as people write it."""
    number = rng.choice(["{}. ", "{}. ", "{}. ", "{}) ", "{}: ", "#{} ", "**{}.** ", "- "])
    separator = rng.choice(["\n", "\n", "\n", " "])
    return separator.join(number.format(n) + word for n, word in enumerate(things, 1))


def given_list(talk: Talk) -> Turn:
    """The user writes a list and asks for one of its entries."""
    talk.require(not talk.heldout)
    rng = talk.rng
    change = rng.choice([capitalized, str])
    talk.things = [change(thing(rng)) for _ in range(rng.randint(2, LONGEST_LIST))]
    talk.city, talk.listed, talk.sight, talk.fact = None, [], None, ""
    turn = entry(talk)
    intro = fill(rng.choice(WORDINGS["intro"].questions), rng)
    return Turn(f"{intro}\n{written(talk.things, rng)}\n{turn.question}", turn.answer, slips=False)


def given_entry(talk: Talk) -> Turn:
    """One more entry of the user's list."""
    talk.require(talk.things)
    return entry(talk)


def given_length(talk: Talk) -> Turn:
    """How long the user's list is."""
    talk.require(talk.things)
    return Turn(talk.ask(WORDINGS, "how many"), f"There are {NUMBERS[len(talk.things)]} things in this list.")


def echo(talk: Talk) -> Turn:
    """A few words to be said again."""
    talk.require(not talk.heldout)
    words = " ".join(thing(talk.rng) for _ in range(talk.rng.randint(1, 6)))
    return Turn(talk.ask(WORDINGS, "echo", words=words), words, slips=False)
