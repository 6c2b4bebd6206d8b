"""Anthropic's interface: /v1/messages (https://docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from edgemistral.errors import BadRequest
from edgemistral.generate.tasks import Usage
from edgemistral.server import failures, shapes, streaming
from edgemistral.server.openai_api import Chat, begin_chat
from edgemistral.server.protocols import (
    OURS,
    End,
    Whole,
    as_list,
    as_object,
    as_text,
    chat_request,
    function,
    only,
    parts,
    refused,
    text_of,
    whole,
)
from edgemistral.server.service import Service, service_of, warnings_header
from edgemistral.server.tools import spelled_out, tools_of, with_arguments

STOPS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal", "tool_calls": "tool_use"}
SAME = ("max_tokens", "temperature", "top_p", "top_k", "stream", *OURS)
# Ignored: our cache chooses by itself what to keep.
HARMLESS = ("cache_control", "citations")


class ErrorBody(BaseModel):
    type: str
    message: str


class Failure(BaseModel):
    type: Literal["error"] = "error"
    error: ErrorBody


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {**made, "model": Failure} for status, made in failures.RESPONSES.items()
}
router = APIRouter(prefix="/v1", responses=RESPONSES)
Shared = Annotated[Service, Depends(service_of)]


@router.post("/messages", responses={200: {"content": {"text/event-stream": {}}, "description": "The answer"}})
async def messages(body: Annotated[dict[str, Any], Body()], request: Request, service: Shared) -> Response:
    """Answer a conversation, in Anthropic's words."""
    asked = chat_request(translated(body))
    shape, events = await begin_chat(asked, request, service, "msg")
    headers = {"x-request-id": shape.job.echoed, "request-id": shape.job.id, **warnings_header(asked.warnings())}
    if asked.stream:
        return streaming.EventStream(_stream(shape, events), headers)
    answer = await whole(shape, events)
    return JSONResponse({**_message(shape, answer.end.usage), "content": _content(answer), **_stop(answer.end)},
                        headers=headers)


@router.post("/messages/count_tokens")
async def count_tokens(body: Annotated[dict[str, Any], Body()], service: Shared) -> dict[str, int]:
    """The number of tokens in the prompt of a request."""
    asked = chat_request(translated(body))
    tokenizer, plain = service.model.tokenizer, [message.plain() for message in asked.messages]
    tools = tools_of(asked.model_dump(include={"tools", "tool_choice"}))
    if tokenizer.chat.takes_tools:
        ids = await service.aside(tokenizer.encode_chat, with_arguments(plain), tools and tools.tools)
    else:
        ids = await service.aside(tokenizer.encode_chat, spelled_out(plain, tools))
    return {"input_tokens": len(ids)}


def translated(body: dict[str, Any]) -> dict[str, Any]:
    """The request as fields of our chat."""
    given = only(body, ("model", "messages", "system", "stop_sequences", "tools", "tool_choice", "metadata", "thinking",
                        "output_config", *SAME), ("service_tier", "cache_control"))
    if "messages" not in given:
        raise BadRequest("messages is missing", "messages")
    if isinstance(given.get("thinking"), dict):
        refused({"thinking.type": given["thinking"].get("type")}, **{"thinking.type": ("disabled",)})
    else:
        refused(given, thinking=())
    made: dict[str, Any] = {name: given[name] for name in ("model", *SAME) if name in given}
    made["stop"] = given.get("stop_sequences")
    if "metadata" in given:
        made.setdefault("user", only(given["metadata"], ("user_id",), (), "metadata").get("user_id"))
    turns = []
    if "system" in given:
        turns.append({"role": "system", "content": text_of(given["system"], "system", harmless=HARMLESS)})
    for i, message in enumerate(as_list(given["messages"], "messages")):
        turns += _turns(message, f"messages[{i}]")
    made["messages"] = turns
    if "tools" in given:
        made["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(as_list(given["tools"], "tools"))]
    if "tool_choice" in given:
        made.update(_choice(given["tool_choice"]))
    if "output_config" in given:
        wanted = only(given["output_config"], ("format",), (), "output_config").get("format")
        if wanted is not None:
            shape = only(wanted, ("type", "schema"), (), "output_config.format")
            made["response_format"] = {"type": shape.get("type"), "json_schema": {"schema": shape.get("schema")}}
    return made


def _turns(message: Any, where: str) -> list[dict[str, Any]]:
    """An Anthropic message as our messages: each tool result becomes a separate message."""
    given = only(message, ("role", "content"), (), where)
    role, content = given.get("role"), given.get("content")
    if role not in ("user", "assistant", "system"):
        raise BadRequest(f"{where}.role is {str(role)[:40]!r}: it must be user or assistant", f"{where}.role")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    texts, calls, results = [], [], []
    for i, block in enumerate(as_list(content, f"{where}.content")):
        at = f"{where}.content[{i}]"
        kind = as_object(block, at).get("type")
        if kind == "text":
            texts.append(as_text(only(block, ("type", "text"), HARMLESS, at).get("text"), f"{at}.text"))
        elif kind == "tool_use" and role == "assistant":
            use = only(block, ("type", "id", "name", "input"), (*HARMLESS, "caller"), at)
            arguments = as_object(use.get("input", {}), f"{at}.input")
            called = {"name": as_text(use.get("name"), f"{at}.name"), "arguments": arguments}
            calls.append({"id": as_text(use.get("id"), f"{at}.id"), "type": "function", "function": called})
        elif kind == "tool_result" and role == "user":
            result = only(block, ("type", "tool_use_id", "content", "is_error"), HARMLESS, at)
            text = text_of(result.get("content", ""), f"{at}.content", harmless=HARMLESS)
            results.append({"role": "tool", "content": f"Error: {text}" if result.get("is_error") else text,
                            "tool_call_id": as_text(result.get("tool_use_id"), f"{at}.tool_use_id")})
        else:
            raise BadRequest(f"{at}.type is {str(kind)[:40]!r}: not allowed in a message of the {role}", f"{at}.type")
    turn: dict[str, Any] = {"role": role, "content": "\n\n".join(texts)}
    if calls:
        turn["tool_calls"] = calls
    return [*results, *([turn] if texts or calls or not results else [])]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    given = only(tool, ("type", "name", "description", "input_schema"), ("cache_control", "strict"), where)
    if given.get("type", "custom") != "custom":
        raise BadRequest(f"{where}.type is {str(given['type'])[:40]!r}: only your own tools are supported", f"{where}.type")
    return function(given.get("name"), given.get("description"), given.get("input_schema"))


def _choice(choice: Any) -> dict[str, Any]:
    given = only(choice, ("type", "name", "disable_parallel_tool_use"), (), "tool_choice")
    kind = given.get("type")
    kinds: dict[Any, Any] = {"auto": "auto", "any": "required", "none": "none"}
    if kind == "tool":
        chosen: Any = {"type": "function", "function": {"name": given.get("name")}}
    elif isinstance(kind, str) and kind in kinds:
        chosen = kinds[kind]
    else:
        raise BadRequest(f"tool_choice.type is {str(kind)[:40]!r}: it must be auto, any, tool or none", "tool_choice.type")
    return {"tool_choice": chosen, **({"parallel_tool_calls": False} if given.get("disable_parallel_tool_use") else {})}


def _message(shape: Chat, usage: Usage | None) -> dict[str, Any]:
    return {
        "id": shape.job.id, "type": "message", "role": "assistant", "model": shape.service.name, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": _usage(usage or Usage(0)),
    }


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.new_tokens,
    }


def _stop(end: End) -> dict[str, Any]:
    if end.reason == "stop" and end.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop}
    return {"stop_reason": STOPS[end.reason], "stop_sequence": None}


def _use(call: dict[str, Any]) -> dict[str, Any]:
    try:
        made = json.loads(call["function"]["arguments"])
    except ValueError:
        made = None
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"],
            "input": made if isinstance(made, dict) else {}}


def _content(answer: Whole) -> list[dict[str, Any]]:
    text = [{"type": "text", "text": answer.text}] if answer.text or not answer.calls else []
    return [*text, *map(_use, answer.calls)]


async def _stream(shape: Chat, events: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    """The answer as Anthropic's events: one block for the text, one for each call."""
    index, is_open = 0, False
    try:
        yield streaming.named("message_start", message=_message(shape, None))
        async with aclosing(parts(shape, events)) as given:
            async for part in given:
                if isinstance(part, str):
                    if not is_open:
                        yield streaming.named("content_block_start", index=index, content_block={"type": "text", "text": ""})
                        is_open = True
                    yield streaming.named("content_block_delta", index=index, delta={"type": "text_delta", "text": part})
                elif isinstance(part, list):
                    if is_open:
                        yield streaming.named("content_block_stop", index=index)
                        index, is_open = index + 1, False
                    for call in part:
                        use = _use(call)
                        yield streaming.named("content_block_start", index=index, content_block={**use, "input": {}})
                        yield streaming.named("content_block_delta", index=index,
                                              delta={"type": "input_json_delta", "partial_json": json.dumps(use["input"])})
                        yield streaming.named("content_block_stop", index=index)
                        index += 1
                elif isinstance(part, End):
                    if not is_open and not index:      # clients expect at least one block
                        yield streaming.named("content_block_start", index=index, content_block={"type": "text", "text": ""})
                        is_open = True
                    if is_open:
                        yield streaming.named("content_block_stop", index=index)
                    yield streaming.named("message_delta", delta=_stop(part), usage=_usage(part.usage))
                else:
                    yield streaming.named("ping")
        yield streaming.named("message_stop")
    except Exception as error:
        status, body, _ = failures.describe(error)
        yield streaming.named("error", error=shapes.anthropic(status, body["error"])["error"])
