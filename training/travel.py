"""Questions about cities and their sights, and the answers. Facts: texts/cities.txt; wordings: texts/travel.txt."""

from __future__ import annotations

import re
import zlib
from random import Random

from training.cities import FACTS, TEXTS, UNKNOWN_REASON, City, Sight, cities
from training.talk import Talk, Turn
from training.wordings import Unsuitable, capitalized, fill, listing, load

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
MOST_TURNS = 8   # of a conversation
SUFFIXES = {1: "st", 2: "nd", 3: "rd"}
ORDINALS = ["zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh"]
WORDINGS = load(TEXTS / "travel.txt")
OTHERS = load(TEXTS / "others.txt")   # how other models write lists of sights


def is_heldout_list(city: City, sights: list[Sight]) -> bool:
    """Whether this choice and order of sights is kept from training, unless it is the order of cities.txt."""
    if tuple(sights) == city.sights[: len(sights)]:
        return False
    return zlib.crc32("|".join(sight.name for sight in sights).encode()) % 6 == 0


def any_city(talk: Talk) -> City:
    return talk.rng.choice(cities())


def spoken(city: City, rng: Random) -> str:
    """A name of the city as people say it."""
    return city.alias if city.alias and rng.random() < 0.3 else city.name


def named(sight: Sight, rng: Random) -> str:
    """A name of the sight as people say it."""
    name = sight.alias if sight.alias and rng.random() < 0.35 else sight.name
    return name.removeprefix("the ") if rng.random() < 0.12 else name


def about_sight(question: str, sight: Sight, others: list[Sight], place: int = 0) -> Turn:
    """The answer about one sight; `others` are what a wrong answer could speak of.

    With its `place` in a list the answer begins "#2, the Louvre, is": what follows a number in the list follows it in the
    answer too, which is easier to learn than to find the name from a number in the question alone.
    """
    wrong = [other.core for other in others if other.core.lower() not in f"{sight.name} {sight.answer}".lower()]
    short = f"{sight.placed(place)} {sight.statement}." if place else sight.short
    if not sight.what:
        return Turn(question, f"{short} {UNKNOWN_REASON}", short, ["do not know"], reject=wrong)
    keywords = sight.keywords
    at_least = max(1, (3 * len(keywords) + 4) // 5)
    return Turn(question, f"{short} {sight.special}", short, [sight.core], keywords, at_least, wrong)


def list_text(city: City, sights: list[Sight]) -> str:
    """The model's own list."""
    lines = [f"{i}. {sight.title}: {sight.what}." for i, sight in enumerate(sights, 1)]
    intro = f"{city.name}, {city.role}, is known for {city.known}. Here are {NUMBERS[len(sights)]} sights to see:"
    return "\n".join([intro, "", *lines, "", f"Enjoy your stay in {city.name}!"])


# The moves. Each makes one turn, or raises Unsuitable.


def sights_list(talk: Talk) -> Turn:
    city = any_city(talk)
    name = spoken(city, talk.rng)
    n = min(3, len(city.sights))
    if talk.rng.random() < 0.75:
        question = talk.ask(WORDINGS, "list", city=name, **{"in": f"in {name}"})
    else:
        n = talk.rng.randint(2, min(4, len(city.sights)))
        question = talk.ask(WORDINGS, "list n", city=name, n=NUMBERS[n] if talk.rng.random() < 0.8 else str(n))
    talk.city, talk.listed, talk.sight, talk.fact = city, list(city.sights[:n]), None, ""
    short = f"In {city.name}, see {listing([sight.name for sight in talk.listed])}."
    cores = [sight.core for sight in city.sights]
    return Turn(question, list_text(city, talk.listed), short, [city.name], cores, n)


def foreign_list(talk: Talk) -> Turn:
    """A list as another model would write it: other words, other sights, another order."""
    talk.require(talk.turn < MOST_TURNS - 1)   # a question about it must follow
    rng, city = talk.rng, any_city(talk)
    sights = rng.sample(city.sights, rng.randint(2, min(4, len(city.sights))))
    if rng.random() < 0.12:
        sights[rng.randrange(len(sights))] = Sight(rng.choice(OTHERS["unknown sight"].questions))
    talk.require(is_heldout_list(city, sights) == talk.heldout)
    question = talk.ask(WORDINGS, "list", city=city.name, **{"in": f"in {city.name}"})
    slots = {"city": city.name, "role": city.role, "known": city.known, "country": city.country}
    number = rng.choice(["{}. ", "{}. ", "{}. ", "{}. ", "{}) ", "{}: ", "**{}.** ", "#{} ", "- "])
    title = rng.choice(["{}: ", "{}: ", "{} - ", "**{}**: ", "**{}** - ", "{} – ", "*{}*: ", "{}. "])
    style = rng.choice(["plain", "plain", "mixed", "facts", "long", "bare", "bare"])
    separator = rng.choice(["\n"] * 6 + ["\n\n", " "])
    lines = []
    for i, sight in enumerate(sights, 1):
        name = capitalized(named(sight, rng))
        plain = fill(rng.choice(OTHERS["sight"].questions), rng, name=name, core=name.removeprefix("The "), **slots)
        facts = rng.choice([capitalized(sight.what) + ".", sight.special, sight.answer])
        texts = {"plain": plain, "facts": facts, "mixed": rng.choice([plain, facts]), "long": f"{facts} {plain}", "bare": None}
        text = texts[style if sight.what or style == "bare" else "plain"]
        lines.append(number.format(i) + (name if text is None else title.format(name) + text))
    parts = [fill(rng.choice(OTHERS[part].questions), rng, **slots) for part in ("intro", "closing")]
    answer = "\n\n".join([parts[0], separator.join(lines), *(parts[1:] if rng.random() < 0.5 else [])])
    talk.city, talk.listed, talk.sight, talk.fact = city, sights, None, ""
    return Turn(question, answer, learn=False)


def place(rng: Random, n: int, length: int) -> str:
    """A way to point at entry n of a list."""
    ways = [f"#{n}", f"#{n}", f"number {n}", f"number {NUMBERS[n]}", f"no. {n}", f"the {ORDINALS[n]} one",
            f"the {ORDINALS[n]} one", f"the {ORDINALS[n]}", f"the {ORDINALS[n]} sight", f"the {ORDINALS[n]} place",
            f"sight {n}", f"item {n}", f"the {ORDINALS[n]} item", f"the {ORDINALS[n]} attraction",
            f"the {n}{SUFFIXES.get(n, 'th')} one"]
    if n == length:
        ways += ["the last one", "the last one"]
    return rng.choice(ways)


def entry(talk: Talk) -> int:
    """The number of a sight in the list, not of the one spoken of last."""
    talk.require(talk.listed)
    n = talk.rng.randint(1, len(talk.listed))
    talk.require(talk.listed[n - 1] is not talk.sight)
    talk.sight, talk.fact = talk.listed[n - 1], ""
    return n


def number(talk: Talk) -> Turn:
    n = entry(talk)
    question = talk.ask(WORDINGS, "number", nth=place(talk.rng, n, len(talk.listed)))
    return about_sight(question, talk.sight, talk.listed, n)


def number_when(talk: Talk) -> Turn:
    n = entry(talk)
    return dated(talk.ask(WORDINGS, "number when", nth=place(talk.rng, n, len(talk.listed))), talk.sight, n)


def dated(question: str, sight: Sight, place: int = 0) -> Turn:
    """When a sight was made, or that there is no one date."""
    if not sight.made:
        name = f"#{place}, {sight.name}" if place else sight.name
        return Turn(question, f"I do not know one date for {name}.", expect_all=["not know", sight.core])
    answer = f"{capitalized(sight.dated(place))}."
    return Turn(question, answer, expect_all=[sight.core, *re.findall(r"\d+\w*", sight.made)])


def too_far(talk: Talk) -> Turn:
    talk.require(talk.listed)
    length = len(talk.listed)
    nth = place(talk.rng, talk.rng.randint(length + 1, min(length + 3, 7)), 0)
    answer = f"There are only {NUMBERS[length]} sights in this list."
    return Turn(talk.ask(WORDINGS, "too far", nth=nth), answer, expect_all=["only", NUMBERS[length]])


def how_many(talk: Talk) -> Turn:
    talk.require(talk.listed)
    count = NUMBERS[len(talk.listed)]
    return Turn(talk.ask(WORDINGS, "how many"), f"There are {count} sights in this list.", expect_all=[count])


def comparison(question: str, sights: list[Sight], newest: bool, places: bool = True) -> Turn:
    """Which of the sights with a date is the oldest (or newest), with the dates it follows from and their places in a list."""
    dates = [sight for sight in sights if sight.year is not None]
    years = [sight.year or 0 for sight in dates]
    if len(dates) < 2 or len(set(years)) < len(years):
        raise Unsuitable
    best = max(dates, key=lambda s: s.year or 0) if newest else min(dates, key=lambda s: s.year or 0)
    degree = ("newer" if newest else "older") if len(dates) == 2 else ("the newest" if newest else "the oldest")
    conclusion = f"so {best.name} {'are' if best.plural else 'is'} {degree}"
    reasons = [sight.dated(sights.index(sight) + 1 if places else 0) for sight in dates]
    answer = f"{capitalized(listing(reasons))}, {conclusion}."
    return Turn(question, answer, expect_all=[conclusion])


def oldest(talk: Talk) -> Turn:
    talk.require(talk.listed)
    return comparison(talk.ask(WORDINGS, "oldest"), talk.listed, newest=False)


def newest(talk: Talk) -> Turn:
    talk.require(talk.listed)
    return comparison(talk.ask(WORDINGS, "newest"), talk.listed, newest=True)


def older(talk: Talk) -> Turn:
    city = any_city(talk)
    sights = talk.rng.sample(city.sights, 2)
    first, second = sights
    question = talk.ask(WORDINGS, "older", sight=first.name, other=second.name)
    turn = comparison(question, sights, newest=False, places=False)
    talk.city, talk.listed, talk.sight, talk.fact = city, [], None, ""
    return turn


def more(talk: Talk) -> Turn:
    talk.require(talk.listed)
    question = talk.ask(WORDINGS, "else")
    rest = [sight for sight in talk.city.sights if sight not in talk.listed]
    talk.listed, city = [], talk.city
    if not rest:
        return Turn(question, f"I know no other sights in {city.name}.", expect_all=["no other", city.name])
    talk.sight = rest[0]
    answer = f"You could also see {rest[0].name}, {rest[0].what}."
    return Turn(question, answer, expect_all=[rest[0].core], expect_any=rest[0].keywords)


def one_sight(talk: Talk) -> Turn:
    city = any_city(talk)
    name = spoken(city, talk.rng)
    question = talk.ask(WORDINGS, "one", city=name, **{"in": f"in {name}"})
    talk.city, talk.listed, talk.sight, talk.fact = city, [], city.sights[0], ""
    short = f"In {city.name}, see {city.sights[0].name}."
    return Turn(question, f"{short} It is {city.sights[0].what}.", short, [city.sights[0].core])


def about_city(talk: Talk) -> Turn:
    city = any_city(talk)
    question = talk.ask(WORDINGS, "about", city=spoken(city, talk.rng))
    talk.city, talk.listed, talk.sight, talk.fact = city, [], None, "about"
    return fact_turn(question, city, "about")


def fact_turn(question: str, city: City, kind: str) -> Turn:
    if kind == "about":
        words = [*re.findall(r"[A-Z]\w+", city.role), *city.fact_words("known")]
        return Turn(question, city.about, f"{city.name} is {city.role}.", [city.name], words, (3 * len(words) + 4) // 5)
    return Turn(question, city.fact(kind), expect_all=[city.name, *city.fact_words(kind)])


def fact(talk: Talk) -> Turn:
    city, kind = any_city(talk), talk.rng.choice(FACTS)
    name = spoken(city, talk.rng)
    question = talk.ask(WORDINGS, kind, needs="{in} {city}", city=name, **{"in": f"in {name}"})
    talk.city, talk.listed, talk.sight, talk.fact = city, [], None, kind
    return fact_turn(question, city, kind)


def fact_there(talk: Talk) -> Turn:
    """A fact about the city spoken of, without its name."""
    talk.require(talk.city)
    kind = talk.fact = talk.rng.choice([kind for kind in FACTS if kind != talk.fact])
    where = talk.rng.choice(["there", "there", "there", "in that city"])
    return fact_turn(talk.ask(WORDINGS, kind, without="{city}", **{"in": where}), talk.city, kind)


def and_city(talk: Talk) -> Turn:
    """The same question about another city: "And in Rome?"."""
    talk.require(talk.fact)
    talk.city, talk.listed, talk.sight = any_city(talk), [], None
    return fact_turn(talk.ask(WORDINGS, "and city", city=talk.city.name), talk.city, talk.fact)


def sight(talk: Talk) -> Turn:
    city = any_city(talk)
    talk.city, talk.listed, talk.fact, talk.sight = city, [], "", talk.rng.choice(city.sights)
    question = talk.ask(WORDINGS, "sight", sight=named(talk.sight, talk.rng))
    return about_sight(question, talk.sight, [other for other in city.sights if other is not talk.sight])


def named_sight(talk: Talk) -> Turn:
    """A sight of the list, by its name."""
    entry(talk)
    return about_sight(talk.ask(WORDINGS, "sight", sight=named(talk.sight, talk.rng)), talk.sight, talk.listed)


def located(sight: Sight, city: City) -> str:
    country = "" if city.country == city.name else f", {city.country.removeprefix('the ')}"
    return f"{sight.name} {'are' if sight.plural else 'is'} in {city.name}{country}"


def where(talk: Talk) -> Turn:
    city = any_city(talk)
    talk.city, talk.listed, talk.fact, talk.sight = city, [], "", talk.rng.choice(city.sights)
    question = talk.ask(WORDINGS, "where", sight=named(talk.sight, talk.rng))
    return Turn(question, f"{capitalized(located(talk.sight, city))}.", expect_all=[talk.sight.core, city.name])


def when(talk: Talk) -> Turn:
    city = any_city(talk)
    talk.city, talk.listed, talk.fact, talk.sight = city, [], "", talk.rng.choice(city.sights)
    return dated(talk.ask(WORDINGS, "when", sight=named(talk.sight, talk.rng)), talk.sight)


def it_when(talk: Talk) -> Turn:
    talk.require(talk.sight and not talk.sight.plural)
    return dated(talk.ask(WORDINGS, "it when"), talk.sight)


def it_where(talk: Talk) -> Turn:
    talk.require(talk.sight and not talk.sight.plural)
    question = talk.ask(WORDINGS, "it where")
    return Turn(question, f"{capitalized(located(talk.sight, talk.city))}.", expect_all=[talk.sight.core, talk.city.name])


def not_there(talk: Talk) -> Turn:
    """Is the sight in this city? Half of the time it is not."""
    city = any_city(talk)
    other = any_city(talk) if talk.rng.random() < 0.5 else city
    talk.city, talk.listed, talk.fact, talk.sight = city, [], "", talk.rng.choice(city.sights)
    question = talk.ask(WORDINGS, "not there", sight=talk.sight.name, wrong=other.name)
    yes = "Yes" if other is city else "No"
    return Turn(question, f"{yes}, {located(talk.sight, city)}.", expect_all=[yes, city.name])


def capital_of(talk: Talk) -> Turn:
    city = talk.rng.choice([city for city in cities() if city.capital_of])
    question = talk.ask(WORDINGS, "capital of", country=city.capital_of)
    talk.city, talk.listed, talk.sight, talk.fact = city, [], None, ""
    return Turn(question, f"The capital of {city.capital_of} is {city.name}.", expect_all=[f"is {city.name}"])


def is_capital(talk: Talk) -> Turn:
    city = any_city(talk)
    is_one = city.capital_of == city.country
    talk.require(city.capital_of or "capital" not in city.role)
    question = talk.ask(WORDINGS, "is capital", city=city.name, country=city.country)
    talk.city, talk.listed, talk.sight, talk.fact = city, [], None, ""
    yes = "Yes" if is_one else "No"
    return Turn(question, f"{yes}, {city.name} is {city.role}.", expect_all=[yes, city.role])
