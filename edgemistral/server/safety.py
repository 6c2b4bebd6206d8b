"""The checks of every request before an endpoint sees it. Without them, any web page in the browser and any program on this
computer could use the server.

    Host           only names of this computer, so that a page cannot reach us under its own name (DNS rebinding)
    Origin         only our own page and the allowed origins; the same for Sec-Fetch-Site, which all browsers send
    API key        if one is set, for everything except the page, its files, /docs and /health
    Content-Type   JSON: a page of another origin cannot send it without asking first (CORS)
    body           limited in size and in time
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from email.message import Message
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from edgemistral.server import failures

LOOPBACK = ("localhost", "127.0.0.1", "::1")
BODY_SECONDS = 60.0
OPEN_PATHS = ("/", "/health", "/docs", "/openapi.json")   # GET and HEAD need no API key
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
CORS_METHODS = "GET, POST, DELETE"
CORS_HEADERS = "authorization, content-type, x-request-id"
CORS_EXPOSED = "retry-after, warnings, x-request-id"


@dataclass(frozen=True)
class Safety:
    """What is allowed. hosts: names in addition to loopback; origins: as browsers send them; max_body: bytes."""

    api_key: str | None = None
    hosts: frozenset[str] = field(default_factory=frozenset)
    origins: frozenset[str] = field(default_factory=frozenset)
    max_body: int = 4 << 20

    @classmethod
    def checked(
        cls, api_key: str | None, hosts: Iterable[str], origins: Iterable[str], max_body: int
    ) -> Safety:
        """Raises ValueError for a key that a header cannot carry, and for an origin not of the form http://name:port."""
        if api_key is not None and not re.fullmatch("[!-~]+", api_key):
            raise ValueError("the API key must be visible ASCII characters without spaces")
        origins = list(origins)
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "null" and (not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
                raise ValueError(f"{origin!r} is not an origin such as https://app.example.com: scheme, name and port only")
        return cls(api_key, frozenset(map(_name_of, hosts)), frozenset(origin.lower() for origin in origins), max_body)


class Guard:
    """ASGI middleware that applies a `Safety`."""

    def __init__(self, app: ASGIApp, safety: Safety) -> None:
        self._app, self._safety = app, safety
        self._key = None if safety.api_key is None else _digest(safety.api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "").lower()
        foreign = origin if origin in self._safety.origins else ""

        async def send_safely(event: Event) -> None:
            if event["type"] == "http.response.start":
                answer = MutableHeaders(raw=event.setdefault("headers", []))
                for name, value in SECURITY_HEADERS.items():
                    answer.setdefault(name, value)
                answer.setdefault("cache-control", "no-store")
                if self._safety.origins:
                    answer.add_vary_header("origin")
                if foreign:
                    answer["access-control-allow-origin"] = foreign
                    answer["access-control-expose-headers"] = CORS_EXPOSED
            await send(event)

        refusal = self._refusal(scope, headers, origin)
        if refusal is None and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            refusal = _preflight(headers)   # only allowed origins get here
        if refusal is None:
            body = await _read_body(receive, headers, self._safety.max_body)
            if isinstance(body, Response):
                refusal = body
            elif body is None:
                return
            else:
                receive = _replay(body, receive)
        await (refusal or self._app)(scope, receive, send_safely)

    def _refusal(self, scope: Scope, headers: Headers, origin: str) -> Response | None:
        host = headers.get("host", "")
        if not self._host_allowed(_name_of(host), scope):
            return _refuse(403, f"the Host {host[:100]!r} is not allowed (--allow-host adds names)", "host_not_allowed")
        if origin and origin not in self._safety.origins and origin.partition("://")[2] != host.lower():
            return _refuse(403, f"the Origin {origin[:100]!r} is not allowed (--allow-origin adds origins)",
                           "origin_not_allowed")
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
        if not origin and site not in ("none", "same-origin") and not (mode == "navigate" and scope["method"] == "GET"):
            return _refuse(403, "a page of another origin may not request this", "origin_not_allowed")
        preflight = scope["method"] == "OPTIONS" and origin in self._safety.origins
        if self._key is not None and not preflight and not _is_open(scope) and not self._has_key(headers):
            return _refuse(401, "the API key is missing or wrong (Authorization: Bearer ... or X-API-Key)",
                           "invalid_api_key", {"www-authenticate": "Bearer"})
        if scope["method"] == "POST" and not _is_json(headers.get("content-type", "")):
            return _refuse(415, "the Content-Type must be application/json, in UTF-8", "unsupported_media_type")
        return None

    def _host_allowed(self, name: str, scope: Scope) -> bool:
        """Allowed are loopback names, the names in the settings, and the address that the client connected to."""
        if name in LOOPBACK or name in self._safety.hosts:
            return True
        server = (scope.get("server") or ("",))[0].removeprefix("::ffff:")      # IPv4 on a dual-stack socket
        try:
            return ipaddress.ip_address(name) == ipaddress.ip_address(server)
        except ValueError:
            return False

    def _has_key(self, headers: Headers) -> bool:
        """The key may come as OpenAI's clients send it, or as Anthropic's do."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        brought = [key.strip()] if scheme.lower() == "bearer" else []
        if "x-api-key" in headers:
            brought.append(headers["x-api-key"].strip())
        return self._key is not None and any(hmac.compare_digest(_digest(one), self._key) for one in brought)


def _digest(key: str) -> bytes:
    """One length for all keys, so that every comparison takes the same time."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _name_of(host: str) -> str:
    """The Host header without port and brackets, in lower case."""
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


def _is_open(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith("/page/"))


def _is_json(content_type: str) -> bool:
    message = Message()
    message["content-type"] = content_type
    charset = str(message.get_param("charset", "utf-8")).lower()
    return message.get_content_type() == "application/json" and bool(content_type) and charset in ("utf-8", "utf8")


def _refuse(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
    return failures.response(status, failures.body_of(message, code=code), headers)


def _preflight(headers: Headers) -> Response:
    allowed = {
        "access-control-allow-methods": CORS_METHODS,
        "access-control-allow-headers": _asked_headers(headers),
        "access-control-max-age": "600",
    }
    if headers.get("access-control-request-private-network") == "true":
        allowed["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=allowed)


def _asked_headers(headers: Headers) -> str:
    """The headers that a page of an allowed origin may send: ours, and any others that it asks for, which do no harm."""
    asked = [name.strip().lower() for name in headers.get("access-control-request-headers", "").split(",")]
    known = CORS_HEADERS.split(", ")
    return ", ".join(dict.fromkeys([*known, *(name for name in asked[:64] if re.fullmatch("[a-z0-9-]{1,64}", name))]))


async def _read_body(receive: Receive, headers: Headers, limit: int) -> bytes | Response | None:
    """The whole body, a refusal, or None if the client disconnected."""
    # The connection stays open: closing it while the client still sends could lose the refusal.
    refusal = _refuse(413, f"the body is larger than {limit} bytes", "body_too_large")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        return refusal

    async def read() -> bytes | Response | None:
        body, more = bytearray(), True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return None
            body += event.get("body", b"")
            more = event.get("more_body", False)
            if len(body) > limit:
                return refusal
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except (asyncio.TimeoutError, TimeoutError):
        return _refuse(408, "the body did not arrive in time", "timeout", {"connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first."""
    given = False

    async def replay() -> Event:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
