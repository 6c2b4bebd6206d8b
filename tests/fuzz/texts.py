"""Tokenizers, chat templates, grammars and the sample JSON."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Failed, Harness

SAMPLES = ("Hello", "a  b\n\té日本語\U0001f600", "<s>[INST] x [/INST]</s>", "<|im_start|>user\n", "\0\x02\ufffd", " " * 40,
    "1" * 100)


class Tokenizers(Harness):
    """The bytes of a tokenizer.model and of a tokenizer.json."""

    name = "tokenizer"
    planted = "what the library refuses is not translated (text.sentencepiece)"

    def prepare(self) -> None:
        from tests.text.tokenizers import SMALL, description

        self.models = [cut_model(SMALL.read_bytes())]
        self.json = json.loads(description("byte-level"))
        for name in ("vocab", "merges"):       # a small one: inputs stay small
            items = self.json["model"][name]
            self.json["model"][name] = dict(list(items.items())[:300]) if isinstance(items, dict) else []

    def make(self, chance: Random) -> Any:
        if chance.random() < 0.5:
            return {"model": mutate.data(chance, self.models[0]).hex()}
        fields = self.json
        if chance.random() < 0.5:              # not the vocabulary, which is most of it
            rest = mutate.value(chance, {**fields, "model": {**fields["model"], "vocab": {}}})
            if isinstance(rest, dict) and isinstance(rest.get("model"), dict) and rest["model"].get("vocab") == {}:
                rest["model"]["vocab"] = fields["model"]["vocab"]
            fields = rest
        else:
            fields = mutate.value(chance, fields)
        return {"json": mutate.as_text(chance, fields)}

    def run(self, given: Any) -> str:
        from edgemistral.text.spec import TextSpec

        if "model" in given:
            spec, data = TextSpec(), bytes.fromhex(given["model"])
        else:
            spec, data = TextSpec(kind="tokenizers", bos_id=1, adds_bos=True), given["json"].encode("utf-8", "surrogatepass")
        tokenizer = spec.tokenizer(data, None, "its tokenizer", 2)
        for sample in SAMPLES:
            ids = tokenizer.encode(sample)
            if any(not 0 <= token < tokenizer.vocab_size for token in ids):
                raise Failed(f"id outside of the vocabulary: {ids}")
            tokenizer.decode(ids)
        tokenizer.encode_chat([{"role": "user", "content": SAMPLES[1]}])
        tokenizer.decode(range(min(tokenizer.n_words, 500)))
        for token in range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // 50)):
            tokenizer.token_bytes(token)
        return "made"

    def plant(self) -> None:
        from edgemistral.text import sentencepiece

        class Unchecked(sentencepiece.SentencePieceTokenizer):
            def __init__(self, model: bytes, *arguments: Any, **more: Any) -> None:
                from sentencepiece import SentencePieceProcessor

                SentencePieceProcessor(model_proto=bytes(model))
                super().__init__(model, *arguments, **more)

        sentencepiece.SentencePieceTokenizer = Unchecked


def cut_model(data: bytes, pieces: int = 400) -> bytes:
    """A SentencePiece model with its first pieces only."""
    at, kept, count = 0, b"", 0
    while at < len(data):
        key, at_value = _varint(data, at)
        size, start = _varint(data, at_value)
        end = start + size
        if key >> 3 != 1 or count < pieces:
            kept += data[at:end]
        count += key >> 3 == 1
        at = end
    return kept


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What should I see?"},
            {"role": "assistant", "content": "The Louvre.", "prefix": False},
            {"role": "user", "content": "More <|im_end|> {{ x }}"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object",
    "properties": {}}}}]
JINJA = (
    "{% for m in messages %}", "{% endfor %}", "{% if m %}", "{% endif %}", "{{ m['content'] }}", "{{ bos_token }}",
    "{% set x = 1 %}",
    "{{ range(10**9) }}", "{% for a in range(99999) %}", "{{ 'x' * 10**9 }}", "{{ 9**9**9 }}", "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ messages | tojson }}", "{{ '%9999999999d' % 1 }}", "{{ 'a'.center(10**10) }}", "{{ m | attr('x') }}",
    "{% include 'x' %}",
    "{{ raise_exception(1) }}", "{{ strftime_now(1) }}", "{{ lipsum(10**6) }}", "{% set ns = namespace(x=1) %}",
    "{{ loop.index }}",
    "{{ dict(a=1).items() | list }}", "{{ messages | map('upper') | list }}", "{{ tools | length }}", "{% raw %}",
    "{%- generation -%}",
    "{{ 'x'.join(range(99999) | map('string')) }}", "{{ messages | batch(0) | list }}", "{{ [1] | sum(start='a') }}",
    "{{ 1 / 0 }}",
    "{{ messages[99].x.y }}", "{% break %}", "{{ '{0.__class__}'.format(1) }}", "{{ joiner() }}", "{{ 'a' | indent(10**9) }}",
)


class Templates(Harness):
    """A chat template, and conversations."""

    name = "template"
    planted = "messages are not checked (text.chat._checked_message)"

    def prepare(self) -> None:
        from edgemistral.text.sentencepiece import SentencePieceTokenizer
        from tests.text.tokenizers import SMALL, TEMPLATES

        self.tokenizer = SentencePieceTokenizer(SMALL.read_bytes(), 2053, added={2048: ("<|im_end|>", True)})
        self.seeds = list(TEMPLATES.values())

    def make(self, chance: Random) -> Any:
        source = chance.choice(self.seeds)
        if chance.random() < 0.8:
            source = mutate.text(chance, source, JINJA)
        return {"text": source, "messages": mutate.value(chance, MESSAGES) if chance.random() < 0.5 else MESSAGES,
                "tools": chance.choice((None, None, TOOLS, mutate.value(chance, TOOLS)))}

    def run(self, given: Any) -> str:
        from edgemistral.text.chat import JinjaTemplate, end_of_turn, is_mistrals_own

        special = {"bos_token": "<s>", "eos_token": "</s>"}
        template = JinjaTemplate(given["text"], special)
        ids = template.encode(self.tokenizer, given["messages"], given["tools"])
        if any(not 0 <= token < self.tokenizer.vocab_size for token in ids):
            raise Failed("an id outside of the vocabulary")
        is_mistrals_own(given["text"], special)
        end_of_turn(given["text"], special, {"</s>": 2})
        return "encoded"

    def plant(self) -> None:
        from edgemistral.text import chat

        chat._checked_message = lambda message, i: dict(message)


SCHEMA = {
    "type": "object", "required": ["name", "tags"], "additionalProperties": False,
    "$defs": {"n": {"type": "integer", "minimum": 0}},
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 9, "pattern": "^[a-z]+$"},
        "age": {"$ref": "#/$defs/n"}, "kind": {"enum": ["a", 1, None]}, "x": {"anyOf": [{"type": "null"}, {"type": "number"}]},
        "tags": {"type": "array", "items": {"type": "string", "format": "date"}, "minItems": 1, "maxItems": 3},
        "deep": {"type": "object", "properties": {"self": {"$ref": "#"}}}, "c": {"const": {"a": [1]}}, "m": {"multipleOf": 0.5},
    },
}
GRAMMARS = (
    'start: "a" | b+\nb: /[0-9]{1,3}/ " "?\n', 'start: /(a|b)*c{2,5}[^x-z]/',
    'root ::= "x" ws value\nws ::= [ \\t]*\nvalue ::= [0-9]+\n',
    'start: json\njson: %json {"type": "integer"}\n', 'start: a b\na: "("? a ")"? | "x"\nb: /\\d+(\\.\\d+)?/i\n',
)
PIECES = ("(", ")", "*", "+", "?", "{1,1000000}", "{99999}", "[", "]", "|", "\\p{L}", "\\b", "(?=a)", "\\1", ".*" * 9, "start",
    ":", "::=",
          "%json {}", "%ignore", "@inner", '"', "/", "\\", "\n", "(a+)+", "[[:alpha:]]", "\\u{110000}", "<s>", "<[1]>", "&",
          "~")


class Grammars(Harness):
    """Schemas, regular expressions, choices and grammars, under all names of a request."""

    name = "grammar"
    planted = "response_format may have any shape (server.constraints._response_format)"

    def prepare(self) -> None:
        import llguidance  # noqa: F401

        from edgemistral.server import constraints  # noqa: F401
        from edgemistral.text.sentencepiece import SentencePieceTokenizer
        from tests.serving import TOKENIZER

        self.tokenizer = SentencePieceTokenizer(TOKENIZER.read_bytes())

    def start(self) -> None:
        from edgemistral.generate.grammar import GrammarCompiler

        self.compiler = GrammarCompiler(self.tokenizer)

    def make(self, chance: Random) -> Any:
        kind = chance.randrange(5)
        if kind < 2:
            schema = mutate.value(chance, SCHEMA)
            return chance.choice(({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
                {"format": schema},
                                  {"guided_json": schema}, {"json_schema": schema}))
        if kind == 2:
            return {"guided_regex": mutate.text(chance, chance.choice(("[a-z]+@[a-z]+\\.com", "(\\d{1,3}\\.){3}\\d+",
                "a|b|c")), PIECES)}
        if kind == 3:
            return {"grammar": mutate.text(chance, chance.choice(GRAMMARS), PIECES)}
        seed = {"response_format": {"type": "json_object"}, "guided_choice": ["yes", "no"],
            "structured_outputs": {"regex": "a+"},
                "guided_grammar": GRAMMARS[0]}
        key = chance.choice(list(seed))
        return mutate.value(chance, {key: seed[key]})

    def run(self, given: Any) -> str:
        from edgemistral.errors import BadRequest
        from edgemistral.server.constraints import constraint_of

        constraint = constraint_of(given if isinstance(given, dict) else {})
        if constraint is None:
            return "none"
        compile_ = self.compiler.json_schema if constraint.kind == "json" else self.compiler.text
        try:
            state = compile_(constraint.value).start()
            for _ in range(6):
                allowed = state.allowed().nonzero()[0]
                if not len(allowed):
                    return "nothing may come"
                token = int(allowed[len(allowed) // 2])
                if token in self.tokenizer.end_ids:
                    break
                state.accept(token)
        except BadRequest as error:
            if "panicked" in str(error) or "unwrap" in str(error):
                raise Failed(f"words of the library: {error}") from None
            raise
        return "compiled"

    def plant(self) -> None:
        from edgemistral.server import constraints

        def unchecked(value: Any) -> Any:
            return value and constraints.Constraint("json", value["json_schema"]["schema"], "response_format")

        constraints._response_format = unchecked


SAMPLE = {"input_data": {
    "input_string": [{"role": "user", "content": "I am going to Paris."}, {"role": "assistant", "content": "Good."},
                     {"role": "user", "content": "What is #1?"}],
    "parameters": {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_new_tokens": 4, "return_full_text": True,
    "top_k": 5,
                   "repetition_penalty": 1.1, "seed": 3, "stop": ["\n"], "per_message": False, "safe_prompt": False,
                   "min_p": 0.1}}}


class Samples(Harness):
    """The sample JSON, and its answers."""

    name = "sample"
    planted = "types are not checked (sample_json._typed)"

    def prepare(self) -> None:
        from edgemistral import sample_json  # noqa: F401
        from tests.serving import fake_model  # noqa: F401

    def start(self) -> None:
        from tests.serving import fake_model

        self.model = fake_model(context=96)

    def make(self, chance: Random) -> Any:
        strings = mutate.value(chance, {"input_data": {"input_string": ["a", "b"], "parameters": {"max_new_tokens": 2}}})
        return mutate.as_text(chance, mutate.value(chance, SAMPLE) if chance.random() < 0.8 else strings)

    def run(self, given: Any) -> str:
        from edgemistral import sample_json
        from edgemistral.errors import BadRequest
        from edgemistral.files import strict_json

        request = sample_json.parse(strict_json.parse(given, "the request", BadRequest))
        if len(request.prompts) > 20:      # more of the same
            return "many"
        answers = sample_json.answer(self.model, request)
        json.dumps(answers)
        return "answered"

    def plant(self) -> None:
        from edgemistral import sample_json

        sample_json._typed = lambda value, kind, field: value
