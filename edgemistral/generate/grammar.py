"""Constrained decoding with a JSON schema or a grammar, by llguidance (https://github.com/guidance-ai/llguidance).

A grammar is compiled once. Each generation has a separate state, which says before each token which ones are allowed.
llguidance parses bytes, so characters that span several byte-fallback tokens come out whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.errors import BadRequest, EdgeMistralError
from edgemistral.extras import missing
from edgemistral.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

LEAST = 2**63 - 1024                        # the first numbers that a float rounds to 2**63
MOST_STATES = 99_999
WORDS = (      # llguidance's messages -> ours, without its long echo of the grammar
    (r" 1 \| .*$", ""),
    (r"(?s)^.*\(in regex\): (.*) in regex.*$", r"a regular expression: \1"),
    (r"(?s)^.*regex parse error: .*error: (.*?)(?: \d+ \|.*)?$", r"a regular expression cannot be read: \1"),
    (r"^.*lookarounds not supported yet.*$", "lookarounds and word boundaries in a regular expression are not supported"),
    (r"(?:lone leading surrogate|unexpected end of hex escape).*$",
     "a text has half of a surrogate pair, which is not a character"),
    (r"^Pointer '(.*)' does not exist$", r"$ref points to \1, which does not exist"),
    (r"^Unsatisfiable schema: (.*)$", r"no JSON fits this schema: \1"),
    (r"^recursion limit exceeded.*$", "nested too deeply"),
    (r"^(\d+)\((\d+)\): ", r"line \1, column \2: "),
)
# One space after each comma and colon, none elsewhere: with free whitespace a model may write spaces for ever.
JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
    """Compiles grammars for one tokenizer.

    `continues`: the text continues another one (a raw completion, an assistant message). Otherwise it begins a text.
    SentencePiece puts a space there, which decoding drops. The compiled grammar has that space in front, so that a
    constrained answer begins with the same tokens as an encoded text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ModuleNotFoundError as error:
            raise EdgeMistralError(missing(error) or str(error)) from None

        self._tokenizer = LLTokenizer(TokenizerWrapper(_Pieces(tokenizer)), n_vocab=tokenizer.vocab_size)
        self._vocab_size = tokenizer.vocab_size
        self._text_begins_with_space = tokenizer.answers_begin_with_space

    def json_schema(self, schema: Mapping[str, Any], continues: bool = False) -> CompiledGrammar:
        """JSON texts that fit a schema, on one line; {"type": "object"} is any object. Raises BadRequest."""
        check_schema(schema)
        return self._compile({"json_schema": {**schema, "x-guidance": JSON_LAYOUT}}, continues)

    def text(self, grammar: str, continues: bool = False) -> CompiledGrammar:
        """Texts of a grammar in llguidance's variant of Lark, or in GBNF (which has ::=). Raises BadRequest."""
        from llguidance.gbnf_to_lark import any_to_lark

        if "::=" in grammar:
            try:
                grammar = any_to_lark(grammar)
            except Exception as error:   # the converter raises many types
                raise BadRequest(f"grammar is not valid GBNF: {_one_line(error)}", "grammar") from None
        for part in grammar.split("%json")[1:]:
            with contextlib.suppress(json.JSONDecodeError, RecursionError):       # the library reports the error
                check_schema(json.JSONDecoder().raw_decode(part.lstrip())[0])
        return self._compile({"lark_grammar": grammar}, continues)

    def _compile(self, inner: dict[str, Any], continues: bool) -> CompiledGrammar:
        from llguidance import LLMatcher

        grammars = [inner]
        if self._text_begins_with_space and not continues:
            grammars = [{"lark_grammar": 'start: " " @inner'}, {"name": "inner", **inner}]
        try:
            text = json.dumps({"grammars": grammars})
        except RecursionError:
            raise BadRequest("grammar: nested too deeply", "grammar") from None
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise BadRequest(f"grammar: {_one_line(matcher.get_error())}", "grammar")
        return CompiledGrammar(matcher, self._vocab_size)


class CompiledGrammar:
    """A grammar, ready for any number of generations (`SamplingParams.grammar`)."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def start(self) -> _State:
        return _State(self._matcher.deep_copy(), self._vocab_size)


class _State:
    """The state of one generation in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():   # for example, the library's limits on work
            raise BadRequest(f"grammar: {_one_line(self._matcher.get_error())}", "grammar")


class _Pieces:
    """The bytes of every token, in the form that llguidance's TokenizerWrapper needs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.turn_end_id, tokenizer.bos_id
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        self._tokenizer = tokenizer
        for token_id in range(tokenizer.vocab_size):
            byte, data = tokenizer.byte(token_id), tokenizer.token_bytes(token_id)
            # No tokenizer writes a space as a byte token, and decoding would not drop it at the beginning.
            if byte == ord(" ") or not data:
                self.special_token_ids.append(token_id)
                self.tokens.append((tokenizer.piece(token_id) or f"<padding {token_id}>").encode())
            else:
                self.tokens.append(data)

    def __call__(self, text: str) -> list[int]:
        """The ids of a text inside another one, without the space that `encode` puts in front."""
        return self._tokenizer.encode_inside(text)


def check_schema(schema: Any) -> None:
    """Raise BadRequest for schemas on which llguidance 1.9 crashes or never ends: some constants, and large steps of
    `multipleOf`, whose automaton has a state for each remainder."""
    stack, steps, merged = [(schema, False)], [1], False
    while stack:
        node, constant = stack.pop()
        if isinstance(node, Mapping):
            stack += ((value, constant or name in ("enum", "const")) for name, value in node.items())
            merged = merged or "allOf" in node or "$ref" in node
            if isinstance(step := node.get("multipleOf"), (int, float)) and not isinstance(step, bool):
                steps.append(_digits_of(step))
        elif isinstance(node, list):
            stack += ((value, constant) for value in node)
        elif constant and type(node) is int and node <= -LEAST:
            raise BadRequest(f"grammar: the constant {node} must be greater than -{LEAST}", "grammar")
    if (math.lcm(*steps) if merged else max(steps)) > MOST_STATES:
        raise BadRequest(f"grammar: multipleOf: numbers of more than {len(str(MOST_STATES))} digits are too large a step",
                         "grammar")


def _digits_of(step: float) -> int:
    """The digits of a number, without leading and trailing zeros. BadRequest: it is not above zero."""
    if not 0 < step < math.inf:
        raise BadRequest(f"grammar: multipleOf is {step!r:.40}: it must be above 0", "grammar")
    if isinstance(step, int) and step.bit_length() > 4096:      # longer numbers may not become text
        return MOST_STATES + 1
    return int("".join(map(str, Decimal(repr(step)).normalize().as_tuple().digits)))


def _one_line(error: object) -> str:
    """The library's error on one line, in our words if WORDS has them."""
    text = " ".join(str(error).split())
    for pattern, words in WORDS:
        if found := re.search(pattern, text):
            text = text[: found.start()] + found.expand(words) + text[found.end() :]
    return text[:300]
