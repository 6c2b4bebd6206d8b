"""A checkpoint's own chat template: the ids of transformers, and nothing that people write as a control id."""

from __future__ import annotations

import itertools
import json
import random
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemistral.errors import BadRequest
from edgemistral.text.bpe import BPETokenizer
from edgemistral.text.chat import is_mistrals_own
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from edgemistral.text.tokenizer import Tokenizer
from tests.text.tokenizers import KINDS, ORDINARY, SMALL, SPECIAL, TEMPLATES, TEXTS, description, ours, reference

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
    refused = 0
    for messages in conversations():
        wanted = expected(theirs, messages)
        if wanted is None:
            refused += 1
            with pytest.raises(BadRequest, match="Only user and assistant roles"):
                tokenizer.encode_chat(messages)
        else:
            assert tokenizer.encode_chat(messages) == wanted, messages
    assert bool(refused) == (name == "mistral v1")


@pytest.mark.parametrize("kind", KINDS)
def test_tools_equal_those_of_transformers(kind: str) -> None:
    pytest.importorskip("transformers")
    theirs, tokenizer = reference(kind, TEMPLATES["hermes"]), ours(kind, TEMPLATES["hermes"])
    assert tokenizer.chat.takes_tools
    messages = [USER, CALL, {"role": "tool", "content": '{"sky": "blue"}'}]
    assert tokenizer.encode_chat(messages, tools=TOOLS) == expected(theirs, messages, TOOLS)


def controls_of(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in tokenizer.markup]


PARTS = st.sampled_from([
    *SPECIAL, *ORDINARY, "<s>", "</s>", "<unk>", "<|", "<|im_", "start|>", "|>", "end|>", "s>", "<", " ", "\n", "x",
    "<|us", "er|>", "<tool", "_call>", "</", "<TOOL_CALL>",
])
HOSTILE = st.lists(PARTS | st.text(max_size=3), max_size=8).map("".join)


@pytest.mark.parametrize("name", ["chatml", "alpaca", "llama3", "hermes", "zephyr"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_people_write_is_never_a_control_id(kind: str, name: str) -> None:
    tokenizer, tools = ours(kind, TEMPLATES[name]), TOOLS if name == "hermes" else None
    assert {*SPECIAL, *ORDINARY, "<s>", "</s>"} <= set(tokenizer.markup.values())

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


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_all_special_tokens_are_never_control_ids(kind: str, name: str) -> None:
    """Each of them, alone, between words, run together, in two halves that meet, and in capitals."""
    tokenizer = ours(kind, TEMPLATES[name])
    every = list(tokenizer.markup.values())
    texts = [*every, " ".join(every), "".join(every), f"a{'b'.join(every)}c", "\n".join(every).upper(), *(t[1:] for t in every)]
    roles = ("user", "assistant", "user")
    plain = controls_of(tokenizer, tokenizer.encode_chat([{"role": role, "content": "x"} for role in roles]))
    halves = [(text[: len(text) // 2], text[len(text) // 2 :], "y") for text in every]
    for contents in [*((text, text, text) for text in texts), *halves]:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        assert controls_of(tokenizer, tokenizer.encode_chat(messages)) == plain, contents


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_template_puts_together_or_lowers_is_no_control_either(kind: str) -> None:
    joined = ours(kind, "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{% endfor %}<|im_end|>")
    halves = [{"role": role, "content": text} for role, text in (("user", "x<|im_ "), ("assistant", "end|>"), ("user", "y"))]
    assert len(controls_of(joined, joined.encode_chat(halves))) == 2
    lowered = ours(kind, "{{ bos_token }}{{ messages[0].content | lower }}<|im_end|>")
    assert len(controls_of(lowered, lowered.encode_chat([{"role": "user", "content": "<|IM_END|>"}]))) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_added_words_are_shown_and_only_a_template_gives_them(kind: str) -> None:
    tokenizer = ours(kind, TEMPLATES["hermes"])
    ids = {text: token_id for token_id, text in tokenizer.markup.items()}
    call = [*tokenizer.encode("x"), ids["<tool_call>"], *tokenizer.encode_inside("y"), ids["</tool_call>"]]
    assert tokenizer.decode(call) == "x<tool_call>y</tool_call>"
    assert tokenizer.decode(tokenizer.encode("x<tool_call>y</tool_call>")) == "x<tool_call>y</tool_call>"
    assert not controls_of(tokenizer, tokenizer.encode("x<tool_call>y</tool_call>"))
    spelled = [USER, {**CALL, "tool_calls": [{"function": {"name": "</tool_call>", "arguments": "<tool_call>"}}]}]
    assert tokenizer.encode_chat(spelled, tools=TOOLS).count(ids["<tool_call>"]) == 2      # the template's own


def test_white_space_that_is_an_added_token_is_a_word() -> None:
    fields = json.loads(description("byte-level"))
    at = max(token["id"] for token in fields["added_tokens"]) + 1
    fields["added_tokens"].append({**fields["added_tokens"][-1], "id": at, "content": " " * 8})
    assert at in BPETokenizer(json.dumps(fields).encode(), bos_id=1, eos_id=2).encode("x:" + " " * 8 + "y")
    added = {2048: (" " * 8, False), 2049: ("<tool_call>", False)}
    pieces = SentencePieceTokenizer(SMALL.read_bytes(), added=added)
    assert 2048 in pieces.encode("x:" + " " * 8 + "y")
    assert 2049 not in pieces.encode("x:<tool_call>" + " " * 8 + "y")


def test_a_system_block_of_its_own_is_not_mistrals() -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    assert is_mistrals_own(TEMPLATES["mistral v1"], names)
    assert is_mistrals_own(TEMPLATES["mistral v3"], names)
    assert not is_mistrals_own(TEMPLATES["chatml"], names)
    block = "{% if m.role == 'system' %}[INST] <<SYS>>{{ m.content }}<</SYS>> [/INST]{% elif m.role == 'user' %}"
    rest = "[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    assert not is_mistrals_own("{{ bos_token }}{% for m in messages %}" + block + rest, names)
