"""Failures in the shape that the clients of an interface expect. The address of the request selects the shape."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANTHROPIC, OLLAMA = ("/v1/messages", "/messages"), ("/api",)
KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}


def anthropic(status: int, error: dict[str, Any]) -> dict[str, Any]:
    """The `error` of ours (failures.py) as Anthropic's clients expect it."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error["message"]}}


def ollama(status: int, error: dict[str, Any]) -> dict[str, Any]:
    """The `error` of ours as Ollama's clients expect it."""
    return {"error": error["message"]}


class Shapes:
    """ASGI middleware that gives the failures of these addresses their shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        shape = None
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            shape = next((shape for shape, starts in ((anthropic, ANTHROPIC), (ollama, OLLAMA))
                          if any(path == start or path.startswith(f"{start}/") for start in starts)), None)
        if shape is None:
            await self._app(scope, receive, send)
            return
        begun: Message | None = None
        body = b""

        async def shaped(message: Message) -> None:
            nonlocal begun, body
            failed = message["type"] == "http.response.start" and message["status"] >= 400
            if failed and Headers(raw=message["headers"]).get("content-type") == "application/json":
                begun = message
                return
            if begun is None or message["type"] != "http.response.body":
                await send(message)
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            if body:                      # HEAD has none
                body = json.dumps(shape(begun["status"], json.loads(body)["error"])).encode()
                MutableHeaders(raw=begun["headers"])["content-length"] = str(len(body))
            await send(begun)
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, shaped)
