"""The model card's sample JSON over HTTP. What a request may hold is tested in test_sample_json.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgemistral import sample_json
from edgemistral.server import create_app
from tests.serving import HTTP, fake_model, serving

SAMPLE = json.loads((Path(__file__).parents[1] / "data" / "sample-request.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model():
    return fake_model(context=2048)


@pytest.fixture(scope="module")
def url(model):
    with serving(create_app(model)) as url:
        yield url


def changed(**parameters):
    """The sample with other parameters, and few tokens."""
    data = SAMPLE["input_data"]
    return {"input_data": {**data, "parameters": {**data["parameters"], "max_new_tokens": 6, **parameters}}}


@pytest.mark.parametrize("path", ["/score", "/"])
def test_the_cards_sample_has_one_answer(url, path):
    answer = HTTP.post(f"{url}{path}", json=SAMPLE, timeout=60)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    [answers] = answer.json()
    assert list(answers) == ["0"] and isinstance(answers["0"], str)
    assert "warnings" not in answer.headers


def test_per_message_has_the_three_keys_of_the_cards_output(url):
    [answers] = HTTP.post(f"{url}/score", json=changed(per_message=True)).json()
    assert list(answers) == ["0", "1", "2"]


def test_answers_are_those_of_the_python_api(url, model):
    for parameters in ({"do_sample": False}, {"seed": 7}, {"per_message": True, "seed": 7}, {"return_full_text": True,
                       "seed": 1}, {"seed": 1, "top_k": 3, "repetition_penalty": 1.2, "stop": ["a"]}):
        data = changed(**parameters)
        assert HTTP.post(f"{url}/score", json=data).json() == sample_json.answer(model, sample_json.parse(data))


def test_lists_of_prompts_and_of_conversations(url):
    user = [{"role": "user", "content": "Hi"}]
    parameters = {"max_new_tokens": 4, "seed": 1}
    results = []
    for prompts in (["Hi", "Where?", "Hi"], [user, [{"role": "user", "content": "Where?"}], user]):
        body = {"input_data": {"input_string": prompts, "parameters": parameters}}
        results.append(HTTP.post(f"{url}/score", json=body).json())
    assert results[0] == results[1]
    assert list(results[0][0]) == ["0", "1", "2"] and results[0][0]["0"] == results[0][0]["2"]


def test_safe_prompt_changes_the_prompt(url, model):
    with_it, without = (HTTP.post(f"{url}/score", json=changed(seed=1, safe_prompt=flag)).json() for flag in (True, False))
    assert with_it != without
    wrong = changed(safe_prompt=True)
    wrong["input_data"]["input_string"] = [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]
    assert HTTP.post(f"{url}/score", json=wrong).json()["error"]["param"] == "input_data.input_string[1].role"


@pytest.mark.parametrize(("name", "value"), [("num_beams", 4), ("typical_p", 0.5), ("max_length", 20), ("n", 2)])
def test_what_is_not_done_is_refused_by_name(url, name, value):
    answer = HTTP.post(f"{url}/score", json=changed(**{name: value}))
    assert answer.status_code == 422 and answer.json()["error"]["param"] == f"input_data.parameters.{name}"


def test_names_of_other_servers_are_understood(url):
    theirs, ours = (HTTP.post(f"{url}/score", json=changed(seed=1, **names)).json() for names in (
        {"repeat_penalty": 1.4, "stop_sequences": ["e"]}, {"repetition_penalty": 1.4, "stop": ["e"]}))
    assert theirs == ours


def test_unknown_parameters_are_named_in_a_header(url):
    answer = HTTP.post(f"{url}/score", json=changed(num_beans=4))
    assert answer.status_code == 200
    assert answer.headers["warnings"] == "input_data.parameters.num_beans is not known and was ignored"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input_data"),
        ({"input_data": {"input_string": 3}}, "input_data.input_string"),
        ({"input_data": {"input_string": []}}, "input_data.input_string"),
        ({"input_data": {"input_string": ["a", 1]}}, "input_data.input_string[1]"),
        (changed(temperature="hot"), "input_data.parameters.temperature"),
        (changed(do_sample=1), "input_data.parameters.do_sample"),
        (changed(max_new_tokens=1.5), "input_data.parameters.max_new_tokens"),
        (changed(stop={"a": 1}), "input_data.parameters.stop"),
    ],
)
def test_anything_else_names_the_field(url, body, field):
    answer = HTTP.post(f"{url}/score", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == field and field in answer.json()["error"]["message"]


def test_a_prompt_over_the_context(url):
    body = {"input_data": {"input_string": ["word " * 3000]}}
    answer = HTTP.post(f"{url}/score", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["error"]["param"] == "input_data.input_string"
