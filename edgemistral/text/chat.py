"""Chat templates: turn a conversation into the token ids after which the model answers.

Mistral's own templates are built in, because the ids must equal those of mistral-common. The tokenizer shows which template
the weights were trained on:

    v1      32000 pieces, Mistral-7B-Instruct v0.1 and v0.2: [INST] and [/INST] are ordinary text
            <s> {[INST] user [/INST]} {assistant} </s> {[INST] user [/INST]} ...     each {} encoded on its own
            a system text and a blank line come before the first user text
    v2, v3  32768 pieces, v0.3: [INST] and [/INST] are control ids
            <s> [INST] {user} [/INST] {assistant} </s> [INST] {user} [/INST] ...
            a system text and a blank line come before the last user text; assistant texts lose their trailing spaces
            tools, calls and results are supported (text/mistral_tools.py)
    v7 ...  Mistral's models with a tekken.json since Small 3: as v3, but each system text has a separate block
            <s> [SYSTEM_PROMPT] {system} [/SYSTEM_PROMPT] [INST] {user} [/INST] {assistant} </s> ...

Any other checkpoint comes with a Jinja template. It is rendered as in transformers, in jinja2's immutable sandbox. Text from
users never becomes a control token: before rendering, the text of every added token in a message is replaced by an unused
private-use character. It is restored after the rendered text was split at the template's own tokens.
"""

from __future__ import annotations

import itertools
import json
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from edgemistral.errors import BadInput, BadRequest
from edgemistral.text import mistral_tools
from edgemistral.text.hidden import PRIVATE_USE, Hidden
from edgemistral.text.tokenizer import Messages, Tokenizer, check_text

if TYPE_CHECKING:
    from jinja2 import Template

    from edgemistral.text.sentencepiece import SentencePieceTokenizer

Tools = Sequence[Mapping[str, Any]]
BLANK_LINE = "\n\n"
ROLES = ("system", "user", "assistant", "developer", "tool", "function")
FILENAME = "<chat template>"


class ChatTemplate(Protocol):
    """Encodes the conversations of a model."""

    name: str            # for people
    takes_tools: bool    # whether it supports `tools` and tool turns
    text: str | None     # the Jinja template, None for a built-in one

    def encode(self, tokenizer: Any, messages: Messages, tools: Tools | None = None) -> list[int]:
        """See `Tokenizer.encode_chat`."""


class MistralTemplate:
    """Mistral's own template, in the tokenizer's version."""

    name = "Mistral's own"
    text: str | None = None

    def __init__(self, control: Iterable[str] = (), version: int | None = None) -> None:
        """control: the texts of the tokenizer's control tokens, which tell v1 and v3 apart. version: 7, or any other."""
        self._system_block = version == 7
        self.takes_tools = set(control) >= mistral_tools.CONTROLS and not self._system_block

    def encode(self, tokenizer: SentencePieceTokenizer, messages: Messages, tools: Tools | None = None) -> list[int]:
        """As in mistral-common: consecutive messages of one role become one, with a blank line between the texts that are not
        empty. A conversation with only a system text, or one that the assistant opens, gets an empty user turn first.
        A later system text stays at its place, in the user's turn.

        An assistant message at the end gets no </s>: the model continues it (its `prefix`). An earlier empty one gives only
        </s>, as written by a model with an empty answer.
        """
        if tools and not self.takes_tools:
            raise BadRequest("tools are given, but this model's chat template has no place for them", "tools")
        if self.takes_tools and (tools or not all(map(_is_talk, _checked_list(messages)))):
            return self._with_tools(tokenizer, messages, tools)
        system, turns = chat_turns(messages)
        last_user = max(i for i, (role, _) in enumerate(turns) if role == "user")
        system_at = last_user if tokenizer.inst_ids else 0
        ids = [tokenizer.bos_id or 0]
        if self._system_block:
            control, system = {text: token_id for token_id, text in tokenizer.control.items()}, ""
            blocks = list(itertools.takewhile(lambda message: message["role"] in ("system", "developer"), messages))
            for block in blocks:
                ids += [control["[SYSTEM_PROMPT]"], *tokenizer.encode(block["content"]), control["[/SYSTEM_PROMPT]"]]
            if len(blocks) == len(messages) or messages[len(blocks)]["role"] != "user":
                turns = turns[1:]      # without the empty user turn that the older templates need
        for i, (role, text) in enumerate(turns):
            if role == "user":
                ids += self._user_turn(tokenizer, system + BLANK_LINE + text if system and i == system_at else text)
            else:
                ids += tokenizer.encode(text.rstrip(" ") if tokenizer.inst_ids else text)
                if i + 1 < len(turns):
                    ids.append(tokenizer.eos_id)
        return ids

    def _with_tools(self, tokenizer: SentencePieceTokenizer, messages: Messages, tools: Tools | None) -> list[int]:
        """A conversation with tools, calls of them or their results; mistral_tools.py shows it."""
        control = {text: token_id for token_id, text in tokenizer.control.items()}
        system, turns = _tool_turns(messages)
        users = [i for i, (role, _) in enumerate(turns) if role == "user"]
        ids = [tokenizer.bos_id or 0]
        for i, (role, text) in enumerate(turns):
            if role == "tool":
                ids += [control["[TOOL_RESULTS]"], *tokenizer.encode(text), control["[/TOOL_RESULTS]"]]
            elif role == "call":
                ids += [control["[TOOL_CALLS]"], *tokenizer.encode(text), tokenizer.eos_id]
            elif role == "user":
                if tools and i == users[-1]:
                    told = tokenizer.encode(mistral_tools.tools_text(tools))
                    ids += [control["[AVAILABLE_TOOLS]"], *told, control["[/AVAILABLE_TOOLS]"]]
                whole = system + BLANK_LINE + text if system and i == users[-1] else text
                ids += self._user_turn(tokenizer, whole)
            else:
                ids += tokenizer.encode(text.rstrip(" "))
                if i + 1 < len(turns):
                    ids.append(tokenizer.eos_id)
        return ids

    @staticmethod
    def _user_turn(tokenizer: SentencePieceTokenizer, text: str) -> list[int]:
        if tokenizer.inst_ids is None:
            return tokenizer.encode(f"[INST] {text} [/INST]")
        begin, end = tokenizer.inst_ids
        return [begin, *tokenizer.encode(text), end]


class JinjaTemplate:
    """A checkpoint's own template. BadInput, naming the line: it is not a valid template."""

    name = "the checkpoint's own"

    def __init__(self, text: str, special: Mapping[str, str] | None = None, tool_text: str | None = None) -> None:
        """special: texts that the template may name, such as bos_token. tool_text: a separate template for chats with tools."""
        self.text: str | None = text
        self._source, self._special = text, dict(special or {})
        self._with_tools = JinjaTemplate(tool_text, special) if tool_text is not None else None
        self.takes_tools = self._with_tools is not None or re.search(r"\btools\b", text) is not None
        self._template  # noqa: B018   # compiled now, to find mistakes
        if "messages" not in text:
            raise BadInput(f"the chat template does not use `messages`: {' '.join(text.split())[:40]!r}")

    @cached_property
    def _template(self) -> Template:
        from jinja2 import TemplateSyntaxError

        try:
            template: Template = _environment().from_string(self._source)
            return template
        except TemplateSyntaxError as error:
            raise BadInput(f"line {error.lineno} of the chat template: {error.message}") from None
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:      # of what jinja2 makes of it
            raise BadInput(f"the chat template cannot be compiled: {' '.join(str(error).split())[:200]}") from None

    def encode(self, tokenizer: Tokenizer, messages: Messages, tools: Tools | None = None) -> list[int]:
        """As transformers' apply_chat_template with add_generation_prompt."""
        if tools and self._with_tools is not None:
            return self._with_tools.encode(tokenizer, messages, tools)
        if tools and not self.takes_tools:
            raise BadRequest("tools are given, but this model's chat template has no place for them", "tools")
        if tools is not None and (isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence)):
            raise BadRequest(f"tools must be a list of tools, not {type(tools).__name__}", "tools")
        checked = [_checked_message(message, i) for i, message in enumerate(_checked_list(messages))]
        if len(checked) > 1 and checked[-1]["role"] == "assistant" and not checked[-1].get("content") \
                and not checked[-1].get("tool_calls"):
            checked.pop()                              # an empty answer to continue is the same as a new answer
        everything = json.dumps([checked, list(tools or [])], ensure_ascii=False, default=str) + self._source
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in everything)
        hidden = Hidden(tokenizer.markup.values(), free)
        continued = checked[-1]["role"] == "assistant" and bool(checked[-1].get("content"))
        end = next(free)
        shown = [{k: v if k == "role" else hidden.in_all(v) for k, v in message.items()} for message in checked]
        if continued:
            shown[-1]["content"] += end
        text = self.render(shown, hidden.in_all(list(tools)) if tools else None, not continued)
        if continued:
            text = text.partition(end)[0]
        return tokenizer.encode_markup(check_text(text, "messages"), hidden.meanings)

    def render(self, messages: Messages, tools: Tools | None = None, add_generation_prompt: bool = True) -> str:
        """The text of a conversation. BadRequest: the template refuses it, or fails."""
        from jinja2 import TemplateError

        try:
            self._template.environment.begin()  # type: ignore[attr-defined]
            return self._template.render(
                messages=list(messages), tools=tools, documents=None, add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except _Raised as error:
            raise BadRequest(f"the model's chat template refuses this conversation: {error}", "messages") from None
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError,
                RecursionError, MemoryError) as error:
            line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == FILENAME), None)
            where, why = f" in line {line}" if line else "", " ".join(str(error).split())[:200]
            raise BadRequest(f"the model's chat template fails{where}: {why}", "messages") from None


class _Raised(Exception):
    """Raised by a template."""


def _environment() -> Any:
    """The environment with the names and settings that transformers gives a template."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols

    from edgemistral.text.template_limits import LimitedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks the assistant's text for training; it renders unchanged."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Environment(LimitedEnvironment):
        def from_string(self, source: Any, *arguments: Any, **more: Any) -> Template:
            return self.template_class.from_code(self, self.compile(source, filename=FILENAME), self.make_globals(None), None)

    def refuse(message: str) -> None:
        raise _Raised(message)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def is_mistrals_own(text: str, special: Mapping[str, str]) -> bool:
    """Whether a Jinja template is a version of Mistral's: its rendered text has the same form, except for spaces."""
    turns = [("user", "u1"), ("assistant", "a1"), ("user", "u2")]
    bos, eos = special.get("bos_token", ""), special.get("eos_token", "")
    try:
        rendered = JinjaTemplate(text, special).render([{"role": role, "content": content} for role, content in turns])
    except BadInput:
        return False
    if "".join(rendered.split()) != f"{bos}[INST]u1[/INST]a1{eos}[INST]u2[/INST]":
        return False
    try:
        system = JinjaTemplate(text, special).render([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    except BadInput:     # the older ones refuse it
        return True
    return "".join(system.split()) == f"{bos}[INST]su[/INST]"


def end_of_turn(text: str, special: Mapping[str, str], control: Mapping[str, int]) -> int | None:
    """The control id that ends the assistant's turn in a template, or None."""
    marked = "\ue000"
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": marked}, {"role": "user", "content": "u"}]
    try:
        after = JinjaTemplate(text, special).render(messages).partition(marked)[2].lstrip()
    except BadInput:
        return None
    return max(((len(known), token_id) for known, token_id in control.items() if after.startswith(known)), default=(0, None))[1]


def chat_turns(messages: Messages) -> tuple[str, list[tuple[str, str]]]:
    """Messages -> the system text and turns (role, text) that alternate and begin with the user.

    Raises BadRequest, whose `field` says for example `messages[2].role`.
    """
    merged: list[tuple[str, list[str]]] = []
    for i, message in enumerate(_checked_list(messages)):
        checked = _checked_message(message, i)
        role, content = checked["role"], checked["content"]
        if checked.get("tool_calls") or role in ("tool", "function"):
            at = f"messages[{i}].{'tool_calls' if checked.get('tool_calls') else 'role'}"
            raise BadRequest(f"{at} belongs to a tool call, and this model's chat template has no place for tools", at)
        if role == "system" and merged and merged[-1][0] != "system":
            role = "user"          # at its place, not moved to the beginning
        if not merged or merged[-1][0] != role:
            merged.append((role, []))
        if content:
            merged[-1][1].append(content)
    turns = [(role, BLANK_LINE.join(texts)) for role, texts in merged]
    if len(turns) == 1 and turns[0][0] == "assistant":
        raise BadRequest("messages[0].role is 'assistant': a conversation needs a user message", "messages[0].role")
    system = turns.pop(0)[1] if turns[0][0] == "system" else ""
    if not turns or turns[0][0] != "user":
        turns.insert(0, ("user", ""))
    if len(turns) > 1 and turns[-1] == ("assistant", ""):
        turns.pop()                # an empty answer to continue is the same as a new answer
    return system, turns


def _is_talk(message: Any) -> bool:
    """Whether a message is a text, not a call of tools or a result."""
    of_tools = isinstance(message, Mapping) and (message.get("role") in ("tool", "function") or message.get("tool_calls"))
    return not of_tools


def _tool_turns(messages: Messages) -> tuple[str, list[tuple[str, str]]]:
    """As `chat_turns`, but a turn may also be a "call" or a "tool" result, as JSON."""
    turns: list[tuple[str, str]] = []
    systems: list[str] = []
    for i, message in enumerate(_checked_list(messages)):
        checked = _checked_message(message, i)
        role, text, field = checked["role"], checked["content"], f"messages[{i}]"
        if role == "system" and not turns:
            systems.append(text)
            continue
        if not _is_talk(checked):
            if role not in ("assistant", "tool"):
                what = "a function's result needs the role 'tool'" if role == "function" else "only the assistant calls tools"
                raise BadRequest(f"{field}.role is {role!r}: {what}", f"{field}.role")
            spell = mistral_tools.result_text if role == "tool" else mistral_tools.calls_text
            turns.append(("tool" if role == "tool" else "call", spell(checked, field)))
            continue
        role = "user" if role == "system" else role          # at its place, not moved to the beginning
        if turns and turns[-1][0] == role:
            text = BLANK_LINE.join(filter(None, (turns.pop()[1], text)))
        turns.append((role, text))
    if len(turns) > 1 and turns[-1] == ("assistant", ""):
        turns.pop()                # an empty answer to continue is the same as a new answer
    if not turns or turns[0][0] == "assistant":
        turns.insert(0, ("user", ""))
    if turns[0][0] != "user":
        raise BadRequest("messages begin with a tool call or its result: a user message must come before it", "messages")
    return BLANK_LINE.join(filter(None, systems)), turns


def _checked_list(messages: Any) -> Sequence[Any]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise BadRequest(f"messages must be a list of messages, not {type(messages).__name__}", "messages")
    if not messages:
        raise BadRequest("messages is empty: a conversation needs a message", "messages")
    return messages


def _checked_message(message: Any, i: int) -> dict[str, Any]:
    """A message with one of our roles and a str as content. Raises BadRequest."""
    field = f"messages[{i}]"
    if not isinstance(message, Mapping):
        raise BadRequest(f"{field} must be an object with role and content, not {type(message).__name__}", field)
    if "role" not in message:
        raise BadRequest(f"{field}.role is missing", f"{field}.role")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise BadRequest(f"{field}.role is {role!r:.40}: must be {', '.join(ROLES[:-1])} or {ROLES[-1]}", f"{field}.role")
    if content is None and (role == "assistant" or message.get("tool_calls")):
        content = ""
    elif "content" not in message:
        raise BadRequest(f"{field}.content is missing", f"{field}.content")
    return {**message, "role": "system" if role == "developer" else role, "content": check_text(content, f"{field}.content")}
