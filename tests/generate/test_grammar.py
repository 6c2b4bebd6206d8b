"""Constrained decoding on a model of random logits: whatever it wants to say, it says what the grammar describes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mistral_common
import pytest

from edgemistral.errors import BadRequest
from edgemistral.generate.engine import Engine
from edgemistral.generate.grammar import GrammarCompiler, check_schema
from edgemistral.model import Model
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from tests.fake import FakeTransformer, tiny_config

TOKENIZERS = {
    "small": Path(__file__).parents[1] / "data" / "tokenizer.model",
    "v1": Path(mistral_common.__path__[0]) / "data" / "tokenizer.model.v1",
    "v3": Path(mistral_common.__path__[0]) / "data" / "mistral_instruct_tokenizer_240323.model.v3",
}
USER = [{"role": "user", "content": "Where is it?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Zürich"]}, "n": {"type": "integer", "minimum": 3, "maximum": 9}},
    "required": ["city", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def setting(request):
    """(a model of random logits, the compiler for its tokenizer)"""
    tokenizer = SentencePieceTokenizer(TOKENIZERS[request.param].read_bytes())
    config = tiny_config(vocab_size=tokenizer.vocab_size, context=512, bos_id=1, eos_id=tokenizer.eos_id)
    return Model(Engine(FakeTransformer(config, chunk=64)), tokenizer), GrammarCompiler(tokenizer)


def test_an_answer_fits_the_schema_whatever_the_seed(setting):
    model, compiler = setting
    grammar = compiler.json_schema(CITY)
    answers = set()
    for seed in range(12):
        reply = model.chat(USER, 60, grammar=grammar, seed=seed, temperature=3)
        text = "".join(reply)
        assert reply.finish_reason == "stop"
        assert re.fullmatch(r'\{"city": "(Paris|Rome|Zürich)", "n": [3-9]\}', text)   # one line, one space each
        answers.add(text)
    assert len(answers) > 5


def test_an_answer_begins_with_the_tokens_of_an_encoded_text(setting):
    model, compiler = setting
    reply = model.chat(USER, 60, grammar=compiler.text('start: "é42"'), seed=1)
    assert "".join(reply) == "é42"
    assert model.tokenizer.piece(reply.token_ids[0]).startswith("▁")
    assert model.tokenizer.decode(reply.token_ids) == "é42"


def test_a_continuation_goes_on_where_the_text_ends(setting):
    model, compiler = setting
    messages = [*USER, {"role": "assistant", "content": "It is in"}]
    grammar = compiler.text('start: " Paris" | "to Rome"', continues=True)
    for seed in range(4):
        assert "".join(model.chat(messages, 60, grammar=grammar, seed=seed)) in (" Paris", "to Rome")
        assert "".join(model.complete("It is in", 60, grammar=grammar, seed=seed)) in (" Paris", "to Rome")


def test_gbnf_with_characters_beyond_ascii(setting):
    model, compiler = setting
    grammar = compiler.text('root ::= ("é" | "🙂"){3} digit+ "."\ndigit ::= [0-9]')
    for seed in range(4):
        assert re.fullmatch("[é🙂]{3}[0-9]+\\.", "".join(model.chat(USER, 200, grammar=grammar, seed=seed)))


def test_any_json_object(setting):
    model, compiler = setting
    reply = model.chat(USER, 40, grammar=compiler.json_schema({"type": "object"}), seed=3, temperature=2)
    text = "".join(reply)
    assert text.startswith("{") and not re.search(r"[\n\t\r]", text)
    if reply.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_control_tokens_are_never_allowed_but_the_end(setting):
    model, compiler = setting
    allowed = compiler.text("start: /(.|\\n)*/", continues=True).start().allowed()
    tokenizer = model.tokenizer
    controls = [i for i in range(tokenizer.vocab_size) if not tokenizer.surface(i) and tokenizer.byte(i) is None]
    assert [i for i in controls if allowed[i]] == [tokenizer.eos_id]
    assert allowed.sum() > 0.9 * tokenizer.vocab_size


@pytest.mark.parametrize("grammar", ["start: (", "start: nothing", "root ::= (", ""])
def test_what_is_no_grammar_is_refused_in_one_line(setting, grammar):
    with pytest.raises(BadRequest) as error:
        setting[1].text(grammar)
    assert error.value.field == "grammar" and "\n" not in str(error.value)


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"type": "string", "pattern": 3}, {"$ref": "http://localhost/x"},
                                    {"$ref": "file:///etc/passwd"}])
def test_a_schema_that_cannot_be_compiled_is_refused(setting, schema):
    with pytest.raises(BadRequest, match=r"^grammar: "):
        setting[1].json_schema(schema)


@pytest.mark.parametrize("schema", [
    {"enum": [-(2**63)]}, {"properties": {"a": {"const": {"b": [1 - 2**63]}}}},                  # these end the process
    {"multipleOf": -(2**31)}, {"type": "integer", "multipleOf": 12345.678},                      # these never end
    {"allOf": [{"multipleOf": 99991}, {"multipleOf": 99989}]}, {"items": {"multipleOf": 0}},
])
def test_what_the_library_cannot_bear_does_not_reach_it(schema):
    with pytest.raises(BadRequest, match=r"must be greater|too large a step|above 0"):
        check_schema(schema)
    with pytest.raises(BadRequest, match=r"must be greater|too large a step|above 0"):
        GrammarCompiler.text(None, "start: %json " + json.dumps(schema))


def test_usual_numbers_of_schemas_are_taken():
    check_schema({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1, "enum": [1, -(2**53)]})
    check_schema({"allOf": [{"multipleOf": 0.01}, {"multipleOf": 25}], "properties": {"multipleOf": {"type": "number"}}})
