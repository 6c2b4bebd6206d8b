"""A checkpoint's own chat template, in Jinja, as transformers applies it; but what people write is never a control id.

A template writes control tokens as text, and so could people. So before rendering, each control text inside a message
is replaced by one private-use character that occurs nowhere else, and so is the beginning or end of one at the edge of
a message, which its surroundings might complete. The template then trims, joins and tests as before. The tokenizer
cuts the rendered text at the control texts, and only then are the stand-ins replaced by what they stand for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgemistral.errors import BadInput, BadRequest
from edgemistral.text.chat import ChatTemplate, Messages, Tools, check_list
from edgemistral.text.tokenizer import any_of, check_text, restore

if TYPE_CHECKING:
    from edgemistral.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
MAX_DEPTH = 64            # of JSON inside messages and tools
PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))


class Raised(jinja2.TemplateError):
    """What a template says with raise_exception."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what the assistant wrote, which matters in training only."""

    tags = {"generation"}   # noqa: RUF012 (jinja2's own type)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class JinjaTemplate(ChatTemplate):
    """One Jinja template and the tokenizer whose control texts it writes. Raises BadInput, naming the line, if it is none."""

    name = "Jinja"

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        self._tokenizer, self._source = tokenizer, source
        self.first_space = '" "?' if tokenizer.byte_fallback else ""
        environment = _environment()
        try:
            self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as problem:
            raise BadInput(f"chat template, line {problem.lineno}: {problem.message}") from None
        except RecursionError:
            raise BadInput("chat template: nested too deeply") from None
        texts = [text for text in tokenizer.controls if text.strip()]
        self._controls = any_of(texts, re.IGNORECASE)
        lowered = [text.lower() for text in texts]
        self._beginnings = {text[:n] for text in lowered for n in range(1, len(text))}
        self._ends = {text[n:] for text in lowered for n in range(1, len(text))}
        self._longest = max(map(len, lowered), default=0)
        pieces = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        found = {name: tokenizer.piece(token_id) for name, token_id in pieces.items() if token_id >= 0}
        self._names = {**found, **tokenizer.settings.names}

    def check(self, messages: Messages) -> None:
        for i, message in enumerate(check_list(messages)):
            field, role = f"messages[{i}]", message.get("role")
            if "role" not in message:
                raise BadRequest(f"{field}.role is missing", f"{field}.role")
            if role not in ROLES:
                raise BadRequest(f"{field}.role is {role!r:.40}: must be {', '.join(ROLES)}", f"{field}.role")
            if role == "tool" and not self.takes_tools:
                raise BadRequest(f"{field}.role is 'tool', which this model's chat template does not know", f"{field}.role")
            if message.get("tool_calls") and not self.takes_tools:
                raise BadRequest(f"{field}.tool_calls: this model's chat template knows no tools", f"{field}.tool_calls")
            if role == "assistant" and message.get("tool_calls") and message.get("content") is None:
                continue   # a turn that only calls tools
            if "content" not in message:
                raise BadRequest(f"{field}.content is missing", f"{field}.content")
            check_text(message["content"], f"{field}.content")

    def encode(self, messages: Messages, tools: Tools | None, add_generation_prompt: bool) -> list[int]:
        self.check(messages)
        if tools and not self.takes_tools:
            raise BadRequest("tools: this model's chat template has no place for them", "tools")
        own = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
        own_tools = [_plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)] if tools else None
        marks = _Marks(json.dumps([own, own_tools], ensure_ascii=False) + self._source)
        own = [{k: v if k == "role" else self._guard(v, marks) for k, v in message.items()} for message in own]
        if own_tools is not None:
            own_tools = self._guard(own_tools, marks)
        last, end = own[-1], ""
        continues = add_generation_prompt and last["role"] == "assistant" and isinstance(last.get("content"), str)
        if continues:
            end = marks.fresh("")
            last["content"] += end
        text = self.render(own, own_tools, add_generation_prompt and not continues, self._names)
        if continues:
            text, found, _ = text.rpartition(end)
            if not found:
                field = f"messages[{len(own) - 1}]"
                raise BadRequest(f"{field}: this model's chat template cannot continue an assistant's message", field)
        ids = self._tokenizer.encode_rendered(text, marks.meanings)
        bos = self._tokenizer.bos_id
        while ids[:2] == [bos, bos]:
            del ids[0]
        if not ids:
            raise BadRequest("messages: the chat template makes nothing of them", "messages")
        return ids

    def render(self, messages: Any, tools: Any, add_generation_prompt: bool, names: Mapping[str, str]) -> str:
        """The text that the template makes. Raises BadRequest with what it says, or with the line at which it fails."""
        try:
            return self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **names
            )
        except Raised as said:
            raise BadRequest(f"messages: the chat template refuses them: {_one_line(said)}", "messages") from None
        except Exception as problem:   # a template is a program
            line = _line_of(problem)
            message = f"messages: the chat template fails at line {line}: {type(problem).__name__}: {_one_line(problem)}"
            raise BadRequest(message, "messages") from None

    def _guard(self, value: Any, marks: _Marks) -> Any:
        """A JSON value whose strings hold no control text."""
        if isinstance(value, dict):
            return {self._guard(key, marks): self._guard(item, marks) for key, item in value.items()}
        if isinstance(value, list):
            return [self._guard(item, marks) for item in value]
        return self._guard_text(value, marks) if isinstance(value, str) else value

    def _guard_text(self, text: str, marks: _Marks) -> str:
        if self._controls is None:
            return text
        text = self._controls.sub(lambda match: marks.fresh(match[0]), text)
        core = text.strip()
        if not core:
            return text
        before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
        for n in range(min(self._longest - 1, len(core)), 0, -1):
            if core[-n:].lower() in self._beginnings:
                core = core[:-n] + marks.fresh(core[-n:])
                break
        for n in range(min(self._longest - 1, len(core)), 0, -1):
            if core[:n].lower() in self._ends:
                core = marks.fresh(core[:n]) + core[n:]
                break
        return before + core + after


class _Marks:
    """Characters that occur nowhere in a text, and what each stands for."""

    def __init__(self, text: str) -> None:
        used = set(text)
        self._free = (chr(code) for codes in PRIVATE_USE for code in codes if chr(code) not in used)
        self._of: dict[str, str] = {}
        self.meanings: dict[str, str] = {}

    def fresh(self, meaning: str) -> str:
        """The character for a text; always the same one."""
        if meaning not in self._of:
            mark = next(self._free, None)
            if mark is None:
                raise BadRequest("messages spell control tokens in too many ways", "messages")
            self._of[meaning], self.meanings[mark] = mark, restore(meaning, self.meanings)
        return self._of[meaning]


def _environment() -> ImmutableSandboxedEnvironment:
    """As in transformers' utils/chat_template_utils.py."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    raise Raised(str(message))


def _plain(value: Any, field: str, depth: int = 0) -> Any:
    """A copy of a JSON value in plain dicts and lists; BadRequest for anything else."""
    if depth > MAX_DEPTH:
        raise BadRequest(f"{field[:200]} is nested too deeply", field[:200])
    if isinstance(value, str):
        return check_text(value, field)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {check_text(key, field): _plain(item, f"{field}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(item, f"{field}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise BadRequest(f"{field} is {type(value).__name__}, which JSON does not have", field)


def _line_of(problem: BaseException) -> int | str:
    """The template's line in a traceback, which Jinja rewrites to say it."""
    line: int | str = getattr(problem, "lineno", None) or "?"
    at = problem.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == "<template>":
            line = at.tb_lineno
        at = at.tb_next
    return line


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
