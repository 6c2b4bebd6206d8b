"""/v1/messages, asked by the `anthropic` client."""

from __future__ import annotations

from typing import Literal

import anthropic
import pytest
from pydantic import BaseModel

from edgemistral.server import create_app
from tests.serving import HTTP, fake_model, saying, serving

USER = [{"role": "user", "content": "Where is it?"}]
ASK = {"model": "any", "messages": USER, "max_tokens": 8, "extra_body": {"seed": 3}}
SAYS = {"max_tokens": 60, "extra_body": {"grammar": 'root ::= "It is in Paris."'}}
WEATHER = {"name": "weather", "description": "Tells the weather.", "input_schema": {
    "type": "object", "required": ["city", "days"],
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
}}
FORCED = {**ASK, "max_tokens": 200, "tools": [WEATHER], "tool_choice": {"type": "any"}}


@pytest.fixture(scope="module")
def url():
    with serving(create_app(fake_model(), api_key="secret")) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as client:
        yield client


def raw(url, body, path="/v1/messages"):
    return HTTP.post(url + path, json=body, headers={"x-api-key": "secret"})


def test_an_answer_and_its_stream(client):
    whole = client.messages.create(**ASK)
    assert (whole.type, whole.role, whole.model, whole.stop_reason) == ("message", "assistant", "fake-q4", "max_tokens")
    assert whole.usage.output_tokens == 8 and whole.id.startswith("msg-")
    with client.messages.stream(**ASK) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text and final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 8
    used = [final.usage.input_tokens + final.usage.cache_read_input_tokens,
            whole.usage.input_tokens + whole.usage.cache_read_input_tokens]
    assert used[0] == used[1] > 8
    raw_kinds = [event.type for event in events if event.type not in ("text", "content_block_delta", "ping")]
    assert raw_kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]


def test_an_empty_answer_has_a_block_too(client):
    ask = {**ASK, "max_tokens": 0}
    with client.messages.stream(**ask) as stream:
        final = stream.get_final_message()
    assert [block.text for block in final.content] == [block.text for block in client.messages.create(**ask).content] == [""]


def test_the_events_of_a_stream_are_named(url):
    answer = raw(url, {**ASK, "extra_body": None, "stream": True, "seed": 3})
    assert answer.headers["content-type"].startswith("text/event-stream")
    for event in answer.text.strip().split("\n\n"):
        name, data = event.split("\n")
        assert f'{{"type": "{name.removeprefix("event: ")}"' in data


def test_the_system_text_and_blocks_are_what_the_chat_of_openai_reads(client, url):
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    mine = client.messages.create(**{**ASK, "system": system, "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Where is it?"}]}]})
    theirs = HTTP.post(f"{url}/v1/chat/completions", headers={"authorization": "Bearer secret"}, json={
        "messages": [{"role": "system", "content": "Be brief."}, *USER], "max_tokens": 8, "seed": 3}).json()
    assert mine.content[0].text == theirs["choices"][0]["message"]["content"]


def test_stop_reasons(client):
    assert client.messages.create(**{**ASK, **SAYS}).stop_reason == "end_turn"
    answer = client.messages.create(**{**ASK, **SAYS}, stop_sequences=["nothing", " Paris"])
    assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", " Paris", "It is in")
    with client.messages.stream(**{**ASK, **SAYS}, stop_sequences=[" Paris"]) as stream:
        assert stream.get_final_message().stop_sequence == " Paris"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_tool_is_called(client, choice):
    whole = client.messages.create(**{**FORCED, "tool_choice": choice})
    [use] = whole.content
    assert whole.stop_reason == "tool_use" and use.name == "weather" and use.input["city"] in ("Paris", "Rome")
    with client.messages.stream(**{**FORCED, "tool_choice": choice}) as stream:
        [streamed] = stream.get_final_message().content
    assert streamed.input == use.input and streamed.type == "tool_use"


def test_a_tool_that_may_be_called_and_one_that_may_not(client):
    call = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
    tools = {**ASK, "tools": [WEATHER], "max_tokens": 200, "extra_body": {"guided_choice": [call]}}
    assert client.messages.create(**tools, tool_choice={"type": "auto"}).content[0].input == {"city": "Rome", "days": 2}
    answer = client.messages.create(**tools, tool_choice={"type": "none"})
    assert answer.content[0].text == call and answer.stop_reason == "end_turn"


def test_one_call_only_where_parallel_ones_are_disabled(client):
    call = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
    tools = {**ASK, "tools": [WEATHER], "max_tokens": 200, "extra_body": {"guided_choice": [f"{call}\n{call}"]}}
    assert len(client.messages.create(**tools).content) == 2
    assert len(client.messages.create(**tools, tool_choice={"type": "auto", "disable_parallel_tool_use": True}).content) == 1


def test_an_answer_becomes_an_object_of_a_pydantic_class(client):
    class City(BaseModel):
        name: Literal["Paris", "Rome"]

    answer = client.messages.parse(**{**ASK, "max_tokens": 60}, output_format=City)
    assert isinstance(answer.parsed_output, City)


def test_a_call_and_its_result_go_back(client):
    use = client.messages.create(**FORCED).content[0]
    turns = [*USER, {"role": "assistant", "content": [use.model_dump(include={"type", "id", "name", "input"})]},
             {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"},
                                          {"type": "text", "text": "And now?"}]}]
    answer = client.messages.create(**{**ASK, "messages": turns, "tools": [WEATHER]})
    first = answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    turns[2]["content"][0]["content"] = [{"type": "text", "text": "sunny " * 20}]
    answer = client.messages.create(**{**ASK, "messages": turns, "tools": [WEATHER]})
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens >= first + 19


def test_the_tokens_of_a_prompt_are_counted(client):
    for more in ({}, {"system": "Be brief."}, {"tools": [WEATHER]}):
        used = client.messages.create(**ASK, **more).usage
        counted = client.messages.count_tokens(model="any", messages=USER, **more).input_tokens
        assert counted == used.input_tokens + used.cache_read_input_tokens


def test_the_key(url):
    with anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as client, \
            pytest.raises(anthropic.AuthenticationError) as caught:
        client.messages.create(**ASK)
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "authentication_error"
    with anthropic.Anthropic(base_url=url, auth_token="secret", max_retries=0) as client:
        assert client.messages.create(**ASK).content


@pytest.mark.parametrize(("change", "named"), [
    ({"messages": None}, "messages"),
    ({"messages": 5}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [*USER, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": 5}]}]},
     "messages[1].content[1].text"),
    ({"temperature": -1}, "temperature"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": {"type": "sometimes"}}, "tool_choice.type"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"metadata": {"user_id": 5}}, "user"),
])
def test_what_is_wrong_is_named_in_the_shape_of_anthropic(url, change, named):
    answer = raw(url, {"model": "any", "messages": USER, "max_tokens": 8, **change})
    assert answer.status_code == 422 and set(answer.json()) == {"type", "error"} and answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error" and named in answer.json()["error"]["message"]


def test_other_failures_have_that_shape_too(url, client):
    answer = raw(url, {"model": "any", "messages": [{"role": "user", "content": "a " * 600}], "max_tokens": 8}, "/messages")
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.UnprocessableEntityError, match="temperature"):
        client.messages.create(**{**ASK, "stream": True, "extra_body": {"temperature": -1}})
    assert raw(url, [1]).json()["type"] == "error"
    missing = raw(url, {}, "/v1/messages/batches")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "not_found_error"
    assert int(missing.headers["content-length"]) == len(missing.content)
    assert raw(url, {}, "/v1/message").json()["error"]["param"] is None      # another address: as OpenAI's


def test_a_text_that_is_no_call_and_a_review():
    prompt = fake_model().tokenizer.encode_chat(USER)
    with (
        serving(create_app(saying("It is far.", prompt), review=lambda kind, value: value)) as url,
        anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client,
    ):
        assert client.messages.create(**{**ASK, "extra_body": None}).content[0].text == "It is far."
