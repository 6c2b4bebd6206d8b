"""Ollama's interface, asked by the `ollama` client."""

from __future__ import annotations

import json

import ollama
import pytest

from edgemistral import __version__
from edgemistral.server import create_app
from tests.serving import HTTP, fake_model, serving

USER = [{"role": "user", "content": "Where is it?"}]
ASK = {"model": "fake-q4", "messages": USER, "options": {"num_predict": 8, "seed": 3}}
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def url():
    with serving(create_app(fake_model())) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with ollama.Client(url) as client:
        yield client


def test_an_answer_and_its_stream(client, url):
    whole = client.chat(**ASK)
    assert whole.done and whole.done_reason == "length" and whole.eval_count == 8 and whole.prompt_eval_count > 8
    assert whole.model == "fake-q4" and whole.message.role == "assistant"
    *pieces, last = client.chat(**ASK, stream=True)
    assert "".join(piece.message.content for piece in pieces) == whole.message.content
    assert not any(piece.done for piece in pieces) and last.done and last.eval_count == 8
    theirs = HTTP.post(f"{url}/v1/chat/completions", json={"messages": USER, "max_tokens": 8, "seed": 3}).json()
    assert theirs["choices"][0]["message"]["content"] == whole.message.content


def test_generate(client):
    options = {"num_predict": 8, "seed": 3}
    whole = client.generate("fake-q4", "Where is it?", options=options)
    assert whole.response == client.chat(**ASK).message.content
    *pieces, last = client.generate("fake-q4", "Where is it?", options=options, stream=True)
    assert "".join(piece.response for piece in pieces) == whole.response and last.done_reason == "length"
    brief = client.generate("fake-q4", "Where is it?", system="Be brief.", options=options)
    turns = [{"role": "system", "content": "Be brief."}, *USER]
    assert brief.response == client.chat(**{**ASK, "messages": turns}).message.content


def test_it_streams_unless_it_is_told_not_to(url):
    for path, more in (("/api/chat", {"messages": USER}), ("/api/generate", {"prompt": "Where?"})):
        answer = HTTP.post(url + path, json={"model": "x", "options": {"num_predict": 4}, **more})
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert [json.loads(line)["done"] for line in answer.text.splitlines()][-1] is True
        assert HTTP.post(url + path, json={"stream": False, "options": {"num_predict": 4}, **more}).json()["done"] is True


def test_options(client):
    ends = {**ASK, "format": None, "options": {"num_predict": 60, "grammar": 'root ::= "It is in Paris."'}}
    assert client.chat(**ends).done_reason == "stop"
    ends["options"]["stop"] = [" Paris"]
    assert client.chat(**ends).message.content == "It is in"
    usual = {"num_ctx": 256, "repeat_penalty": 1.1, "repeat_last_n": 64, "top_k": 40, "top_p": 0.9, "temperature": 0.7,
             "num_thread": 2, "mirostat": 0, "mirostat_tau": 5.0, "num_predict": -1, "stop": ["e"]}
    assert client.chat(**{**ASK, "options": usual}).done


def test_formats(client):
    options = {"num_predict": 100, "seed": 1}
    assert json.loads(client.chat(**{**ASK, "options": options}, format=SCHEMA).message.content)["city"] in ("Paris", "Rome")
    answer = client.generate("fake-q4", "Where?", format=SCHEMA, options=options).response
    assert json.loads(answer)["city"] in ("Paris", "Rome")
    assert client.generate("fake-q4", "Where?", format="json", options=options).response.lstrip().startswith("{")


def test_a_tool_is_called_and_its_result_goes_back(client):
    call = '{"name": "weather", "arguments": {"city": "Rome"}}'
    ask = {**ASK, "tools": [WEATHER], "options": {"num_predict": 100, "guided_choice": [call]}}
    message = client.chat(**ask).message
    assert message.tool_calls[0].function.arguments == {"city": "Rome"} and message.content == ""
    streamed = [piece.message for piece in client.chat(**ask, stream=True)]
    assert [one.tool_calls for one in streamed if one.tool_calls] == [message.tool_calls]
    turns = [*USER, message, {"role": "tool", "tool_name": "weather", "content": "sunny"}]
    longer = client.chat(**{**ASK, "messages": turns, "tools": [WEATHER]})
    assert longer.prompt_eval_count > client.chat(**{**ASK, "tools": [WEATHER]}).prompt_eval_count


def test_what_is_known_of_the_model(client, url):
    [model] = client.list().models
    assert model.model == "fake-q4"
    shown = client.show(model.model)
    assert shown.capabilities == ["completion", "tools"] and shown.modelinfo["mistral.context_length"] == 512
    with pytest.raises(ollama.ResponseError, match="there is no model 'other'") as caught:
        client.show("other")
    assert caught.value.status_code == 404
    assert HTTP.get(f"{url}/api/version").json() == {"version": __version__}
    with pytest.raises(ollama.ResponseError, match="there is no POST '/api/pull' here"):
        client.pull("other")
    assert HTTP.head(f"{url}/api/pull").status_code == 404


def test_a_request_without_a_prompt_only_loads(client):
    assert client.generate("fake-q4").done_reason == "load"
    assert client.chat("fake-q4", []).done_reason == "load"
    assert client.generate("fake-q4", keep_alive=0).done_reason == "unload"


@pytest.mark.parametrize(("change", "named"), [
    ({"messages": 5}, "messages"),
    ({"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}, "messages[0].images"),
    ({"options": {"temperature": -1}}, "temperature"),
    ({"options": {"mirostat": 2}}, "mirostat"),
    ({"options": {"num_ctx": 100_000}}, "options.num_ctx"),
    ({"options": {"wizardry": 1}}, "options.wizardry"),
    ({"options": []}, "options"),
    ({"think": True}, "think"),
    ({"format": "yaml"}, "format"),
    ({"wizardry": 1}, "wizardry"),
    ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools[0].function.name"),
])
def test_what_is_wrong_is_named_in_the_shape_of_ollama(url, change, named):
    answer = HTTP.post(f"{url}/api/chat", json={"messages": USER, **change})
    assert answer.status_code == 422 and named in answer.json()["error"]


@pytest.mark.parametrize("change", [
    {"raw": True}, {"suffix": "end"}, {"images": ["aGk="]}, {"template": "{{ .Prompt }}"}, {"context": [1, 2]}, {"prompt": 5},
])
def test_what_generate_does_not_do(url, change):
    answer = HTTP.post(f"{url}/api/generate", json={"prompt": "Where?", **change})
    assert answer.status_code == 422 and next(iter(change)) in answer.json()["error"]
