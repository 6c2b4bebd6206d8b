"""OpenAI's newer interface: /v1/responses. Nothing is kept between requests.

Each request brings its whole conversation: `previous_response_id`, `conversation` and `store: true` are refused.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from starlette.responses import JSONResponse, Response

from edgemistral.errors import BadRequest
from edgemistral.server import failures, streaming
from edgemistral.server.openai_api import STREAMED, Chat, begin_chat
from edgemistral.server.protocols import (
    OURS,
    End,
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

router = APIRouter(prefix="/v1", responses=failures.RESPONSES)
Shared = Annotated[Service, Depends(service_of)]
SAME = ("temperature", "top_p", "stream", "max_output_tokens", "parallel_tool_calls", *OURS)
KINDS = ("input_text", "output_text", "text")
HARMLESS = (
    "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "stream_options", "max_tool_calls",
)
# Fields that the response repeats unchanged.
ECHOED = ("instructions", "max_output_tokens", "metadata", "temperature", "tool_choice", "tools", "top_p", "truncation", "text")


@router.post("/responses", responses=STREAMED)
async def responses(body: Annotated[dict[str, Any], Body()], request: Request, service: Shared) -> Response:
    """Answer a conversation, in OpenAI's newer format."""
    asked = chat_request(translated(body))
    shape, events = await begin_chat(asked, request, service, "resp")
    headers = {"x-request-id": shape.job.echoed, **warnings_header(asked.warnings())}
    made = _Made(shape, body)
    if asked.stream:
        return streaming.EventStream(made.stream(events), headers)
    answer = await whole(shape, events)
    output = [made.message(answer.text)] if answer.text or not answer.calls else []
    return JSONResponse(made.response([*output, *map(made.call, answer.calls)], answer.end), headers=headers)


def translated(body: dict[str, Any]) -> dict[str, Any]:
    """The request as fields of our chat."""
    given = only(body, (
        "model", "input", "instructions", "tools", "tool_choice", "text", "truncation", "metadata", "store", "background",
        "previous_response_id", "conversation", "prompt", "reasoning", "include", "top_logprobs", *SAME), HARMLESS)
    if isinstance(given.get("reasoning"), dict):
        given["reasoning"] = {name: value for name, value in given["reasoning"].items() if value is not None}
    refused(given, store=(False,), background=(False,), previous_response_id=(), conversation=(), prompt=(),
            reasoning=({}, {"effort": "none"}), include=([], ["reasoning.encrypted_content"]), top_logprobs=(0,))
    if "input" not in given:
        raise BadRequest("input is missing", "input")
    made: dict[str, Any] = {name: given[name] for name in ("model", *SAME) if name in given}
    made["messages"] = _messages(given)
    if "truncation" in given:
        if given["truncation"] not in ("auto", "disabled"):
            raise BadRequest("truncation must be auto or disabled", "truncation")
        made.setdefault("on_overflow", "drop-oldest" if given["truncation"] == "auto" else "error")
    if "tools" in given:
        made["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(as_list(given["tools"], "tools"))]
    choice = given.get("tool_choice")
    if isinstance(choice, dict):
        chosen = only(choice, ("type", "name"), (), "tool_choice")
        if chosen.get("type") != "function":
            raise BadRequest("tool_choice.type must be function", "tool_choice.type")
        choice = {"type": "function", "function": {"name": chosen.get("name")}}
    made["tool_choice"] = choice
    wanted = only(given.get("text", {}), ("format", "verbosity"), (), "text")
    if wanted.get("verbosity", "medium") != "medium":
        raise BadRequest("text.verbosity is not supported", "text.verbosity")
    if "format" in wanted:
        form = only(wanted["format"], ("type", "schema"), ("name", "description", "strict"), "text.format")
        made["response_format"] = {
            "type": form.get("type"), **({"json_schema": {"schema": form["schema"]}} if "schema" in form else {})}
    return made


def _messages(given: dict[str, Any]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if "instructions" in given:
        made.append({"role": "system", "content": as_text(given["instructions"], "instructions")})
    if isinstance(given["input"], str):
        return [*made, {"role": "user", "content": given["input"]}]
    for i, item in enumerate(as_list(given["input"], "input")):
        at = f"input[{i}]"
        kind = as_object(item, at).get("type", "message")
        if kind == "message":
            turn = only(item, ("role", "content"), ("type", "id", "status", "phase"), at)
            text = text_of(turn.get("content"), f"{at}.content", KINDS, ("annotations", "logprobs"), "")
            made.append({"role": turn.get("role"), "content": text})
        elif kind == "function_call":
            call = only(item, ("call_id", "name", "arguments"), ("type", "id", "status"), at)
            if not made or made[-1]["role"] != "assistant":
                made.append({"role": "assistant", "content": ""})
            called = {"name": call.get("name"), "arguments": as_text(call.get("arguments", "{}"), f"{at}.arguments")}
            made[-1].setdefault("tool_calls", []).append(
                {"id": as_text(call.get("call_id"), f"{at}.call_id"), "type": "function", "function": called})
        elif kind == "function_call_output":
            result = only(item, ("call_id", "output"), ("type", "id", "status"), at)
            made.append({"role": "tool", "tool_call_id": as_text(result.get("call_id"), f"{at}.call_id"),
                         "content": text_of(result.get("output"), f"{at}.output", KINDS, (), "")})
        else:
            raise BadRequest(f"{at}.type is {str(kind)[:40]!r}: this is not supported", f"{at}.type")
    return made


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if as_object(tool, where).get("type") != "function":
        raise BadRequest(f"{where}.type must be function: only your own tools are supported", f"{where}.type")
    given = only(tool, ("type", "name", "description", "parameters"), ("strict",), where)
    return function(given.get("name"), given.get("description"), given.get("parameters"))


class _Made:
    """The response to one request, and its items."""

    def __init__(self, shape: Chat, body: dict[str, Any]) -> None:
        self._shape, self._created = shape, int(time.time())
        self._echo: dict[str, Any] = {"tools": [], "tool_choice": "auto", "truncation": "disabled", "metadata": {},
                                      "text": {"format": {"type": "text"}}}
        self._echo |= {name: body[name] for name in ECHOED if body.get(name) is not None}
        self._parallel = body.get("parallel_tool_calls") is not False

    def response(self, output: list[dict[str, Any]], end: End | None = None) -> dict[str, Any]:
        """The response; its status is "in_progress" without an `end`."""
        cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(end.reason) if end else None
        usage = end.usage if end else None
        return {
            **dict.fromkeys(ECHOED), **self._echo, "id": self._shape.job.id, "object": "response", "created_at": self._created,
            "model": self._shape.service.name, "status": "in_progress" if end is None else "incomplete" if cut else "completed",
            "error": None, "incomplete_details": {"reason": cut} if cut else None, "output": output, "store": False,
            "parallel_tool_calls": self._parallel, "previous_response_id": None, "usage": usage and {
                "input_tokens": usage.prompt_tokens, "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.new_tokens, "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.new_tokens,
            },
        }

    @staticmethod
    def part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def message(self, text: str, status: str = "completed", item_id: str | None = None) -> dict[str, Any]:
        return {"id": item_id or f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "status": status,
                "content": [self.part(text)] if status == "completed" else []}

    @staticmethod
    def call(call: dict[str, Any]) -> dict[str, Any]:
        return {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "completed", "call_id": call["id"],
                **call["function"]}

    async def stream(self, events: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
        """The answer as events: one item for its text, one for each call."""
        numbers = itertools.count()

        def event(kind: str, **fields: Any) -> bytes:
            return streaming.named(kind, sequence_number=next(numbers), **fields)

        def closed() -> list[bytes]:
            item = self.message(text, item_id=place["item_id"])
            output.append(item)
            done = {"output_index": place["output_index"], "item": item}
            return [event("response.output_text.done", **place, text=text, logprobs=[]),
                    event("response.content_part.done", **place, part=self.part(text)),
                    event("response.output_item.done", **done)]

        output: list[dict[str, Any]] = []
        text, place = "", {}   # type: str, dict[str, Any]
        try:
            yield event("response.created", response=self.response([]))
            yield event("response.in_progress", response=self.response([]))
            async with aclosing(parts(self._shape, events)) as given:
                async for part in given:
                    if not place and (isinstance(part, str) or (isinstance(part, End) and not output)):
                        item = self.message("", "in_progress")
                        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
                        yield event("response.output_item.added", output_index=0, item=item)
                        yield event("response.content_part.added", **place, part=self.part(""))
                    if isinstance(part, str):
                        text += part
                        yield event("response.output_text.delta", **place, delta=part, logprobs=[])
                    elif isinstance(part, list | End) and place and not output:
                        for line in closed():
                            yield line
                    if isinstance(part, list):
                        for call in part:
                            item = self.call(call)
                            at = {"item_id": item["id"], "output_index": len(output)}
                            begun = {**item, "status": "in_progress", "arguments": ""}
                            yield event("response.output_item.added", output_index=len(output), item=begun)
                            yield event("response.function_call_arguments.delta", **at, delta=item["arguments"])
                            yield event("response.function_call_arguments.done", **at, name=item["name"],
                                        arguments=item["arguments"])
                            yield event("response.output_item.done", output_index=len(output), item=item)
                            output.append(item)
                    elif isinstance(part, End):
                        made = self.response(output, part)
                        yield event(f"response.{made['status']}", response=made)
                    elif not isinstance(part, str):
                        yield streaming.comment(part)
        except Exception as error:
            told = failures.describe(error)[1]["error"]
            yield event("error", code=told["code"], message=told["message"], param=told["param"])
