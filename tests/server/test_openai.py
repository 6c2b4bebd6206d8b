"""The OpenAI interface, asked by the real `openai` client."""

from __future__ import annotations

import json
import math

import openai
import pytest

from edgemistral.server import create_app
from edgemistral.text.guardrail import GUARDRAIL
from tests.serving import HTTP, fake_model, saying, serving

USER = [{"role": "user", "content": "Where is it?"}]
PARIS = "It is in Paris, near the café 🙂."


@pytest.fixture(scope="module")
def model():
    return fake_model()


@pytest.fixture(scope="module")
def url(model):
    with serving(create_app(model)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, messages=USER, **options):
    return client.chat.completions.create(model="any", messages=messages, **{"max_tokens": 8, **options})


def joined(stream):
    """The text of a stream of chat chunks, which must begin with the role and end with one reason."""
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert len(reasons) == 1 and len({chunk.id for chunk in chunks}) == 1
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices), reasons[0]


# ---- chat ------------------------------------------------------------------------------------------------------------

def test_a_chat_is_answered_as_the_python_api_does(client, model):
    answer = ask(client, seed=3, temperature=0.9, top_p=0.95)
    reply = model.chat(USER, 8, seed=3, temperature=0.9, top_p=0.95)
    assert answer.choices[0].message.content == "".join(reply)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion" and answer.model == "fake-q4"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (reply.usage.prompt_tokens, 8)
    assert usage.total_tokens == usage.prompt_tokens + 8


def test_a_stream_gives_the_same_answer_in_pieces(client):
    whole = ask(client, seed=3).choices[0].message.content
    assert joined(ask(client, seed=3, stream=True)) == (whole, "length")


def test_usage_comes_last_in_a_stream_that_asks_for_it(client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_next_turn_reuses_what_the_cache_holds(client):
    first = ask(client, seed=1)
    messages = [*USER, {"role": "assistant", "content": first.choices[0].message.content}, *USER]
    again = ask(client, messages, seed=1)
    assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_by_itself_or_before_a_stop_string(stream):
    model = fake_model()
    with serving(create_app(saying(PARIS, model.tokenizer.encode_chat(USER)))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def text(**options):
            answer = ask(client, temperature=0, max_tokens=50, stream=stream, **options)
            if stream:
                return joined(answer)
            return answer.choices[0].message.content, answer.choices[0].finish_reason

        assert text() == (PARIS, "stop")
        assert text(stop=", near") == ("It is in Paris", "stop")
        assert text(stop=["x", "é"]) == ("It is in Paris, near the caf", "stop")
        client.close()


def test_all_forms_of_a_message(client, model):
    def ids(messages):
        return ask(client, messages, seed=1).choices[0].message.content, ask(client, messages).usage.prompt_tokens

    parts = [{"type": "text", "text": "Where "}, {"type": "text", "text": "is it?"}]
    assert ids([{"role": "user", "content": parts}]) == ids(USER)
    brief = {"content": "Be brief."}
    assert ids([{"role": "developer", **brief}, *USER]) == ids([{"role": "system", **brief}, *USER])
    assert ids([{"role": "user", "content": "Where is it?", "name": "Ann"}]) == ids(USER)


def test_a_last_message_of_the_assistant_is_continued(client, model):
    messages = [*USER, {"role": "assistant", "content": "It is"}]
    expected = "".join(model.chat(messages, 8, seed=2))
    assert ask(client, messages, seed=2).choices[0].message.content == expected


def test_safe_prompt_is_the_guardrail_before_the_conversation(client):
    for messages in (USER, [{"role": "system", "content": "Be brief."}, *USER]):
        guarded = ask(client, messages, seed=1, extra_body={"safe_prompt": True})
        by_hand = ask(client, [{"role": "system", "content": GUARDRAIL}, *messages], seed=1)
        assert guarded.choices == by_hand.choices and guarded.usage.prompt_tokens == by_hand.usage.prompt_tokens


def test_logprobs(client, model):
    answer = ask(client, logprobs=True, top_logprobs=3, temperature=0)
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob <= 0   # greedy
        assert token.bytes is None or bytes(token.bytes).decode("utf-8", "replace") in (token.token, "\ufffd") or (
            token.token.startswith("<0x"))
    text = b"".join(bytes(token.bytes or []) for token in content).decode("utf-8", "replace")
    assert text.removeprefix(" ") == answer.choices[0].message.content
    ids = [*model.tokenizer.encode_chat(USER)]
    logits = model.logits(ids)[-1].astype(float)
    assert content[0].logprob == pytest.approx(logits.max() - math.log(sum(math.exp(x) for x in logits)))
    streamed = [token for chunk in ask(client, logprobs=True, temperature=0, stream=True)
                if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    assert all(token.top_logprobs == [] for token in streamed)


def test_penalties_and_bias_reach_the_sampler(client, model):
    token = model.tokenizer.encode("Paris")[0]
    biased = ask(client, logit_bias={str(token): 100}, temperature=0).choices[0].message.content
    assert biased == model.tokenizer.decode([token] * 8)
    penalized = ask(client, logit_bias={str(token): 5}, temperature=0, frequency_penalty=2, presence_penalty=2)
    assert penalized.choices[0].message.content == "".join(
        model.chat(USER, 8, temperature=0, logit_bias={token: 5}, frequency_penalty=2, presence_penalty=2)
    )
    assert len({ask(client, seed=-5).choices[0].message.content for _ in range(4)}) > 1      # a new one each time


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output(client, stream):
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}, "n": {"type": "integer"}},
              "required": ["city", "n"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    answer = ask(client, response_format=wanted, max_tokens=100, seed=1, stream=stream)
    text = joined(answer)[0] if stream else answer.choices[0].message.content
    assert json.loads(text)["city"] in ("Paris", "Rome") and type(json.loads(text)["n"]) is int


def test_any_json_object_and_a_grammar(client):
    text = ask(client, response_format={"type": "json_object"}, seed=1).choices[0].message.content
    assert text.startswith("{") and "\n" not in text
    assert ask(client, extra_body={"grammar": 'root ::= "Par" "is"'}).choices[0].message.content == "Paris"
    assert ask(client, response_format={"type": "text"}, seed=1).choices[0].message.content


def test_no_tokens_at_all(client):
    answer = ask(client, max_tokens=0)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "length")
    assert ask(client, max_tokens=None, max_completion_tokens=2).usage.completion_tokens == 2


def test_without_a_limit_the_answer_ends_with_the_context(client, model):
    answer = ask(client, max_tokens=None, seed=0)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.total_tokens <= model.context + 1


# ---- raw completions -------------------------------------------------------------------------------------------------

def complete(client, prompt, **options):
    return client.completions.create(model="any", prompt=prompt, **{"max_tokens": 6, **options})


def test_a_text_is_continued(client, model):
    expected = "".join(model.complete("Paris is", 6, seed=4))
    assert complete(client, "Paris is", seed=4).choices[0].text == expected
    ids = [1, *model.tokenizer.encode("Paris is")]
    assert complete(client, ids, seed=4).choices[0].text == expected
    assert complete(client, "Paris is", seed=4, echo=True).choices[0].text == "Paris is" + expected
    assert len(complete(client, "Paris is", max_tokens=openai.NOT_GIVEN).choices[0].text) > 0


def test_several_prompts_are_answered_one_after_another(client):
    single = [complete(client, prompt, seed=1).choices[0].text for prompt in ("Paris", "Rome", "Bonn")]
    together = complete(client, ["Paris", "Rome", "Bonn"], seed=1)
    assert [choice.text for choice in together.choices] == single
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert together.usage.completion_tokens == 18
    texts = ["", "", ""]
    for chunk in complete(client, ["Paris", "Rome", "Bonn"], seed=1, stream=True, echo=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [prompt + text for prompt, text in zip(("Paris", "Rome", "Bonn"), single, strict=True)]


def test_logprobs_of_a_completion(client):
    choice = complete(client, "Paris", logprobs=2, temperature=0, echo=True).choices[0]
    logprobs = choice.logprobs
    prompt = len(logprobs.tokens) - 6
    assert prompt > 0 and logprobs.text_offset[0] == 0 and logprobs.text_offset[prompt] == len("Paris")
    rows = list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))
    assert all(value <= max(top.values()) and len(top) in (2, 3) for _, value, top in rows)     # <s> stands before the prompt
    assert all(value == top[token] for token, value, top in rows[prompt:])


def test_a_completion_follows_a_grammar_without_a_space_before_it(client):
    assert complete(client, "Paris", extra_body={"grammar": 'root ::= "ian"'}).choices[0].text == "ian"


# ---- the rest --------------------------------------------------------------------------------------------------------

def test_models(client, model):
    [card] = client.models.list().data
    assert card.id == "fake-q4" and card.max_model_len == model.context
    assert client.models.retrieve("fake-q4").id == "fake-q4"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc/passwd")


def test_tokenize_and_back(url, model):
    text = "Where is it, 🙂?"
    body = HTTP.post(f"{url}/tokenize", json={"text": text}).json()
    assert body == {"tokens": model.tokenizer.encode(text), "count": len(model.tokenizer.encode(text))}
    assert HTTP.post(f"{url}/detokenize", json={"tokens": body["tokens"]}).json() == {"text": text}
    assert HTTP.post(f"{url}/tokenize", json={"messages": USER}).json()["tokens"] == model.tokenizer.encode_chat(USER)
    for wrong in ({}, {"text": "a", "messages": USER}):
        assert HTTP.post(f"{url}/tokenize", json=wrong).status_code == 422


def test_unknown_parameters_are_named_in_a_header(url):
    body = {"messages": USER, "max_tokens": 1, "toolz": [], "é\nset-cookie: x": 1}
    answer = HTTP.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert answer.headers["warnings"] == "toolz is not known and was ignored; \\xe9?set-cookie: x is not known and was ignored"
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [*USER, {"role": "user", "content": 5}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"temperature": "1"}, "temperature"), ({"temperature": -1}, "temperature"), ({"temperature": True}, "temperature"),
        ({"temperature": math.nan}, "temperature"), ({"top_p": 1.5}, "top_p"), ({"n": 17}, "n"),
        ({"max_tokens": 1.5}, "max_tokens"), ({"typical_p": 0.5}, "typical_p"), ({"seed": 1 << 70}, "seed"),
        ({"suffix": "x"}, "suffix"), ({"stop": [1]}, "stop[0]"), ({"stop": ["\ud800"]}, "stop[0]"),
        ({"n": "\ud800"}, "n"), ({"best_of": "\ud800"}, "best_of"),
        ({"stream_options": {"x": ["\udfff"]}}, "stream_options.x[0]"),
        ({"\ud800": 1}, "a name in the body"),
        ({"presence_penalty": 3}, "presence_penalty"), ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"), ({"logit_bias": {"1": 1000}}, "logit_bias.1"),
        ({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"grammar": 'root ::= "x"', "response_format": {"type": "json_object"}}, "grammar"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
         "response_format.json_schema.schema"),
    ],
)
def test_a_wrong_parameter_is_named(url, change, field):
    body = json.dumps({"messages": USER, "max_tokens": 1, **change})   # escapes half a surrogate pair, unlike httpx
    answer = HTTP.post(f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["param"] == field and field in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [[], [[]], [-1], [99999], ["a", 1], 5, None])
def test_a_wrong_prompt_is_named(url, prompt):
    answer = HTTP.post(f"{url}/v1/completions", json={"prompt": prompt})
    assert answer.status_code == 422 and answer.json()["error"]["param"].startswith("prompt")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"messages": NaN}'])
def test_a_body_that_is_no_request_is_refused(url, body):
    for path in ("/v1/chat/completions", "/v1/completions", "/score", "/tokenize"):
        answer = HTTP.post(f"{url}{path}", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422 and answer.json()["error"]["message"], answer.text


def test_a_prompt_over_the_context_has_the_code_that_clients_look_for(client, model):
    with pytest.raises(openai.BadRequestError, match="more than the context of 512") as error:
        ask(client, [{"role": "user", "content": "word " * 600}])
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"
    for path, field in (("completions", "prompt"), ("responses", "input")):
        with pytest.raises(openai.BadRequestError) as error:
            client.post(f"/{path}", body={"model": "any", field: "word " * 600}, cast_to=object)
        assert error.value.code == "context_length_exceeded" and error.value.param == field
    with pytest.raises(openai.BadRequestError):
        ask(client, [{"role": "user", "content": "word " * 600}], stream=True)
    assert ask(client).choices[0].finish_reason == "length"   # and the server goes on


def test_what_fails_on_the_way_is_an_event_of_the_stream(monkeypatch, client, model):
    def broken(*_):
        raise MemoryError("secret")

    monkeypatch.setattr(model.engine._transformer, "step", broken)
    with pytest.raises(openai.APIError, match="an error inside the server"):
        list(ask(client, stream=True))
    with pytest.raises(openai.InternalServerError, match="an error inside the server"):
        ask(client)
    monkeypatch.undo()
    assert ask(client).choices[0].finish_reason == "length"
