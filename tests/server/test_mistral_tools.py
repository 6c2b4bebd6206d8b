"""Tools over Mistral's own template v3, asked by the real `openai` client."""

from __future__ import annotations

import json
from pathlib import Path

import mistral_common
import openai
import pytest

from edgemistral.generate.engine import Engine
from edgemistral.model import Model
from edgemistral.server import create_app
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from tests.fake import FakeTransformer, tiny_config
from tests.serving import serving

V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
USER = [{"role": "user", "content": "Weather in Paris?"}]
FUNCTION = {"name": "weather", "description": "Of a city", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALLS = '[{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "weather", "arguments": {"city": "Nice"}}]'
ARGUMENTS = [{"city": "Paris"}, {"city": "Nice"}]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(V3.read_bytes())


def client_of(tokenizer: SentencePieceTokenizer, answer: list[int], prompt: list[int]):
    """A client of a model that answers this prompt with these ids."""
    config = tiny_config(vocab_size=tokenizer.vocab_size, context=512, bos_id=1, eos_id=tokenizer.eos_id)
    script = dict(enumerate([*answer, tokenizer.eos_id], len(prompt)))
    model = Model(Engine(FakeTransformer(config, script=script)), tokenizer, Path("folder") / "fake-q4.safetensors")
    return serving(create_app(model))


def ask(url: str, messages, **options):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="any", messages=messages, max_tokens=200, temperature=0, **options)
        return list(answer) if options.get("stream") else answer


@pytest.mark.parametrize("marked", [True, False])
def test_calls_are_found_whole_and_in_a_stream(tokenizer, marked):
    mark = [next(i for i, text in tokenizer.control.items() if text == "[TOOL_CALLS]")] if marked else []
    with client_of(tokenizer, [*mark, *tokenizer.encode(CALLS)], tokenizer.encode_chat(USER, TOOLS)) as url:
        whole = ask(url, USER, tools=TOOLS).choices[0]
        chunks = [chunk.choices[0] for chunk in ask(url, USER, tools=TOOLS, stream=True) if chunk.choices]
    assert whole.finish_reason == "tool_calls" and not whole.message.content
    assert [json.loads(call.function.arguments) for call in whole.message.tool_calls] == ARGUMENTS
    streamed = [call for choice in chunks for call in choice.delta.tool_calls or []]
    assert [json.loads(call.function.arguments) for call in streamed] == ARGUMENTS
    assert [choice.finish_reason for choice in chunks if choice.finish_reason] == ["tool_calls"]
    assert not "".join(choice.delta.content or "" for choice in chunks)


def test_a_text_is_streamed_as_a_text_and_results_are_read(tokenizer):
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *USER, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": '{"sky": "blue"}'},
    ]
    older = [
        *USER, {"role": "assistant", "content": None, "function_call": call["function"]},
        {"role": "function", "name": "weather", "content": '{"sky": "blue"}'},
    ]
    with client_of(tokenizer, tokenizer.encode("Blue sky."), tokenizer.encode_chat(messages, TOOLS)) as url:
        for options in ({"messages": messages, "tools": TOOLS}, {"messages": older, "functions": [FUNCTION]}):
            chunks = ask(url, stream=True, **options)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Blue sky."
