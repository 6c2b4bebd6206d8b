"""Tools in Mistral's own template v3 (Mistral-7B-Instruct v0.3). The reference is mistral-common.

    ... [AVAILABLE_TOOLS] {JSON of the tools} [/AVAILABLE_TOOLS] [INST] {last user text} [/INST]
    [TOOL_CALLS] {JSON list of calls} </s>
    [TOOL_RESULTS] {"content": ..., "call_id": ...} [/TOOL_RESULTS] {assistant} </s>
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgemistral.errors import BadRequest
from edgemistral.text.tokenizer import check_text

CONTROLS = {"[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"}


def tools_text(tools: Any) -> str:
    """The JSON between [AVAILABLE_TOOLS] and [/AVAILABLE_TOOLS]. Raises BadRequest."""
    if not isinstance(tools, (list, tuple)):
        raise BadRequest(f"tools must be a list, not {type(tools).__name__}", "tools")
    described = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRequest(f"tools[{i}].function.name must be a string", f"tools[{i}].function.name")
        described.append({"type": "function", "function": {
            "name": function["name"], "description": function.get("description") or "",
            "parameters": function.get("parameters") or {},
        }})
    return _json(described, "tools")


def calls_text(message: Mapping[str, Any], field: str) -> str:
    """The JSON that follows [TOOL_CALLS]. Raises BadRequest."""
    calls = []
    if message.get("content"):
        raise BadRequest(f"{field}: an assistant message has either content or tool_calls here", f"{field}.content")
    given = message["tool_calls"]
    for i, call in enumerate(given if isinstance(given, (list, tuple)) else [None]):
        at = f"{field}.tool_calls[{i}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRequest(f"{at}.function.name must be a string", f"{at}.function.name")
        described = {"name": function["name"], "arguments": _value(function.get("arguments", {}))}
        if call.get("id") and call["id"] != "null":
            described["id"] = call["id"]
        calls.append(described)
    return _json(calls, f"{field}.tool_calls")


def result_text(message: Mapping[str, Any], field: str) -> str:
    """The JSON between [TOOL_RESULTS] and [/TOOL_RESULTS]. Raises BadRequest."""
    for key in ("content", "tool_call_id"):
        if key not in message:
            raise BadRequest(f"{field}.{key} is missing", f"{field}.{key}")
        check_text(message[key], f"{field}.{key}")
    return _json({"content": _value(message["content"]), "call_id": message["tool_call_id"]}, field)


def _value(text: Any) -> Any:
    """The value of a JSON text; any other text unchanged."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return text


def _json(value: Any, field: str) -> str:
    try:
        return check_text(json.dumps(value, ensure_ascii=False), field)
    except (TypeError, ValueError, RecursionError) as problem:
        if isinstance(problem, BadRequest):
            raise
        raise BadRequest(f"{field} is not valid JSON: {' '.join(str(problem).split())[:200]}", field) from None
