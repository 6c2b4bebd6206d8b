"""The table of cities (texts/cities.txt) as objects, and the sentences that are made of it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from training.wordings import capitalized

TEXTS = Path(__file__).parent / "texts"
FACTS = ("country", "language", "money", "water", "known", "food", "time")
UNKNOWN_REASON = "I am a very small demonstration model and know only some famous places."


@dataclass(frozen=True)
class Sight:
    """One line of cities.txt. `name` has its article ("the Louvre"); `made` is "opened in 1793", or empty.

    Of a sight that is not in cities.txt only the name is known; others may speak of it.
    """

    name: str
    alias: str = ""
    made: str = ""
    what: str = ""
    special: str = ""
    plural: bool = False

    @property
    def title(self) -> str:
        return capitalized(self.name)

    @property
    def answer(self) -> str:
        return f"{self.short} {self.special or UNKNOWN_REASON}"

    @property
    def short(self) -> str:
        return f"{self.title} {self.statement}." if self.what else "I am sorry, I do not know that sight."

    @property
    def statement(self) -> str:
        """What is said of it, without its name."""
        return f"{'are' if self.plural else 'is'} {self.what or 'a sight that I do not know'}"

    def placed(self, place: int) -> str:
        """Its name as it begins a sentence that says its place in a list; 0 is none."""
        return f"#{place}, {self.name}," if place else self.name

    def dated(self, place: int = 0) -> str:
        return f"{self.placed(place)} {'were' if self.plural else 'was'} {self.made}"

    @property
    def year(self) -> int | None:
        """When it was made, for comparing; the middle of a century; negative before Christ."""
        found = re.search(r"(\d+)(th century| BC)?", self.made)
        if found is None:
            return None
        number, unit = int(found[1]), found[2]
        return -number if unit == " BC" else number * 100 - 50 if unit else number

    @property
    def core(self) -> str:
        """The name without its article."""
        return self.name.removeprefix("the ").removeprefix("The ")

    @property
    def keywords(self) -> list[str]:
        """The words and numbers of its answer that are about this sight."""
        words = re.findall(r"[A-Z]?[\w'-]{5,}|[A-Z]\w{3,}|\d+", f"{self.what} {self.special}")
        return [word for word in dict.fromkeys(words) if word.lower() not in self.name.lower()]


@dataclass(frozen=True)
class City:
    """A city of cities.txt with its sights."""

    name: str
    alias: str
    country: str
    role: str
    language: str
    money: str
    water: str
    known: str
    food: str
    time: str
    sights: tuple[Sight, ...]

    @property
    def capital_of(self) -> str:
        """The country (or province) it is the capital of, or nothing."""
        return self.role.removeprefix("the capital of ") if self.role.startswith("the capital of ") else ""

    def fact(self, kind: str) -> str:
        """The answer about its country, language, money, water, known, food or time."""
        return {
            "country": f"{self.name} is in {self.country}.",
            "language": f"People in {self.name} speak {self.language}.",
            "money": f"In {self.name} you pay in {self.money}.",
            "water": self.water,
            "known": f"{self.name} is known for {self.known}.",
            "food": f"In {self.name} you should try {self.food}.",
            "time": f"The best time for {self.name} is {self.time}.",
        }[kind]

    def fact_words(self, kind: str) -> list[str]:
        """The words that an answer about this fact must contain."""
        text = self.water.replace(self.name, "") if kind == "water" else str(getattr(self, kind))
        if kind in ("country", "language", "water", "time"):
            text = text.removeprefix("The ")
            return [word for word in re.findall(r"[A-Z][\w']+", text) if word not in ("In", "But")] or text.split()[:2]
        return [word for word in re.findall(r"[\w'-]+", text) if word not in ("and", "or", "of", "with", "its", "the", "a")]

    @property
    def about(self) -> str:
        return f"{self.name} is {self.role}. It is known for {self.known}."


@functools.cache
def cities() -> tuple[City, ...]:
    """All cities of cities.txt."""
    heads: list[tuple[list[str], list[Sight]]] = []
    for line in (TEXTS / "cities.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        fields = [part.strip() for part in line.split("|")]
        name, _, alias = fields[0].partition(" = ")
        if line.startswith(" "):
            made = "" if fields[1] == "-" else fields[1]
            plural = fields[2].startswith("are ")
            heads[-1][1].append(Sight(name, alias, made, fields[2].removeprefix("are "), fields[3], plural))
        else:
            heads.append(([name, alias, *fields[1:]], []))
    return tuple(City(*fields, tuple(sights)) for fields, sights in heads)   # type: ignore[arg-type]
