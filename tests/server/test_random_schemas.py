"""Forced calls of tools with random schemas: the arguments always parse and fit, streamed or whole, in each interface."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest

from edgemistral.server import create_app
from tests.serving import CHAT, HTTP, USER, fake_model, serving

PATTERNS = ("^[a-c]{1,4}$", "^(red|green)-[0-9]$", "^[A-Z][a-z]?$")
FORMATS = ("date", "uuid", "ipv4")     # jsonschema knows "time" without an offset only


def scalar(rng):
    low = rng.randrange(-1000, 1000)
    return rng.choice((
        lambda: {"enum": rng.sample(["a", "Größe", 7, None, True, 1.5, ""], rng.randrange(1, 5))},
        lambda: {"const": rng.choice(["x", 3, False])},
        lambda: {"type": "integer", "minimum": low, "maximum": low + rng.randrange(2000)},
        lambda: {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 10},
        lambda: {"type": "number", "minimum": low / 8, "maximum": low / 8 + 2},
        lambda: {"type": "string", "minLength": rng.randrange(3), "maxLength": 6},
        lambda: {"type": "string", "pattern": rng.choice(PATTERNS)},
        lambda: {"type": "string", "format": rng.choice(FORMATS)},
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"type": rng.sample(["boolean", "null"], 2)},
    ))()


def schema(rng, depth, names):
    """Any text that fits ends: nothing in it is without bounds."""
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        return scalar(rng)
    if kind < 0.5:
        return {"type": "array", "items": schema(rng, depth - 1, names), "minItems": rng.randrange(2),
                "maxItems": rng.randrange(2, 4)}
    if kind < 0.62:
        return {"anyOf": [schema(rng, depth - 1, names) for _ in range(rng.randrange(2, 4))]}
    if kind < 0.74 and names:
        return {"$ref": f"#/$defs/{rng.choice(names)}"}
    return an_object(rng, depth, names)


def an_object(rng, depth, names):
    keys = rng.sample(["city", "days", "a b", "größe", "x_1", "price"], rng.randrange(1, 4))
    made = {"type": "object", "properties": {key: schema(rng, depth - 1, names) for key in keys},
            "required": rng.sample(keys, rng.randrange(len(keys) + 1))}
    return {**made, "additionalProperties": False} if rng.random() < 0.3 else made


def parameters(rng):
    names = [f"D{n}" for n in range(rng.randrange(3))]
    made = an_object(rng, 3, names)
    if names:      # none refers to itself: that text might never end
        made["$defs"] = {name: schema(rng, 1, ()) for name in names}
    return made


def fits(arguments, wanted):
    """Also closed where the schema does not say: no other properties."""
    value = json.loads(arguments)
    jsonschema.Draft202012Validator(wanted, format_checker=jsonschema.FormatChecker()).validate(value)
    assert set(value) <= set(wanted["properties"])
    return value


@pytest.fixture(scope="module")
def url():
    with serving(create_app(fake_model(context=4096, chunk=512))) as url:
        yield url


def post(url, path, body):
    answer = HTTP.post(f"{url}{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def streamed(text):
    """The calls of a stream's deltas, put together as a client does it."""
    calls = {}
    for line in text.splitlines():
        if line.startswith("data: {"):
            for part in json.loads(line[6:])["choices"][0]["delta"].get("tool_calls", ()):
                call = calls.setdefault(part["index"], {"name": "", "arguments": ""})
                call["name"] += part["function"].get("name") or ""
                call["arguments"] += part["function"].get("arguments") or ""
    return [calls[index] for index in sorted(calls)]


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 200), marks=pytest.mark.slow)], ids=["some", "all"])
def test_arguments_fit_their_schema(url, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        tools = {name: parameters(rng) for name in ("plan", "book")[: rng.randrange(1, 3)]}
        common = {"messages": USER, "seed": seed, "max_tokens": 3000}
        chosen = rng.choice(["required", {"type": "function", "function": {"name": "plan"}}])
        body = {**common, "tool_choice": chosen, "tools": [
            {"type": "function", "function": {"name": name, "parameters": wanted}} for name, wanted in tools.items()]}
        choice = post(url, CHAT, body).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls", (seed, choice)
        calls = [call["function"] for call in choice["message"]["tool_calls"]]
        for call in calls:
            fits(call["arguments"], tools[call["name"]])
        assert streamed(post(url, CHAT, {**body, "stream": True}).text) == calls, seed
        body = {**common, "tool_choice": {"type": "any"}, "tools": [
            {"name": name, "input_schema": wanted} for name, wanted in tools.items()]}
        used = [block for block in post(url, "/v1/messages", body).json()["content"] if block["type"] == "tool_use"]
        assert used
        for block in used:
            fits(json.dumps(block["input"]), tools[block["name"]])
