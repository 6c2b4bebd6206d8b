"""The demo model's conversations: well-formed, true to the tables, and never those that the model is examined with."""

import itertools
import re
from pathlib import Path
from random import Random

import pytest

from training import copying, make_heldout, small_talk, travel, wordings
from training.conversations import Case, check, conversation, conversations, heldout, sample
from training.talk import Talk

TRAINING = Path(__file__).parents[2] / "training"
FILES = sorted(path for path in (TRAINING / "texts").glob("*.txt") if path.name != "cities.txt")
CITIES = travel.cities()


def some(n: int, seed: int = 0, split: str = "train") -> list:
    return list(itertools.islice(conversations(seed, split), n))


def talk_of_a_list(seed: int, heldout: bool = False) -> tuple[Talk, str]:
    """A conversation that began with a list of another model, and that list."""
    rng = Random(seed)
    while True:
        talk = Talk(rng, heldout)
        try:
            return talk, travel.foreign_list(talk).answer
        except wordings.Unsuitable:   # drew a list of the other split
            continue


def plain(text: str) -> str:
    """The text without its capitals, marks and spaces."""
    return re.sub(r"\W+", " ", text.casefold()).strip()


def test_conversations_are_well_formed_and_short():
    for messages in some(3000):
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and 2 <= len(turns) <= 2 * travel.MOST_TURNS
        assert all(message["content"].strip() == message["content"] != "" for message in messages)
        assert not any(mark in message["content"] for message in messages for mark in "{}|[]")
        assert "learn" not in messages[-1]
        assert sum(len(message["content"]) for message in messages) / 3 < 1024   # a token has more than three letters
        for message in messages:
            if message["role"] == "assistant" and message.get("learn", True):
                assert len(message["content"]) < 450


def test_the_same_seed_gives_the_same_conversations():
    assert some(200, seed=4) == some(200, seed=4) != some(200, seed=5)
    assert some(200, seed=4) != some(200, seed=4, split="heldout")


def test_the_table_of_cities_is_complete():
    assert len(CITIES) >= 80
    sights = [sight for city in CITIES for sight in city.sights]
    names = [name.casefold() for sight in sights for name in (sight.core, sight.alias) if name]
    assert len(set(names)) == len(names)
    for city in CITIES:
        assert len(city.sights) >= 3 and city.name in city.water
        assert all(getattr(city, field) for field in (*travel.FACTS, "role"))
    for sight in sights:
        assert bool(sight.made) == (sight.year is not None)
        assert sight.special.endswith(".") and not sight.what.endswith(".")


def test_years_are_read_from_the_words():
    def year(made: str) -> int | None:
        return travel.Sight("the Wall", "", made, "a wall", "It is long.", False).year

    assert [year("begun in 447 BC"), year("completed in 80 AD"), year("built in the 13th century"), year("")] == [
        -447, 80, 1250, None,
    ]


def test_a_number_means_the_sight_at_that_place_in_any_list():
    """The names are read back from the list as it was written, whatever its style."""
    checked = 0
    for seed in range(500):
        talk, listed = talk_of_a_list(seed)
        for n, text in re.findall(r"(?m)^\W*(\d)\W+(?:The )?(.*)$", listed):
            sight = talk.listed[int(n) - 1]
            assert text.startswith((sight.core, sight.alias.removeprefix("the ") or sight.core)), (text, sight)
            checked += 1
        turn = travel.number(talk)
        n = next(i for i, sight in enumerate(talk.listed) if sight is talk.sight) + 1
        assert turn.answer.startswith(f"#{n}, {talk.sight.name}, ")
        assert turn.answer.endswith(talk.sight.special or "only some famous places.")
        ways = {f"#{n}", str(n), travel.NUMBERS[n], travel.ORDINALS[n]} | ({"last"} if n == len(talk.listed) else set())
        assert any(way in turn.question.lower() for way in ways)
    assert checked > 500


@pytest.mark.parametrize("move", [travel.oldest, travel.newest])
def test_the_oldest_and_the_newest_are_what_the_dates_say(move):
    best = min if move is travel.oldest else max
    checked = 0
    for seed in range(300):
        talk, _ = talk_of_a_list(seed)
        try:
            answer = move(talk).answer
        except wordings.Unsuitable:
            continue
        dates = [sight for sight in talk.listed if sight.year is not None]
        assert f"so {best(dates, key=lambda sight: sight.year).name} " in answer
        assert all(sight.dated(talk.listed.index(sight) + 1) in answer for sight in dates)
        checked += 1
    assert checked > 100


def test_an_entry_of_the_users_list_is_copied():
    for seed in range(300):
        talk = Talk(Random(seed))
        turn = copying.given_list(talk)
        n, thing = re.fullmatch(r"#(\d), (.*)\.", turn.answer).groups()
        assert talk.things[int(n) - 1] == thing
        assert re.search(rf"(- |\W{n}\W+){re.escape(thing)}(\s|$)", turn.question), turn


def test_sums_are_right():
    signs = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}
    checked = 0
    for seed in range(2000):
        answer = small_talk.arithmetic(Talk(Random(seed))).answer
        if match := re.fullmatch(r"(\d+) ([+x-]) (\d+) = (\d+)\.", answer):
            a, sign, b, result = match.groups()
            assert signs[sign](int(a), int(b)) == int(result)
            checked += 1
    assert checked > 1000


def expansions(pattern: str) -> set[str]:
    """All the questions of a pattern, its slots unfilled."""
    match = wordings.CHOICE.search(pattern)
    if match is None:
        return {plain(pattern)}
    return {
        text
        for choice in match[1].split("|")
        for text in expansions(pattern[: match.start()] + choice + pattern[match.end() :])
    }


def test_no_heldout_wording_is_a_training_wording():
    for path in FILES:
        intents = wordings.load(path)
        trained = {text for intent in intents.values() for pattern in intent.questions for text in expansions(pattern)}
        kept = {text for intent in intents.values() for pattern in intent.heldout for text in expansions(pattern)}
        assert not trained & kept, path.name


def test_training_never_sees_a_heldout_question_or_list():
    cases = heldout()
    questions = {plain(case.messages[-1]["content"]) for case in cases}
    lists = {message["content"] for case in cases for message in case.messages if "\n" in message["content"]}
    own = {travel.list_text(city, list(city.sights[:n])) for city in CITIES for n in (2, 3, 4)}
    for messages in itertools.islice(conversations(seed=7), 50_000):
        for message in messages:
            if message["role"] == "user":
                assert plain(message["content"]) not in questions
            elif "\n" in message["content"]:
                assert message["content"] in own or message["content"] not in lists


def test_the_orders_of_foreign_lists_are_split():
    for heldout_list in (False, True):
        for seed in range(100):
            talk, _ = talk_of_a_list(seed, heldout_list)
            assert travel.is_heldout_list(talk.city, talk.listed) == heldout_list


def test_there_are_a_hundred_cases_of_the_agreed_kinds():
    cases = heldout()
    assert len(cases) == 100
    assert {kind: sum(case.kind == kind for case in cases) for kind in make_heldout.CASES} == make_heldout.CASES
    for case in [*cases, sample()]:
        assert case.messages[-1]["role"] == "user"
        assert case.expect_all


def test_check_accepts_the_right_answer_and_no_other():
    cases = [*heldout(), sample()]
    for case in cases:
        assert check(case, case.answer) and check(case, case.answer.upper() + " Have a good trip!")
        assert not check(case, "") and not check(case, "I have no idea.")
    for case, other in itertools.permutations(cases, 2):
        if case.kind == other.kind:
            assert not check(case, other.answer), (case, other)


def test_check_wants_the_right_sight():
    case = sample()
    paris = next(city for city in CITIES if city.name == "Paris")
    assert [check(case, sight.answer) for sight in paris.sights] == [True, False, False, False]
    assert not check(case, "The Eiffel Tower is a museum. It shows the Mona Lisa.")


def test_check_keeps_to_whole_words():
    case = Case("sum", [], "", ["= 12"], [], 1, ["13"])
    assert check(case, "7 + 5 = 12.") and check(case, "= 12, not 130")
    assert not check(case, "= 120") and not check(case, "= 12 or 13")


def test_right_answers_of_new_heldout_conversations_pass():
    rng = Random(3)
    for _ in range(500):
        messages, turn = conversation(rng, heldout=True)
        make_heldout.case(turn, messages[:-1], messages[-1]["content"])   # asserts that its check accepts the answer
