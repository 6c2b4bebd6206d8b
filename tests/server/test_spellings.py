"""Requests as clients spell them: one meaning, obeyed or refused by name."""

from __future__ import annotations

import json

import pytest

from edgemistral.errors import BadRequest
from edgemistral.server import create_app
from edgemistral.server.constraints import closed, constraint_of
from edgemistral.server.tools import tools_of
from edgemistral.spellings import normalised
from tests.serving import CHAT, HTTP, USER, fake_model, serving

SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "book", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def url():
    with serving(create_app(fake_model())) as url:
        yield url


def ask(url, path=CHAT, **body):
    return HTTP.post(f"{url}{path}", json={"messages": USER, "max_tokens": 60, "seed": 1, **body}, timeout=30)


@pytest.mark.parametrize(("theirs", "ours"), [
    ({"repeat_penalty": 1.2}, {"repetition_penalty": 1.2}), ({"random_seed": 5}, {"seed": 5}),
    ({"n_predict": 3}, {"max_tokens": 3}),
    ({"max_tokens": -1}, {"max_tokens": None}), ({"top_k": -1}, {"top_k": 0}), ({"seed": -1}, {"seed": None}),
    ({"stop": ""}, {"stop": None}), ({"stop": ["a", "", None]}, {"stop": ["a"]}), ({"max_tokens": 12.0}, {"max_tokens": 12}),
    ({"typical_p": 1.0}, {}), ({"do_sample": False, "temperature": 1}, {"temperature": 0}), ({"do_sample": True}, {}),
    ({"regex": "[ab]"}, {"guided_regex": "[ab]"}), ({"ebnf": "root ::= x"}, {"guided_grammar": "root ::= x"}),
    ({"chat_template_kwargs": {"enable_thinking": False}}, {}), ({"repeat_last_n": 64}, {}),
    ({"mirostat": 0, "suffix": None}, {}), ({"best_of": 2, "n": 2}, {"n": 2}),
    ({"temperature": 0.5, "unknown": 1}, {"temperature": 0.5, "unknown": 1}),
])
def test_one_meaning_has_one_spelling(theirs, ours):
    assert normalised(theirs) == ours


@pytest.mark.parametrize(("field", "value"), [
    ("typical_p", 0.5), ("max_length", 20), ("n_probs", 3), ("options", {"num_ctx": 9}), ("extra_body", {"top_k": 1}),
    ("repeat_last_n", 8), ("return_full_text", True), ("chat_template_kwargs", {"enable_thinking": True}), ("suffix", "end"),
    ("best_of", 3), ("mirostat", 2), ("use_beam_search", True), ("modalities", ["audio"]),
])
def test_what_is_not_done_is_refused_by_name(url, field, value):
    answer = ask(url, **{field: value})
    assert answer.status_code == 422 and answer.json()["error"]["param"] == field


@pytest.mark.parametrize("wanted", [
    {"response_format": {"type": "json_object", "schema": SCHEMA}}, {"json_schema": SCHEMA},
    {"guided_json": json.dumps(SCHEMA)},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, {"format": SCHEMA},
    {"response_format": {"type": "json_schema", "schema": SCHEMA}}, {"structured_outputs": {"json": SCHEMA}},
])
def test_a_schema_is_obeyed_under_every_name(url, wanted):
    answer = ask(url, **wanted).json()["choices"][0]["message"]["content"]
    assert json.loads(answer)["city"] in ("Rome", "Oslo") and set(json.loads(answer)) == {"city"}
    text = HTTP.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 60, **wanted}).json()["choices"][0]["text"]
    assert set(json.loads(text)) == {"city"}


def test_choices_and_regular_expressions(url):
    assert ask(url, guided_choice=["yes", "no"]).json()["choices"][0]["message"]["content"] in ("yes", "no")
    assert ask(url, guided_regex="[0-9]{3}").json()["choices"][0]["message"]["content"].isdecimal()
    with pytest.raises(BadRequest, match="exclude each other"):
        constraint_of({"guided_regex": "a", "guided_choice": ["b"]})


def test_objects_are_closed_where_they_say_nothing():
    inner = {"type": "object", "properties": {"a": {}}}
    schema = {"$defs": {"x": inner}, "type": "object", "properties": {"list": {"items": inner}, "either": {"anyOf": [inner]}}}
    made = closed(schema)
    for one in (made, made["$defs"]["x"], made["properties"]["list"]["items"], made["properties"]["either"]["anyOf"][0]):
        assert one["additionalProperties"] is False
    assert closed({**inner, "additionalProperties": True})["additionalProperties"] is True
    assert "additionalProperties" not in schema


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_a_forced_call_fits_its_schema(url, stream, choice):
    answer = ask(url, tools=[TOOL], tool_choice=choice, stream=stream)
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert not any(delta.get("content") for delta in deltas)
        [call] = next(delta["tool_calls"] for delta in deltas if "tool_calls" in delta)
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    else:
        choice_ = answer.json()["choices"][0]
        [call] = choice_["message"]["tool_calls"]
        assert choice_["finish_reason"] == "tool_calls" and choice_["message"]["content"] is None
    assert call["function"]["name"] == "book" and json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")


def test_calls_are_told_from_texts_and_none_leaks():
    tools = tools_of({"tools": [TOOL]})
    call = '{"name": "book", "arguments": {"city": "Rome"}}'
    for text, shown, calls in (
        (call, "", 1), (f"<tool_call>{call}</tool_call>\n<tool_call>{call}</tool_call>", "", 2), (f"[{call}]", "", 1),
        (f"Sure. <tool_call>{call}</tool_call>", "Sure. ", 1), ("{not a call}", "{not a call}", 0), ("a < b", "a < b", 0),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', 0), ("<tool", "<tool", 0),
    ):
        for size in (1, 3, 100):
            stream = tools.filter()
            before = "".join(stream.push(text[at : at + size]) for at in range(0, len(text), size))
            rest, found = stream.end()
            assert (before + rest, len(found)) == (shown, calls), text


@pytest.mark.parametrize(("fields", "param"), [
    ({"tool_choice": "required"}, "tool_choice"), ({"tools": [{"type": "web"}]}, "tools[0]"),
    ({"tools": [TOOL], "tool_choice": {"function": {"name": "x"}}}, "tool_choice"), ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
])
def test_wrong_tools_are_named(url, fields, param):
    answer = ask(url, **fields)
    assert answer.status_code == 422 and answer.json()["error"]["param"] == param


def test_a_history_with_calls_is_answered(url):
    history = [
        *USER, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "book", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "booked"}, {"role": "assistant", "content": ""},
    ]
    assert ask(url, messages=history, tools=[TOOL]).status_code == ask(url, messages=history).status_code == 200


def test_several_answers_are_those_of_several_seeds(url):
    body = ask(url, n=3, max_tokens=8).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    alone = [ask(url, seed=1 + n, max_tokens=8).json() for n in range(3)]
    assert [c["message"] for c in body["choices"]] == [one["choices"][0]["message"] for one in alone]
    assert body["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]


def test_the_log_probabilities_of_a_prompt(url):
    body = {"prompt": "Where is it?", "echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
    choice = HTTP.post(f"{url}/v1/completions", json=body).json()["choices"][0]
    lengths = {len(values) for values in choice["logprobs"].values()}
    assert len(lengths) == 1 and lengths.pop() > 3 and "".join(choice["logprobs"]["tokens"]).strip().startswith("Where is it?")


def test_addresses_as_people_write_them(url):
    for path in ("/chat/completions", "/v1/chat/completions/"):
        assert ask(url, path=path, max_tokens=1).status_code == 200
    assert HTTP.head(f"{url}/health").status_code == 200 and not HTTP.head(f"{url}/v1/models").content
    error = HTTP.post(f"{url}/v1/chat/completion", json={}).json()["error"]["message"]
    assert "POST" in error and "/v1/chat/completions" in error


def test_broken_json_is_told_with_its_place(url):
    answer = HTTP.post(f"{url}{CHAT}", content='{"messages":\n [],}', headers={"content-type": "application/json"})
    assert answer.status_code == 422 and "line 2 column" in answer.json()["error"]["message"]
