"""The model card's sample request: its shapes, its parameters, and what is wrong with others."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from edgemistral import sample_json
from edgemistral.errors import BadRequest, ContextOverflow
from edgemistral.generate.engine import Engine
from edgemistral.model import Model
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from tests.fake import FakeTransformer, tiny_config

DATA = Path(__file__).parent / "data"
SAMPLE = json.loads((DATA / "sample-request.json").read_text(encoding="utf-8"))
RESPONSE = json.loads((DATA / "sample-response.json").read_text(encoding="utf-8"))
TOKENIZER = Path(__file__).parent / "data" / "tokenizer.model"


@pytest.fixture(scope="module")
def model():
    tokenizer = SentencePieceTokenizer(TOKENIZER.read_bytes())
    config = tiny_config(vocab_size=tokenizer.vocab_size, context=2048, eos_id=tokenizer.eos_id)
    return Model(Engine(FakeTransformer(config, chunk=512)), tokenizer)


def request(input_string, **parameters):
    return {"input_data": {"input_string": input_string, "parameters": {"max_new_tokens": 5, "seed": 1, **parameters}}}


def answers(model, input_string, **parameters):
    [result] = sample_json.answer(model, sample_json.parse(request(input_string, **parameters)))
    return result


def chat(model, *contents, **options):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return "".join(model.chat(messages, 5, **{"seed": 1, **options}))


def test_the_card_s_sample_is_one_conversation(model):
    parsed = sample_json.parse(SAMPLE)
    assert len(parsed.prompts) == 1 and parsed.warnings == []
    assert parsed.options["temperature"] == 0.6 and parsed.options["max_new_tokens"] == 200
    [result] = sample_json.answer(model, parsed)
    assert list(result) == ["0"] and isinstance(result["0"], str) and result["0"]


def test_the_card_s_sample_per_message_has_the_shape_of_its_response(model):
    sample = copy.deepcopy(SAMPLE)
    sample["input_data"]["parameters"].update(per_message=True, max_new_tokens=5, seed=1)
    result = sample_json.answer(model, sample_json.parse(sample))
    assert [list(item) for item in result] == [list(item) for item in RESPONSE] == [["0", "1", "2"]]
    for message, text in zip(SAMPLE["input_data"]["input_string"], result[0].values(), strict=True):
        assert text == chat(model, message["content"], temperature=0.6, top_p=0.9)   # no history


def test_strings_are_independent_prompts(model):
    assert answers(model, ["one", "two"]) == {"0": chat(model, "one"), "1": chat(model, "two")}


def test_conversations_are_independent(model):
    first = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    expected = {"0": chat(model, "a", "b", "c"), "1": chat(model, "d")}
    assert answers(model, [first, [{"role": "user", "content": "d"}]]) == expected


def test_do_sample_false_is_greedy(model):
    assert answers(model, ["one"], do_sample=False, temperature=2.0) == {"0": chat(model, "one", temperature=0)}


def test_all_sampling_parameters_reach_the_sampler(model):
    sampling = {"temperature": 1.5, "top_p": 0.7, "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 77}
    assert answers(model, ["one"], **sampling) == {"0": chat(model, "one", **sampling)}


def test_stop(model):
    text = chat(model, "one")
    stop = text[2:4]
    assert answers(model, ["one"], stop=[stop]) == {"0": text[: text.index(stop)]}


def test_return_full_text_puts_the_prompt_before_the_reply(model):
    assert answers(model, ["one"], return_full_text=True) == {"0": "one " + chat(model, "one")}
    messages = [{"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b"), ("user", "c")]]
    assert answers(model, messages, return_full_text=True)["0"].startswith("[INST] a [/INST] b")


def test_unknown_names_are_reported_and_ignored():
    data = request(["one"], top_q=1)
    data["extra"] = data["input_data"]["more"] = 1
    assert sample_json.parse(data).warnings == [
        "extra is not known and was ignored",
        "input_data.more is not known and was ignored",
        "input_data.parameters.top_q is not known and was ignored",
    ]


USER = {"role": "user", "content": "x"}
INPUT, PARAMETERS = "input_data.input_string", "input_data.parameters"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ([], "the request"),
        ({}, "input_data"),
        ({"input_data": []}, "input_data"),
        ({"input_data": {}}, INPUT),
        ({"input_data": {"input_string": ["x"], "parameters": []}}, PARAMETERS),
        (request("x"), INPUT),
        (request([]), INPUT),
        (request([1]), INPUT),
        (request(["x", 1]), f"{INPUT}[1]"),
        (request(["x", USER]), f"{INPUT}[1]"),
        (request([[USER], USER]), f"{INPUT}[1]"),
        (request([USER, "x"]), f"{INPUT}[1]"),
        (request(["\ud800"]), f"{INPUT}[0]"),
        (request([USER, {"role": "robot", "content": "x"}]), f"{INPUT}[1].role"),
        (request([{"role": "user"}]), f"{INPUT}[0].content"),
        (request([[USER], []]), f"{INPUT}[1]"),
        (request([[USER], [USER, {"role": "user", "content": 1}]]), f"{INPUT}[1][1].content"),
        (request([[USER], ["x"]]), f"{INPUT}[1][0]"),
        (request([{"role": "robot", "content": "x"}], per_message=True), f"{INPUT}[0].role"),
        (request([{"role": "user", "content": None}], per_message=True), f"{INPUT}[0].content"),
        (request(["x"], per_message=True), f"{PARAMETERS}.per_message"),
        (request(["x"], per_message=1), f"{PARAMETERS}.per_message"),
        (request(["x"], do_sample="no"), f"{PARAMETERS}.do_sample"),
        (request(["x"], return_full_text=None), f"{PARAMETERS}.return_full_text"),
        (request(["x"], temperature="0.6"), f"{PARAMETERS}.temperature"),
        (request(["x"], top_p=2), f"{PARAMETERS}.top_p"),
        (request(["x"], seed=1.5), f"{PARAMETERS}.seed"),
        (request(["x"], max_new_tokens=2.5), f"{PARAMETERS}.max_new_tokens"),
        (request(["x"], stop=3), f"{PARAMETERS}.stop"),
    ],
)
def test_a_wrong_request_names_the_field_and_computes_nothing(model, data, field):
    before = len(model.engine._transformer.calls)
    with pytest.raises(BadRequest) as error:
        sample_json.answer(model, sample_json.parse(data))
    assert error.value.field == field
    assert field in str(error.value) and "\n" not in str(error.value)
    assert len(model.engine._transformer.calls) == before


def test_a_prompt_that_is_too_long_is_found_before_the_first_is_answered(model):
    before = len(model.engine._transformer.calls)
    with pytest.raises(ContextOverflow):
        answers(model, ["one", "word " * 5000])
    assert len(model.engine._transformer.calls) == before
