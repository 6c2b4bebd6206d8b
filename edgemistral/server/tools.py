"""Tool calling in OpenAI's shape: how the model learns of the tools, and how calls are found in its text.

A chat template that supports tools gets them unchanged. For other models a system text lists the tools and says how to call
them. A forced call is compiled into a grammar, so its arguments always fit. Other calls are parsed from the text as it
streams: text that may be part of a call is held back.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgemistral.errors import BadRequest
from edgemistral.server.constraints import Constraint, closed

NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
MARK, END_MARK = "<tool_call>", "</tool_call>"
HOW = (
    "You may call functions. To call one, answer with nothing but a JSON object of its name and arguments: "
    '{"name": "function", "arguments": {...}}. Results come back in the next message. The functions, with JSON schemas of '
    "their arguments:"
)


@dataclass(frozen=True)
class Tools:
    """tools: those that may be called, in OpenAI's shape. forced: one must be called. legacy: the request has `functions`.
    one: at most one call."""

    tools: list[dict[str, Any]]
    forced: bool
    legacy: bool
    one: bool = False      # parallel_tool_calls is false

    def constraint(self) -> Constraint | None:
        """The JSON schema of a forced call."""
        if not self.forced:
            return None
        calls = [{
            "type": "object", "additionalProperties": False, "required": ["name", "arguments"],
            "properties": {"name": {"const": tool["function"]["name"]}, "arguments": {"$ref": f"#/$defs/{n}"}},
        } for n, tool in enumerate(self.tools)]
        # A schema's references begin at its root: here the schema lies deeper, under $defs.
        schemas = {str(n): _moved(_parameters(tool), f"#/$defs/{n}") for n, tool in enumerate(self.tools)}
        return Constraint("json", {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": schemas}, "tools")

    def calls_in(self, text: str) -> list[dict[str, Any]]:
        """The calls in a text, in OpenAI's shape; none if it is an ordinary text."""
        names = {tool["function"]["name"] for tool in self.tools}
        found = []
        for value in _values(text):
            arguments = value.get("arguments", value.get("parameters", {})) if isinstance(value, dict) else None
            if not isinstance(value, dict) or value.get("name") not in names or not isinstance(arguments, (dict, str)):
                return []
            spelled = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            call_id = f"call_{secrets.token_hex(12)}"
            found.append({"id": call_id, "type": "function", "function": {"name": value["name"], "arguments": spelled}})
        return found[:1] if self.one else found

    def filter(self) -> CallFilter:
        return CallFilter(self)


class CallFilter:
    """Filters a streamed answer: text that cannot belong to a call passes at once."""

    def __init__(self, tools: Tools) -> None:
        self._tools, self._text, self._sent = tools, "", 0

    def push(self, piece: str) -> str:
        """The text that is safe to show after one more piece."""
        self._text += piece
        safe = self._safe()
        shown, self._sent = self._text[self._sent : safe], max(self._sent, safe)
        return shown

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text, or its calls."""
        calls = self._tools.calls_in(self._text[self._sent :])
        return ("" if calls else self._text[self._sent :]), calls

    def _safe(self) -> int:
        """How many characters cannot be part of a call."""
        start = len(self._text) - len(self._text.lstrip())
        if self._tools.forced or start == len(self._text) or self._text[start] in "{[":     # [TOOL_CALLS] too
            return 0
        at = self._text.find(MARK)
        if at >= 0:
            return at
        held = next((n for n in range(len(MARK) - 1, 0, -1) if self._text.endswith(MARK[:n])), 0)
        return len(self._text) - held


def tools_of(fields: Mapping[str, Any]) -> Tools | None:
    """The tools that a request may or must call. BadRequest names what is wrong with them."""
    legacy = fields.get("tools") is None and fields.get("functions") is not None
    field = "functions" if legacy else "tools"
    given, choice = fields.get(field), fields.get("function_call" if legacy else "tool_choice")
    if not given:
        if choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice asks for a call, but there are no tools", "tool_choice")
        return None
    tools = [_tool(one, f"{field}[{i}]", legacy) for i, one in enumerate(given)]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise BadRequest(f"{field} has two with the same name", field)
    one = fields.get("parallel_tool_calls") is False
    if choice in (None, "auto"):
        return Tools(tools, False, legacy, one)
    if choice == "none":
        return None
    if choice in ("required", "any"):
        return Tools(tools, True, legacy, one)
    where = "function_call" if legacy else "tool_choice"
    inner = choice if legacy else choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if name not in names:
        shown = json.dumps(choice, default=str)[:80]
        raise BadRequest(f"{where} is {shown}: it must be auto, none, required, or name a tool", where)
    return Tools([tool for tool in tools if tool["function"]["name"] == name], True, legacy, one)


def spelled_out(messages: Sequence[Mapping[str, Any]], tools: Tools | None) -> list[dict[str, Any]]:
    """A conversation for a template without tools: a system text lists them, calls and results become texts."""
    made: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        calls = list(message.get("tool_calls") or [])
        if message.get("function_call"):
            calls.append({"function": message["function_call"]})
        if calls:
            for call in calls:
                names[str(call.get("id"))] = str(call["function"].get("name"))
            texts = [json.dumps({"name": call["function"].get("name"), "arguments": _object(call["function"].get("arguments"))},
                                ensure_ascii=False) for call in calls]
            made.append({"role": "assistant", "content": "\n".join([*([content] if content else []), *texts])})
        elif role in ("tool", "function"):
            name = message.get("name") or names.get(str(message.get("tool_call_id")), "the function")
            made.append({"role": "user", "content": f"Result of {name}: {content}"})
        else:
            made.append({"role": role, "content": content})
    if tools is not None:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools.tools)
        made.insert(0, {"role": "system", "content": f"{HOW}\n{listed}"})
    return made


def with_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation for a template with tools: the arguments of calls become objects.

    `function_call` and the role "function" of older clients become tool calls and results.
    """
    made: list[dict[str, Any]] = []
    call_id = ""
    for i, given in enumerate(messages):
        message = dict(given)
        function = message.pop("function_call", None)
        calls = list(message.get("tool_calls") or [])
        if function:
            call_id = f"call{i:05}"
            calls.append({"id": call_id, "type": "function", "function": function})
        if message["role"] == "function":
            message |= {"role": "tool", "tool_call_id": call_id or f"call{i:05}"}
        if calls:
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _object(call["function"].get("arguments"))}}
                for call in calls
            ]
        made.append(message)
    return made


def _tool(value: Any, field: str, legacy: bool) -> dict[str, Any]:
    function = value if legacy else value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or (not legacy and value.get("type", "function") != "function"):
        raise BadRequest(f"{field} must be a function: {{'type': 'function', 'function': {{'name': ...}}}}", field)
    inner = field if legacy else f"{field}.function"
    if not isinstance(function.get("name"), str) or not NAME.fullmatch(function["name"]):
        raise BadRequest(f"{inner}.name must be up to 128 letters, digits, dots, - and _", f"{inner}.name")
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise BadRequest(f"{inner}.parameters must be a JSON schema", f"{inner}.parameters")
    return {"type": "function", "function": dict(function)}


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = closed(tool["function"].get("parameters") or {"type": "object", "properties": {}})
    return {"type": "object", **schema}


def _moved(schema: Any, to: str) -> Any:
    """A copy of a schema whose references to itself ("#", "#/$defs/Name") point below `to`."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    plain = ("const", "enum", "default", "examples")
    made = {key: value if key in plain else _moved(value, to) for key, value in schema.items()}
    reference = made.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        made["$ref"] = to + reference[1:]
    return made


def _object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _values(text: str) -> list[Any]:
    """The JSON values of calls: marked ones, a list, or one after another. None if there is any other text."""
    if MARK in text:
        text = "".join(part.partition(END_MARK)[0] for part in text.split(MARK)[1:])
    text, decoder, found = text.strip().removeprefix("[TOOL_CALLS]").strip(), json.JSONDecoder(), []
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return []
        found += value if isinstance(value, list) else [value]
        text = text[end:].lstrip().removeprefix(";").lstrip()
    return found
