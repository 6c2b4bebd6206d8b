"""Ollama's interface: /api/chat, /api/generate, /api/tags, /api/show, /api/version (docs/api.md of its repository)."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, HTTPException, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from edgemistral import __version__
from edgemistral.errors import BadRequest
from edgemistral.server import failures, streaming
from edgemistral.server.openai_api import Chat, begin_chat
from edgemistral.server.protocols import (
    OURS,
    End,
    as_list,
    as_object,
    as_text,
    chat_request,
    only,
    parts,
    refused,
    whole,
)
from edgemistral.server.service import Service, service_of, warnings_header

COMMON = ("model", "stream", "format", "options", "think", "logprobs", "top_logprobs")
# Ignored: a request does not decide how long the model stays in memory.
HARMLESS = ("keep_alive",)
SAME = (
    "num_predict", "temperature", "top_p", "top_k", "stop", "repeat_penalty", "typical_p", "tfs_z", "mirostat", "num_ctx",
    "repeat_last_n", *OURS,
)
# Ignored: these change how Ollama computes, not its answer.
TUNING = (
    "num_thread", "num_gpu", "main_gpu", "num_batch", "use_mmap", "use_mlock", "low_vram", "numa", "num_keep", "f16_kv",
    "vocab_only", "mirostat_tau", "mirostat_eta",
)


class Failure(BaseModel):
    error: str


RESPONSES: dict[int | str, dict[str, Any]] = {status: {**made, "model": Failure} for status, made in failures.RESPONSES.items()}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-ndjson": {}}, "description": "The pieces of the answer, or without `stream` the answer"}
}
router = APIRouter(prefix="/api", responses=RESPONSES)
Shared = Annotated[Service, Depends(service_of)]
Show = Callable[[str, list[dict[str, Any]]], dict[str, Any]]


class _Lines(streaming.EventStream):
    media_type = "application/x-ndjson"


@router.post("/chat", responses=STREAMED)
async def chat(body: Annotated[dict[str, Any], Body()], request: Request, service: Shared) -> Response:
    """Answer a conversation, in Ollama's words."""
    given = only(body, ("messages", "tools", *COMMON), HARMLESS)
    messages = [_message(one, f"messages[{i}]") for i, one in enumerate(as_list(given.get("messages", []), "messages"))]

    def show(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        called = [{"function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}} for call in calls]
        return {"message": {"role": "assistant", "content": text, **({"tool_calls": called} if called else {})}}

    if not messages:
        return _loaded(body, service, show)
    return await _answer(given, {"messages": messages, "tools": given.get("tools")}, request, service, show)


@router.post("/generate", responses=STREAMED)
async def generate(body: Annotated[dict[str, Any], Body()], request: Request, service: Shared) -> Response:
    """Answer one text, in Ollama's words."""
    given = only(body, ("prompt", "system", "suffix", "images", "template", "raw", "context", *COMMON), HARMLESS)
    if given.get("raw"):
        raise BadRequest("raw is not supported: /v1/completions continues a text without a template", "raw")
    refused(given, suffix=("",), images=([],), template=("",), context=([],), raw=(False,))
    prompt, system = (as_text(given.get(name, ""), name) for name in ("prompt", "system"))

    def show(text: str, _: list[dict[str, Any]]) -> dict[str, Any]:
        return {"response": text}

    if not prompt:
        return _loaded(body, service, show)
    first = [{"role": "system", "content": system}] if system else []
    return await _answer(given, {"messages": [*first, {"role": "user", "content": prompt}]}, request, service, show)


@router.get("/tags")
async def tags(service: Shared) -> dict[str, Any]:
    """The one model that is served."""
    return {"models": [_card(service)]}


@router.post("/show")
async def show(body: Annotated[dict[str, Any], Body()], service: Shared) -> dict[str, Any]:
    """Facts about the model."""
    given = only(body, ("model", "name"), ("verbose", "system", "template", "options"))
    asked = as_text(given.get("model", given.get("name", "")), "model")
    if asked.removesuffix(":latest") != service.name:
        raise HTTPException(404, f"there is no model {asked[:100]!r}: it is {service.name!r}")
    card = _card(service)
    architecture = card["details"]["family"]
    return {
        "modelfile": "", "parameters": "", "template": "", "details": card["details"], "modified_at": card["modified_at"],
        "model_info": {"general.architecture": architecture, f"{architecture}.context_length": service.model.context},
        "capabilities": ["completion", "tools"],
    }


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of this server."""
    return {"version": __version__}


async def _answer(
    given: dict[str, Any], made: dict[str, Any], request: Request, service: Service, show: Show
) -> Response:
    """Queue the request, and stream the answer unless the request says not to."""
    refused(given, think=(False,), logprobs=(False,), top_logprobs=(0,))
    options = only(given.get("options", {}), SAME, TUNING, "options")
    if options.pop("repeat_last_n", 64) not in (64, -1) and options.get("repeat_penalty", 1) != 1:
        raise BadRequest("options.repeat_last_n is not supported: a penalty counts the whole answer", "options.repeat_last_n")
    room = options.pop("num_ctx", 0)
    if not isinstance(room, int) or room > service.model.context:
        raise BadRequest(f"options.num_ctx is {str(room)[:40]}: this server has room for {service.model.context} tokens "
                         "(its option --context)", "options.num_ctx")
    if isinstance(options.get("num_predict"), int) and options["num_predict"] < 0:
        del options["num_predict"]        # as many as there is room for
    asked = chat_request({**options, **made, "format": given.get("format"), "stream": given.get("stream", True)})
    shape, events = await begin_chat(asked, request, service, "ollama")
    headers = {"x-request-id": shape.job.echoed, **warnings_header(asked.warnings())}
    if asked.stream:
        return _Lines(_stream(shape, events, show), headers)
    answer = await whole(shape, events)
    return JSONResponse({**_head(service), **show(answer.text, answer.calls), **_end(answer.end)}, headers=headers)


async def _stream(shape: Chat, events: AsyncGenerator[Any, None], show: Show) -> AsyncGenerator[bytes, None]:
    """The answer as lines of JSON. Progress events are left out: this format has no comments."""
    try:
        async with aclosing(parts(shape, events)) as given:
            async for part in given:
                if isinstance(part, End):
                    yield streaming.line({**_head(shape.service), **show("", []), **_end(part)})
                elif isinstance(part, list):
                    yield streaming.line({**_head(shape.service), **show("", part), "done": False})
                elif isinstance(part, str):
                    yield streaming.line({**_head(shape.service), **show(part, []), "done": False})
    except Exception as error:
        yield streaming.line({"error": failures.describe(error)[1]["error"]["message"]})


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message of Ollama as ours."""
    given = only(message, ("role", "content", "images", "tool_calls", "tool_name", "name", "tool_call_id"), (), where)
    if given.pop("images", []):
        raise BadRequest(f"{where}.images: this model reads text only", f"{where}.images")
    if "tool_name" in given:
        given["name"] = given.pop("tool_name")
    given.setdefault("content", "")
    if calls := given.pop("tool_calls", None):
        given["tool_calls"] = [
            {"type": "function", **only(call, ("id", "function"), ("type",), f"{where}.tool_calls[{i}]")}
            for i, call in enumerate(as_list(calls, f"{where}.tool_calls"))
        ]
        for i, call in enumerate(given["tool_calls"]):
            as_object(call.get("function"), f"{where}.tool_calls[{i}].function").pop("index", None)
    return given


def _head(service: Service) -> dict[str, Any]:
    return {"model": service.name, "created_at": _time(datetime.now(timezone.utc))}


def _end(end: End) -> dict[str, Any]:
    usage = end.usage
    prefill, decode = int(usage.prefill_seconds * 1e9), int(usage.decode_seconds * 1e9)
    return {
        "done": True, "done_reason": "length" if end.reason == "length" else "stop", "total_duration": prefill + decode,
        "load_duration": 0, "prompt_eval_count": usage.prompt_tokens, "prompt_eval_duration": prefill,
        "eval_count": usage.new_tokens, "eval_duration": decode,
    }


def _loaded(body: dict[str, Any], service: Service, show: Show) -> Response:
    """The answer to a request without a prompt, which asks to load or unload the model. Nothing is done."""
    assert service.model is not None
    reason = "unload" if body.get("keep_alive") in (0, "0") and not isinstance(body.get("keep_alive"), bool) else "load"
    return JSONResponse({**_head(service), **show("", []), "done": True, "done_reason": reason})


def _card(service: Service) -> dict[str, Any]:
    path = service.model.path
    size = path.stat().st_size if path is not None and path.is_file() else 0
    return {
        "name": service.name, "model": service.name, "size": size, "digest": "",
        "modified_at": _time(datetime.fromtimestamp(service.started, timezone.utc)),
        "details": {"parent_model": "", "format": "safetensors", "family": "mistral", "families": ["mistral"],
                    "parameter_size": "", "quantization_level": ""},
    }


def _time(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
