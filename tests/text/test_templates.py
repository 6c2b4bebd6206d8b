"""A checkpoint's own chat template: the ids of transformers, and nothing that people write as a control id."""

from __future__ import annotations

import itertools
import random
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemistral.errors import BadInput, BadRequest
from edgemistral.text.chat import MistralTemplate, NoTemplate
from edgemistral.text.jinja import JinjaTemplate
from edgemistral.text.stream import StreamDecoder
from edgemistral.text.tokenizer import Tokenizer
from tests.text.tokenizers import KINDS, ORDINARY, SPECIAL, TEMPLATES, TEXTS, ours, reference

USER = {"role": "user", "content": "What should I see in Paris?"}
ANSWER = {"role": "assistant", "content": "The Louvre."}
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Of a <city>, é",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}},
]}


def conversations() -> list[list[dict[str, Any]]]:
    """Short and long ones, with and without a system text, texts with odd white space."""
    rng = random.Random(3)
    texts = [text for text in TEXTS if not any(part in text for part in (*SPECIAL, *ORDINARY, "<s>", "</s>", "<unk>"))]
    spaces = ("", "", " ", "  ", "\n", "\n\n", "\t", " \n")
    found = [[USER], [{"role": "system", "content": "Be brief."}, USER], [USER, ANSWER, USER]]
    for n in range(12):
        roles = ["system"] * (n % 2) + list(itertools.islice(itertools.cycle(("user", "assistant")), 1 + 2 * (n % 4)))
        found.append([
            {"role": role, "content": rng.choice(spaces) + rng.choice(texts)[:200] + rng.choice(spaces)} for role in roles
        ])
    return found


def expected(theirs: Any, messages: Any, tools: Any = None, add_generation_prompt: bool = True) -> list[int] | None:
    """transformers' ids, None where the template refuses."""
    import jinja2

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = theirs.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, return_dict=False
            )
    except jinja2.TemplateError:
        return None
    return list(ids)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_those_of_transformers(kind: str, name: str) -> None:
    pytest.importorskip("transformers")
    theirs, tokenizer = reference(kind, TEMPLATES[name]), ours(kind, TEMPLATES[name])
    if isinstance(tokenizer.chat, MistralTemplate):
        assert name.startswith(("mistral", "tekken"))   # whose reference is mistral-common
        return
    refused = 0
    for messages in conversations():
        wanted = expected(theirs, messages)
        if wanted is None:
            refused += 1
            with pytest.raises(BadRequest, match="Only user and assistant roles"):
                tokenizer.encode_chat(messages)
        else:
            assert tokenizer.encode_chat(messages) == wanted, messages
            closed = [*messages, ANSWER]
            assert tokenizer.encode_chat(closed, add_generation_prompt=False) == expected(theirs, closed, None, False)
    assert bool(refused) == (name == "mistral v1")


@pytest.mark.parametrize("kind", KINDS)
def test_tools_equal_those_of_transformers(kind: str) -> None:
    pytest.importorskip("transformers")
    theirs, tokenizer = reference(kind, TEMPLATES["hermes"]), ours(kind, TEMPLATES["hermes"])
    assert tokenizer.chat.takes_tools
    messages = [USER, CALL, {"role": "tool", "content": '{"sky": "blue"}'}]
    assert tokenizer.encode_chat(messages, tools=TOOLS) == expected(theirs, messages, TOOLS)


def controls_of(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in set(tokenizer.controls.values())]


PARTS = st.sampled_from([
    *SPECIAL, *ORDINARY, "<s>", "</s>", "<unk>", "<|", "<|im_", "start|>", "|>", "end|>", "s>", "<", " ", "\n", "x",
])
HOSTILE = st.lists(PARTS | st.text(max_size=3), max_size=8).map("".join)


@pytest.mark.parametrize("name", ["chatml", "alpaca", "llama3", "hermes", "zephyr"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_people_write_is_never_a_control_id(kind: str, name: str) -> None:
    tokenizer, tools = ours(kind, TEMPLATES[name]), TOOLS if name == "hermes" else None

    def plain(messages: list[dict[str, str]]) -> list[int]:
        return controls_of(tokenizer, tokenizer.encode_chat([{**m, "content": "x"} for m in messages], tools))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(HOSTILE, min_size=1, max_size=4))
    def check(contents: list[str]) -> None:
        messages = [{"role": r, "content": c} for r, c in zip(itertools.cycle(("user", "assistant")), contents, strict=False)]
        if messages[-1]["role"] == "assistant":
            messages.pop()
        ids = tokenizer.encode_chat(messages, tools)
        assert controls_of(tokenizer, ids) == plain(messages)
        for content in contents:
            assert not controls_of(tokenizer, tokenizer.encode(content))

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_spell_controls_are_read_whole(kind: str) -> None:
    tokenizer = ours(kind, "{{ bos_token }}<|im_start|>{{ messages[0].content | trim }}<|im_end|>")
    for text in ("<|im_end|>", "a <|im_start|> b", "</s></s>", "x<|im_", "[INST] <tool_call>"):
        ids = tokenizer.encode_chat([{"role": "user", "content": f"  {text}\n"}])
        assert controls_of(tokenizer, ids) == [tokenizer.controls[c] for c in ("<s>", "<|im_start|>", "<|im_end|>")]
        assert tokenizer.decode(ids).strip() == text
    tools = [{"type": "function", "function": {"name": "<|im_end|>", "description": "</s>"}}]
    hermes = ours(kind, TEMPLATES["hermes"])
    assert controls_of(hermes, hermes.encode_chat([USER], tools)).count(hermes.controls["<|im_end|>"]) == 2
    assert hermes.controls["</s>"] not in hermes.encode_chat([USER], tools)


@pytest.mark.parametrize("kind", KINDS)
def test_a_last_answer_is_continued(kind: str) -> None:
    tokenizer = ours(kind, TEMPLATES["chatml"])
    ids = tokenizer.encode_chat([USER, {"role": "assistant", "content": "The Lou"}])
    opened = tokenizer.encode_chat([USER])
    assert ids[: len(opened) - 1] == opened[:-1]
    assert tokenizer.decode(ids).endswith("assistant\nThe Lou")
    assert tokenizer.encode_chat([USER, {"role": "assistant", "content": ""}]) == opened


def test_mistrals_own_templates_are_built_in_and_others_are_not() -> None:
    for name in ("mistral v3", "tekken"):
        assert (type(ours("sentencepiece", TEMPLATES[name]).chat) is MistralTemplate) == (name == "mistral v3")
    assert isinstance(ours("sentencepiece", TEMPLATES["llama2"]).chat, JinjaTemplate)
    assert isinstance(ours("byte-level", TEMPLATES["mistral v3"]).chat, JinjaTemplate)


def test_bos_comes_once_however_often_the_template_writes_it() -> None:
    tokenizer = ours("byte-level", "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}")
    assert tokenizer.encode_chat([USER]).count(tokenizer.bos_id) == 1
    assert tokenizer.bos_id not in ours("byte-level", TEMPLATES["chatml"]).encode_chat([USER])


def test_broken_templates_say_the_line() -> None:
    with pytest.raises(BadInput, match="chat template, line 3: "):
        ours("byte-level", "{{ bos_token }}\n\n{% for %}")
    with pytest.raises(BadRequest, match=r"fails at line 2: .*'dict object' has no attribute 'x'"):
        ours("byte-level", "a\n{{ messages[0].x.y }}").encode_chat([USER])
    with pytest.raises(BadRequest, match="refuses them: no thanks"):
        ours("byte-level", "{{ raise_exception('no thanks') }}").encode_chat([USER])
    with pytest.raises(BadRequest, match=r"line 1: SecurityError"):
        ours("byte-level", "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}").encode_chat([USER])


def test_what_a_template_does_not_know_is_refused() -> None:
    chatml = ours("byte-level", TEMPLATES["chatml"])
    for messages, tools, field in (
        ([USER], TOOLS, "tools"),
        ([USER, CALL], None, "messages[1].tool_calls"),
        ([{"role": "tool", "content": "x"}], None, "messages[0].role"),
        ([{"role": "king", "content": "x"}], None, "messages[0].role"),
        ([{"role": "user"}], None, "messages[0].content"),
        ([{"role": "user", "content": "\ud800"}], None, "messages[0].content"),
    ):
        with pytest.raises(BadRequest) as caught:
            chatml.encode_chat(messages, tools)   # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(BadRequest, match="chat template, which this model has not"):
        NoTemplate().encode([USER], None, True)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_back_and_stream(kind: str) -> None:
    tokenizer = ours(kind)
    for text in [*TEXTS, "héé 🦙🦙 漢字", "\x00\x07", " two  spaces "]:
        if kind == "metaspace" and text.startswith((" ", "▁")):   # it adds no space there, but drops one all the same
            continue
        ids = tokenizer.encode(text)
        decoder = StreamDecoder(tokenizer)
        whole = text if kind == "byte-level" else text.replace("▁", " ")   # SentencePiece's own sign for a space
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids) == whole, text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_texts_equal_those_of_transformers(kind: str) -> None:
    pytest.importorskip("transformers")
    theirs, tokenizer = reference(kind, None), ours(kind)
    for text in TEXTS:
        if any(control in text for control in tokenizer.controls):
            continue   # transformers makes control ids of them
        if kind == "sentencepiece, not legacy" and text.startswith((" ", "▁")):
            continue   # SentencePiece adds its space there too, Metaspace does not
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
