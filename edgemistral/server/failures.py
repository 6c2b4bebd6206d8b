"""Every failure as JSON in the shape of the OpenAI interface, with the status that its clients expect.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "messages[0].role", "code": "invalid_value"}}

    400   the prompt is longer than the context, or the host's review refused it
    401   no API key, or a wrong one                408   the body does not arrive in time
    403   a Host or Origin that is not allowed      413   the body is too large
    404   no such route, model or request           415   not JSON
    405   no such method of a route                 422   a parameter is wrong: `param` names it
    409   the session is in use                     429   the queue is full: Retry-After says when to try again
    499   the request was cancelled                 500   a bug here, or a damaged model
    503   the model is loading, or the server shuts down
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from edgemistral.errors import BadRequest, BadSession, Cancelled, ContextOverflow, EdgeMistralError
from edgemistral.server.scheduler import QueueFull, Unavailable
from edgemistral.server.service import Refused

INVALID = "invalid_request_error"
PROMPT_FIELDS = {"/v1/completions": "prompt", "/v1/responses": "input", "/score": "input_data.input_string",
                 "/": "input_data.input_string"}      # "messages" elsewhere


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorBody


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": text}
    for status, text in (
        (400, "The prompt does not fit into the context, or was refused"),
        (401, "API key missing or wrong"),
        (403, "Host or Origin not allowed"),
        (404, "Not found"),
        (408, "The body did not arrive in time"),
        (409, "The session is in use, or belongs to another model"),
        (413, "The body is too large"),
        (415, "Not JSON"),
        (422, "A parameter is wrong"),
        (429, "The queue is full"),
        (499, "Cancelled"),
        (500, "A bug, or a damaged model"),
        (503, "The model is loading, or the server shuts down"),
    )
}


def body_of(message: str, kind: str = INVALID, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param or None, "code": code}}


def response(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response, escaped to ASCII: it may quote any text that a client sent."""
    return Response(json.dumps(body), status, headers, media_type="application/json")


def describe(error: Exception, prompt_field: str = "messages") -> tuple[int, dict[str, Any], dict[str, str]]:
    """An error of ours as (status, body, headers). prompt_field: the field of the request that holds the prompt."""
    if isinstance(error, ContextOverflow):
        message = (                       # clients search for these words
            f"This model's maximum context length is {error.context} tokens. However, your messages resulted in "
            f"{error.n_tokens} tokens: {error}."
        )
        return 400, body_of(message, param=prompt_field, code="context_length_exceeded"), {}
    if isinstance(error, BadRequest):
        return 422, body_of(str(error), param=error.field, code="invalid_value"), {}
    if isinstance(error, BadSession):
        return 409, body_of(str(error), param="session", code="session_unusable"), {}
    if isinstance(error, Refused):
        return 400, body_of(str(error), code="content_filter"), {}
    if isinstance(error, Unavailable):
        status, code = (429, "queue_full") if isinstance(error, QueueFull) else (503, "unavailable")
        return status, body_of(str(error), "server_error", code=code), {"retry-after": str(error.retry_after)}
    if isinstance(error, Cancelled):
        return 499, body_of(str(error), "cancelled", code="cancelled"), {}
    message = str(error) if isinstance(error, EdgeMistralError) else "an error inside the server"
    return 500, body_of(message, "server_error", code="internal_error"), {}


def install(app: FastAPI) -> None:
    """Turn every error of the app's endpoints into such a response."""
    async def own(request: Request, error: Exception) -> Response:
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))      # where the host put this app
        return response(*describe(error, PROMPT_FIELDS.get(path, "messages")))

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return response(422, body_of(f"the body is not valid JSON: {_where(first, error.body)}", code="invalid_json"))
        own = (one.get("ctx", {}).get("error") for one in error.errors())
        if refusal := next((one for one in own if isinstance(one, BadRequest)), None):
            return response(*describe(refusal))
        field, message = _explain(error.errors(), error.body)
        return response(422, body_of(f"{field}: {message}", param=field, code="invalid_value"))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = 422 if error.status_code == 400 else error.status_code   # FastAPI's 400: not JSON
        message = str(error.detail)
        if status == 404 and message == "Not Found":
            message = _nowhere(request)
        return response(status, body_of(message), error.headers)

    app.add_exception_handler(EdgeMistralError, own)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, own)


def _where(error: Mapping[str, Any], body: object) -> str:
    """What is wrong in a JSON text, with line and column."""
    at, reason = error["loc"][-1], str(error.get("ctx", {}).get("error", "it cannot be read"))
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(getattr(body, "doc", body))
    before = text[: at if isinstance(at, int) else 0]
    return f"{reason} in line {before.count(chr(10)) + 1} column {len(before) - before.rfind(chr(10))} (character {at})"


def _nowhere(request: Request) -> str:
    """The message for an unknown address, with the address that was probably meant."""
    path = request.url.path
    paths = sorted({route.path for route in request.app.routes if getattr(route, "methods", None) and "{" not in route.path})
    near = difflib.get_close_matches(path, [one for one in paths if one != path], 1, 0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"there is no {request.method} {path[:200]!r} here.{hint} This is OpenAI's interface: /v1/chat/completions ..."


def _explain(errors: Sequence[Mapping[str, Any]], body: object) -> tuple[str, str]:
    """pydantic's errors -> the path of the field that is wrong, and what must be there.

    If a field allows several types (a text, or a list of parts), the error deepest in the body is used.
    """
    paths = [_path(error["loc"], body, missing=error["type"] == "missing") for error in errors]
    deepest = max(range(len(errors)), key=lambda i: (paths[i].count(".") + paths[i].count("["), -i))
    field = paths[deepest]
    messages = dict.fromkeys(str(error["msg"]) for error, path in zip(errors, paths, strict=True) if path == field)
    return field, ", or: ".join(messages)


def _path(location: Sequence[int | str], body: object, missing: bool) -> str:
    """("body", "messages", 0, "content", "str") -> "messages[0].content": only the steps that exist in the body."""
    path, value = "", body
    for i, step in enumerate(location[1:], 1):
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(value, dict) and (step in value or (missing and i == len(location) - 1)):
            path, value = f"{path}.{step}" if path else str(step), value.get(step)
    return path or "body"
