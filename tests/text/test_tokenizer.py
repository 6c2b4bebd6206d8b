"""Tokenizer and chat template against mistral-common, the reference for both."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import mistral_common
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from edgemistral.demo import checkpoint_dir
from edgemistral.errors import BadInput, BadRequest
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from edgemistral.text.tokenizer import Tokenizer

TEXTS: list[str] = json.loads((Path(__file__).parents[1] / "data" / "texts.json").read_text(encoding="utf-8"))
SMALL = Path(__file__).parents[1] / "data" / "tokenizer.model"
MODELS = {
    "v1": "tokenizer.model.v1",   # Mistral-7B v0.1 and v0.2
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",   # Mistral-7B v0.3
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
PARIS = [
    {"role": "user", "content": "I am going to Paris, what should I see?"},
    {"role": "assistant", "content": "Paris, the capital."},
    {"role": "user", "content": "What is so great about #1?"},
]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


class Pair:
    """Our tokenizer and the reference over the same file."""

    def __init__(self, version: str) -> None:
        self.path = Path(mistral_common.__file__).parent / "data" / MODELS[version]
        self.ours = SentencePieceTokenizer(self.path.read_bytes())
        self.reference = MistralTokenizer.from_file(str(self.path))

    def reference_text_ids(self, text: str) -> list[int]:
        return self.reference.instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False)

    def reference_chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        if messages[-1]["role"] == "assistant":
            messages = [*messages[:-1], {**messages[-1], "prefix": True}]
        return self.reference.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


@pytest.fixture(scope="module")
def v1() -> Tokenizer:
    return Pair("v1").ours


def varied_texts(count: int) -> list[str]:
    """The fixture's texts, then slices and mixtures of them with odd spaces around, always the same ones."""
    rng = random.Random(0)
    spaces = ("", "", "", " ", "  ", "\n", "\t", "\u00a0", "   \n ")
    texts = dict.fromkeys(TEXTS)
    while len(texts) < count:
        parts = []
        for text in rng.sample(TEXTS, rng.randint(1, 3)):
            start = rng.randrange(len(text) + 1)
            parts.append(text[start:rng.randint(start, len(text))])
        texts[rng.choice(spaces) + rng.choice(spaces).join(parts) + rng.choice(spaces)] = None
    return list(texts)


def varied_chats(count: int) -> list[list[dict[str, str]]]:
    """Conversations that mistral-common accepts: runs of one role, empty texts, a prefix at the end."""
    rng = random.Random(1)
    texts = ["", *varied_texts(500)]
    chats = []
    for _ in range(count):
        roles = ["system"] * rng.choice((0, 0, 1, 2)) + ["user"] * rng.choice((0, 1, 1, 1, 2))
        roles += rng.choices(("assistant", "user"), k=rng.randint(0, 5))
        if set(roles) <= {"assistant"}:
            roles.insert(0, "user")
        contents = [rng.choice(texts) for _ in roles]
        chats.append([
            {"role": role, "content": content or ("Yes." if role == "assistant" else "")}   # it refuses empty answers
            for role, content in zip(roles, contents, strict=True)
        ])
    return chats


def test_ids_equal_the_reference_on_2500_texts(pair: Pair) -> None:
    for text in varied_texts(2500):
        ids = pair.ours.encode(text)
        assert ids == pair.reference_text_ids(text), repr(text)
        assert pair.ours.decode(ids) == text.replace("▁", " "), repr(text)   # SentencePiece's own sign for a space


def test_ids_equal_the_reference_on_500_chats(pair: Pair) -> None:
    for messages in varied_chats(500):
        assert pair.ours.encode_chat(messages) == pair.reference_chat_ids(messages), messages


@settings(max_examples=300, deadline=None)
@given(text=unicode_text)
def test_any_text_gives_the_reference_ids_and_comes_back(pair: Pair, text: str) -> None:
    ids = pair.ours.encode(text)
    assert ids == pair.reference_text_ids(text)
    assert pair.ours.decode(ids) == text.replace("▁", " ")


@settings(max_examples=150, deadline=None)
@given(system=st.none() | unicode_text, contents=st.lists(unicode_text.filter(bool), min_size=1, max_size=5))
def test_any_chat_gives_the_reference_ids(pair: Pair, system: str | None, contents: list[str]) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": role, "content": c} for role, c in zip(itertools.cycle(("user", "assistant")), contents)]
    assert pair.ours.encode_chat(messages) == pair.reference_chat_ids(messages)


def test_golden_chat_ids(v1: Tokenizer) -> None:
    assert v1.encode_chat(PARIS) == [
        1, 733, 16289, 28793, 315, 837, 1404, 298, 5465, 28725, 767, 1023, 315, 1032, 28804, 733, 28748, 16289, 28793,
        5465, 28725, 272, 5565, 28723, 2,
        733, 16289, 28793, 1824, 349, 579, 1598, 684, 422, 28740, 28804, 733, 28748, 16289, 28793,
    ]  # fmt: skip


def test_system_text_stands_before_the_first_user_text_in_v1_and_the_last_in_v3() -> None:
    system = {"role": "system", "content": "Be brief."}
    for version, first, last in (
        ("v1", "[INST] Be brief.\n\nI am", "[INST] What"),
        ("v3", "[INST]▁I▁am", "[INST]▁Be▁brief.<0x0A><0x0A>What"),
    ):
        tokenizer = Pair(version).ours
        ids = tokenizer.encode_chat([system, *PARIS])
        text = tokenizer.decode(ids) if version == "v1" else "".join(map(tokenizer.piece, ids))
        assert first in text
        assert last in text


def test_begin_of_sequence_appears_once_and_text_never_makes_control_ids(pair: Pair) -> None:
    tokenizer = pair.ours
    special = [i for i in range(tokenizer.n_words) if tokenizer._model.is_control(i)]
    spelled = "".join(tokenizer.piece(i) for i in special)
    for text in (spelled, *map(tokenizer.piece, special), "<unk>"):
        assert not set(tokenizer.encode(text)) & {0, *special}
    ids = tokenizer.encode_chat([{"role": "user", "content": spelled}, {"role": "assistant", "content": spelled}])
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.eos_id not in ids


def test_an_assistant_message_at_the_end_is_a_prefix_and_an_empty_one_earlier_just_ends(v1: Tokenizer) -> None:
    question, answer = PARIS[0], {"role": "assistant", "content": "Paris"}
    prompt = v1.encode_chat([question])
    assert v1.encode_chat([question, answer]) == prompt + v1.encode("Paris")
    assert v1.encode_chat([question, {**answer, "content": ""}]) == prompt
    silent = v1.encode_chat([question, {**answer, "content": ""}, question])
    assert silent == [*prompt, v1.eos_id, *prompt[1:]]


@pytest.mark.parametrize(("messages", "field"), [
    ([], "messages"),
    (None, "messages"),
    ("hello", "messages"),
    ({"role": "user", "content": "x"}, "messages"),
    ([PARIS[0], "hello"], "messages[1]"),
    ([{"content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([*PARIS, {"role": "tool", "content": "x"}], "messages[3].role"),
    ([{"role": ["user"], "content": "x"}], "messages[0].role"),
    ([{"role": "assistant", "content": "x"}], "messages[0].role"),
    ([*PARIS, {"role": "assistant", "content": None, "tool_calls": [{}]}], "messages[3].tool_calls"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content"),
    ([*PARIS[:2], {"role": "user", "content": "half \ud83d"}], "messages[2].content"),
])
def test_a_bad_conversation_names_its_field_in_one_line(v1: Tokenizer, messages: object, field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        v1.encode_chat(messages)   # type: ignore[arg-type]
    assert caught.value.field == field
    assert str(caught.value).startswith(field)
    assert "\n" not in str(caught.value)


def test_a_system_text_that_comes_later_stands_where_it_is(v1: Tokenizer) -> None:
    brief = {"role": "system", "content": "Be brief."}
    for messages in ([*PARIS[:2], brief, PARIS[2]], [*PARIS[:2], PARIS[2], brief]):
        text = v1.decode(v1.encode_chat(messages))
        assert text.index("Paris, the capital.") < text.index("Be brief.") and text.count("[INST]") == 2


def test_developer_is_another_word_for_system_and_null_for_no_text(v1: Tokenizer) -> None:
    brief, nothing = {"role": "developer", "content": "Be brief."}, {"role": "assistant", "content": None}
    assert v1.encode_chat([brief, PARIS[0]]) == v1.encode_chat([{**brief, "role": "system"}, PARIS[0]])
    assert v1.encode_chat([PARIS[0], nothing, PARIS[2]]) == v1.encode_chat([PARIS[0], {**nothing, "content": ""}, PARIS[2]])


def test_bad_texts_and_ids_are_refused(v1: Tokenizer) -> None:
    for text in (None, 3, b"x", "\ud800"):
        with pytest.raises(BadRequest, match="text"):
            v1.encode(text)   # type: ignore[arg-type]
    for token_id in (-1, 32000, 1 << 40, 1.0, "1", None):
        for call in (v1.piece, v1.byte, v1.surface, lambda i: v1.decode([5, i])):
            with pytest.raises(BadRequest, match="token id"):
                call(token_id)   # type: ignore[arg-type]


def test_ids_may_be_numpy_integers(v1: Tokenizer) -> None:
    ids = np.array(v1.encode("Paris, the capital."), np.int32)
    assert v1.decode(ids) == "Paris, the capital."
    assert v1.piece(ids[0]) == "▁Paris"


def test_pieces_bytes_and_surfaces(v1: Tokenizer) -> None:
    assert (v1.bos_id, v1.eos_id, v1.n_words, v1.vocab_size) == (1, 2, 32000, 32000)
    assert [v1.piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert [v1.byte(i) for i in (0, 2, 3, 258, 259)] == [None, None, 0, 255, None]
    paris = v1.encode("Paris")[0]
    assert (v1.surface(paris), v1.decode([paris])) == (" Paris", "Paris")
    assert v1.surface(v1.eos_id) == ""


def test_padding_ids_of_a_larger_embedding_stand_for_no_text() -> None:
    tokenizer = SentencePieceTokenizer(SMALL.read_bytes(), vocab_size=3000)
    ids = tokenizer.encode("one two")
    assert tokenizer.vocab_size == 3000
    assert tokenizer.decode([2999, *ids, tokenizer.n_words]) == "one two"
    assert (tokenizer.piece(2999), tokenizer.surface(2999), tokenizer.byte(2999)) == ("", "", None)
    with pytest.raises(BadRequest, match="3000"):
        tokenizer.decode([3000])


def test_broken_models_are_refused_in_one_line() -> None:
    model = SMALL.read_bytes()
    not_utf8 = model.replace("▁the".encode(), "▁th".encode() + b"\xff", 1)
    for broken in (b"", b"\0", b"hello", model[:1000], model[1000:], b"{}" * 500, not_utf8):
        with pytest.raises(BadInput, match=r"^my\.model ") as caught:
            SentencePieceTokenizer(broken, name="my.model")
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=r"my\.model has 2048 pieces, .* only 2047"):
        SentencePieceTokenizer(model, vocab_size=2047, name="my.model")


def test_the_demo_tokenizer_has_the_ids_of_a_mistral_tokenizer() -> None:
    tokenizer = SentencePieceTokenizer((checkpoint_dir() / "tokenizer.model").read_bytes())
    assert tokenizer.n_words == 4096
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.piece(0)) == (1, 2, "<unk>")
    assert [tokenizer.byte(i) for i in range(3, 259)] == list(range(256))
    assert [tokenizer.piece(i) for i in tokenizer.encode("[INST] 42 [/INST]")] == [
        "▁[", "INST", "]", "▁", "4", "2", "▁[/", "INST", "]",
    ]  # fmt: skip
    for text in varied_texts(500):
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " "), repr(text)


def test_importing_the_package_does_not_import_sentencepiece() -> None:
    code = "import sys, edgemistral.text.tokenizer, edgemistral.text; sys.exit('sentencepiece' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
