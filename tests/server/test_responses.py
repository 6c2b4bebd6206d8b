"""/v1/responses, asked by the `openai` client."""

from __future__ import annotations

from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from edgemistral.server import create_app
from tests.serving import HTTP, fake_model, serving

ASK = {"model": "any", "input": "Where is it?", "max_output_tokens": 16, "extra_body": {"seed": 3}}
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "description": "Tells the weather.", "parameters": PARAMETERS, "strict": True}
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
FORCED = {**ASK, "max_output_tokens": 100, "tools": [WEATHER], "tool_choice": "required"}


class City(BaseModel):
    name: Literal["Paris", "Rome"]


@pytest.fixture(scope="module")
def url():
    with serving(create_app(fake_model())) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_answer_and_its_stream(client):
    whole = client.responses.create(**ASK)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 16 and whole.output_text and whole.model == "fake-q4"
    turns = [{"role": "user", "content": "Where is it?"}]
    chat = client.chat.completions.create(model="any", messages=turns, max_tokens=16, seed=3)
    assert chat.choices[0].message.content == whole.output_text
    events = list(client.responses.create(**ASK, stream=True))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text


def test_the_stream_helper(client):
    ask = {**ASK, "max_output_tokens": 60, "extra_body": {"grammar": 'root ::= "It is in Paris."'}}
    with client.responses.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "It is in Paris." and kinds[-1] == "response.completed"


def test_an_empty_answer_is_a_message_too(client):
    ask = {**ASK, "max_output_tokens": 0}
    *_, last = client.responses.create(**ask, stream=True)
    for answer in (last.response, client.responses.create(**ask)):
        assert [item.type for item in answer.output] == ["message"] and answer.output_text == ""


def test_instructions_and_items_are_what_the_chat_reads(client):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Why?"}]
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
             {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]},
             turns[2]]
    mine = client.responses.create(**{**ASK, "input": items}, instructions="Be brief.")
    theirs = client.chat.completions.create(
        model="any", messages=[{"role": "system", "content": "Be brief."}, *turns], max_tokens=16, seed=3)
    assert mine.output_text == theirs.choices[0].message.content and mine.instructions == "Be brief."
    again = client.responses.create(**{**ASK, "input": [turns[0], *mine.output, turns[2]]})    # an answer goes back as it came
    assert again.status == "incomplete"


def test_an_answer_becomes_an_object_of_a_pydantic_class(client):
    parsed = client.responses.parse(**{**ASK, "max_output_tokens": 60}, text_format=City).output_parsed
    assert isinstance(parsed, City)
    answer = client.responses.create(**{**ASK, "max_output_tokens": 60}, text={"format": {"type": "json_object"}})
    assert answer.output_text.lstrip().startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_tool_is_called_and_its_result_goes_back(client, choice):
    whole = client.responses.create(**{**FORCED, "tool_choice": choice})
    [call] = whole.output
    assert call.type == "function_call" and call.name == "weather" and whole.status == "completed"
    *_, last = events = list(client.responses.create(**{**FORCED, "tool_choice": choice}, stream=True))
    assert last.response.output[0].arguments == call.arguments
    assert [event.arguments for event in events if event.type == "response.function_call_arguments.done"] == [call.arguments]
    turns = [{"role": "user", "content": "Weather?"}, call,
             {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    assert client.responses.create(**{**ASK, "input": turns, "tools": [WEATHER]}).usage.input_tokens > whole.usage.input_tokens


def test_a_tool_that_may_be_called_and_one_that_may_not(client):
    ask = {**FORCED, "tool_choice": "auto", "extra_body": {"guided_choice": [CALL]}}
    assert client.responses.create(**ask).output[0].arguments == '{"city": "Rome"}'
    assert client.responses.create(**{**ask, "tool_choice": "none"}).output_text == CALL


def test_truncation(client):
    long = [{"role": "user", "content": "a " * 300}, {"role": "assistant", "content": "b"}]
    turns = [*long, *long, {"role": "user", "content": "c"}]
    with pytest.raises(openai.BadRequestError):
        client.responses.create(**{**ASK, "input": turns})
    assert client.responses.create(**{**ASK, "input": turns}, truncation="auto").usage.input_tokens < 512


@pytest.mark.parametrize(("change", "named"), [
    ({"input": None}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "input[0].content[0].type"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"truncation": "middle"}, "truncation"),
    ({"temperature": -1}, "temperature"),
    ({"wizardry": 1}, "wizardry"),
])
def test_what_is_wrong_is_named(url, change, named):
    answer = HTTP.post(f"{url}/v1/responses", json={"model": "any", "input": "Where?", **change})
    assert answer.status_code == 422 and answer.json()["error"]["param"] == named
