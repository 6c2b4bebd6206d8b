"""The other ways in which the `openai` client asks: asynchronously, with its helpers, for raw responses, for many prompts."""

from __future__ import annotations

import asyncio
import json
from enum import Enum
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field

from edgemistral.server import create_app
from tests.serving import fake_model, serving

USER = [{"role": "user", "content": "Where is it?"}]
CHAT = {"model": "any", "messages": USER, "max_tokens": 8, "seed": 3}
SAYS = {"extra_body": {"grammar": 'root ::= "It is in Paris."'}}   # the helpers refuse an answer that is cut off


class Country(Enum):
    FRANCE = "France"
    ITALY = "Italy"


class City(BaseModel):
    """A class of its own, which the client puts into $defs of the schema."""

    name: Literal["Paris", "Zürich"]
    country: Country
    days: int = Field(ge=1, le=9)


class Trip(BaseModel):
    cities: list[City] = Field(min_length=1, max_length=2)
    by: Literal["train", "bicycle"] | None = None


TRIP = {**CHAT, "max_tokens": 200, "response_format": Trip}


@pytest.fixture(scope="module")
def model():
    return fake_model()


@pytest.fixture(scope="module")
def settings(model):
    with serving(create_app(model)) as url:
        yield {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}


@pytest.fixture(scope="module")
def client(settings):
    with openai.OpenAI(**settings) as client:
        yield client


def content(chunks):
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


# ---- asynchronously --------------------------------------------------------------------------------------------------

def test_the_asynchronous_client_gets_the_same_answers(settings, client):
    async def ask(**options):
        async def text(seed):
            answer = await client.chat.completions.create(**{**CHAT, "seed": seed}, **options)
            return content([chunk async for chunk in answer]) if options else answer.choices[0].message.content

        async with openai.AsyncOpenAI(**settings) as client:
            return await asyncio.gather(*map(text, range(4)))

    expected = [client.chat.completions.create(**{**CHAT, "seed": seed}).choices[0].message.content for seed in range(4)]
    assert len(set(expected)) == 4
    assert asyncio.run(ask()) == asyncio.run(ask(stream=True)) == expected


def test_the_rest_of_the_asynchronous_client(settings, client):
    prompt = {"model": "any", "prompt": "Paris is", "max_tokens": 6, "seed": 4}

    async def ask():
        async with openai.AsyncOpenAI(**settings) as client:
            trip = await client.chat.completions.parse(**TRIP)
            async with client.chat.completions.stream(**TRIP) as stream:
                assert (await stream.get_final_completion()).choices[0].message.parsed == trip.choices[0].message.parsed
            whole = (await client.completions.create(**prompt)).choices[0].text
            stream = await client.completions.create(**prompt, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == whole
            [card] = [card async for card in client.models.list()]
            assert await client.models.retrieve(card.id) == card
            with pytest.raises(openai.UnprocessableEntityError):
                await client.chat.completions.create(**CHAT, temperature=-1, stream=True)
            return whole

    assert asyncio.run(ask()) == client.completions.create(**prompt).choices[0].text


def test_an_asynchronous_stream_can_be_left(settings, client):
    async def leave():
        async with (
            openai.AsyncOpenAI(**settings) as client,
            await client.chat.completions.create(**{**CHAT, "max_tokens": 400}, stream=True) as stream,
        ):
            return await anext(aiter(stream))

    assert asyncio.run(leave()).choices[0].delta.role == "assistant"
    assert client.chat.completions.create(**CHAT).usage.completion_tokens == 8


# ---- the helpers -----------------------------------------------------------------------------------------------------

def test_an_answer_becomes_an_object_of_a_pydantic_class(client):
    for seed in range(5):
        message = client.chat.completions.parse(**{**TRIP, "seed": seed}).choices[0].message
        assert isinstance(message.parsed, Trip) and message.parsed == Trip.model_validate_json(message.content)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**{**TRIP, "max_tokens": 3})


def test_the_stream_helper_tells_events_and_gives_the_whole(client):
    with client.chat.completions.stream(**CHAT, **SAYS, logprobs=True, stream_options={"include_usage": True}) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert "".join(event.delta for event in events if event.type == "content.delta") == "It is in Paris."
    assert [event.content for event in events if event.type == "content.done"] == ["It is in Paris."]
    whole = client.chat.completions.create(**CHAT, **SAYS, logprobs=True)
    assert final.choices[0].message.content == whole.choices[0].message.content and final.usage == whole.usage
    assert final.choices[0].finish_reason == "stop" and final.choices[0].logprobs == whole.choices[0].logprobs


def test_the_stream_helper_parses_too(client):
    with client.chat.completions.stream(**TRIP) as stream:
        [done] = [event for event in stream if event.type == "content.done"]
    assert done.parsed == client.chat.completions.parse(**TRIP).choices[0].message.parsed
    with client.chat.completions.stream(**{**TRIP, "max_tokens": 3}) as stream, pytest.raises(openai.LengthFinishReasonError):
        stream.until_done()


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")   # the client's own, of the object in a parsed message
def test_an_answer_of_the_client_is_a_message_of_the_next_turn(client):
    for answer in (client.chat.completions.create(**CHAT, **SAYS), client.chat.completions.parse(**TRIP)):
        by_hand = {"role": "assistant", "content": answer.choices[0].message.content}
        turns = [client.chat.completions.create(**{**CHAT, "messages": [*USER, message, *USER]})
                 for message in (answer.choices[0].message, by_hand)]
        assert turns[0].choices == turns[1].choices


# ---- raw responses ---------------------------------------------------------------------------------------------------

def test_raw_responses(client):
    expected = client.chat.completions.create(**CHAT).choices
    raw = client.chat.completions.with_raw_response.create(**CHAT, extra_headers={"x-request-id": "mine"})
    assert raw.parse().choices == expected and raw.request_id == "mine" != raw.parse().id
    assert raw.status_code == 200 and "warnings" not in raw.headers
    raw = client.chat.completions.with_raw_response.parse(**TRIP)
    assert isinstance(raw.parse().choices[0].message.parsed, Trip) and "warnings" not in raw.headers
    raw = client.chat.completions.with_raw_response.create(**CHAT, stream=True)
    assert content(raw.parse()) == expected[0].message.content
    assert client.models.with_raw_response.list().parse().data[0].id == "fake-q4"


def test_streaming_responses(client):
    expected = client.chat.completions.create(**CHAT).choices[0].message.content
    with client.chat.completions.with_streaming_response.create(**CHAT) as response:
        assert json.loads(response.read())["choices"][0]["message"]["content"] == expected
    with client.chat.completions.with_streaming_response.create(**CHAT, stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *lines, last = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert last == "data: [DONE]"
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content", "") for delta in deltas) == expected
    with client.completions.with_streaming_response.create(model="any", prompt="Paris", max_tokens=4) as response:
        assert response.parse().usage.completion_tokens == 4


# ---- streamed completions --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("prompt", ["Paris is", ["Paris is", "Rome was", "Bonn"]])
def test_a_streamed_completion_is_the_whole_one_in_pieces(client, model, prompt, ids, echo):
    if ids:
        encoded = [[1, *model.tokenizer.encode(text)] for text in ([prompt] if isinstance(prompt, str) else prompt)]
        prompt = encoded[0] if isinstance(prompt, str) else encoded
    request = {"model": "any", "prompt": prompt, "max_tokens": 6, "seed": 1, "logprobs": 2, "echo": echo}
    whole = client.completions.create(**request)
    *chunks, last = client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens == 6 * len(whole.choices)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert {chunk.id for chunk in chunks} == {last.id}
    for answer in whole.choices:
        pieces = [choice for choice in choices if choice.index == answer.index]
        assert "".join(piece.text for piece in pieces) == answer.text
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [answer.finish_reason] == ["length"]
        assert pieces[-1].finish_reason
        for name, values in answer.logprobs:
            assert [value for piece in pieces if piece.logprobs for value in getattr(piece.logprobs, name)] == values
