"""The HTTP interface as an ASGI application, to be run by `edgemistral serve` or inside a host application."""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgemistral import __version__
from edgemistral.errors import BadRequest
from edgemistral.model import Model
from edgemistral.server import anthropic_api, failures, ollama_api, openai_api, responses_api, schemas, score
from edgemistral.server.docs import docs_page
from edgemistral.server.metrics import Metrics
from edgemistral.server.safety import Guard, Safety
from edgemistral.server.service import Review, Service, service_of
from edgemistral.server.shapes import Shapes
from edgemistral.server.tools import spelled_out, with_arguments

PAGE = Path(__file__).with_name("page")
# Nothing from other hosts, no inline code, and no HTML made from strings (Trusted Types).
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
METHODS = ("GET", "POST", "DELETE", "OPTIONS", "HEAD")
Shared = Annotated[Service, Depends(service_of)]


def create_app(
    model: Model | Callable[[], Model],
    *,
    api_key: str | None = None,
    allow_hosts: Iterable[str] = (),
    allow_origins: Iterable[str] = (),
    queue: int = 128,
    parallel: int = 4,
    max_body: int = 4 << 20,
    session_dir: Path | None = None,
    review: Review | None = None,
    on_load: Callable[[], None] = lambda: None,
    on_failed_load: Callable[[BaseException], None] = lambda error: None,
) -> FastAPI:
    """The application for one model. The caller closes the model.

    model: a loaded model, or a function that loads it. The function is called on a thread when the application starts;
    until it returns, /health says "loading" and other routes answer 503. on_load: called on that thread once requests
    are answered. on_failed_load: called there if loading raises.
    api_key: required for every request except the page, /docs, /openapi.json and /health. allow_hosts: Host names allowed
    in addition to those of this computer. allow_origins: origins whose pages may call this, such as "https://app.example.com".
    queue: requests that may wait. parallel: answers written at the same time. max_body: bytes of a request.
    session_dir: the folder that keeps the conversations of requests with a session.
    review: called (on a thread, or awaited if it is a coroutine function) as review("prompt", messages or text) and
    review("answer", text). It returns the value to use instead, or raises `Refused`. With it, an answer is streamed as
    one piece.

    The application runs in any event loop; a separate thread computes. If another application mounts this one, its
    lifespan does not run: give it a loaded model, and call `app.state.service.close()` at the end.
    Raises ValueError for invalid settings.
    """
    if queue < 1 or max_body < 1 or parallel < 1:
        raise ValueError(f"a queue of {queue}, {parallel} answers at once, bodies of {max_body} bytes: all must be at least 1")
    service = Service(None if callable(model) else model, queue, review, parallel, session_dir)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if callable(model):
            service.load(model, on_load, on_failed_load)
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="edgemistral", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="A Mistral model on this computer. Requests have a JSON body; with an API key they carry "
        "`Authorization: Bearer KEY`.",
    )
    app.state.service = service
    failures.install(app)
    app.add_middleware(_Addresses)
    app.add_middleware(Guard, safety=Safety.checked(api_key, allow_hosts, allow_origins, max_body))
    app.add_middleware(Shapes)
    app.add_middleware(_Count, metrics=service.metrics)   # the outermost
    app.include_router(score.router)
    app.include_router(openai_api.router)
    app.include_router(anthropic_api.router)
    app.include_router(ollama_api.router)
    app.include_router(responses_api.router)
    _add_tools(app)
    _add_pages(app)
    return app


def _add_tools(app: FastAPI) -> None:
    """The small endpoints."""
    @app.post("/tokenize", responses=failures.RESPONSES)
    async def tokenize(body: schemas.TokenizeRequest, service: Shared) -> schemas.Tokens:
        """Token ids of a text, or of a conversation as the model reads it."""
        if (body.text is None) == (body.messages is None):
            raise BadRequest("text or messages must be given, and not both", "text")
        tokenizer, text, messages = service.model.tokenizer, body.text, body.messages or []
        if text is not None:
            ids = await service.aside(tokenizer.encode, text)
        else:
            plain = [message.plain() for message in messages]
            shown = with_arguments(plain) if tokenizer.chat.takes_tools else spelled_out(plain, None)
            ids = await service.aside(tokenizer.encode_chat, shown)
        return schemas.Tokens(tokens=ids, count=len(ids))

    @app.post("/detokenize", responses=failures.RESPONSES)
    async def detokenize(body: schemas.DetokenizeRequest, service: Shared) -> schemas.PlainText:
        """The text of token ids."""
        try:
            return schemas.PlainText(text=await service.aside(service.model.tokenizer.decode, body.tokens))
        except BadRequest as error:
            raise BadRequest(str(error), "tokens") from None

    @app.get("/health", response_model=schemas.Health, responses={503: {"model": schemas.Health}})
    async def health(service: Shared) -> Response:
        """Whether the model is loaded: 200, or 503 while it is not."""
        body = {"status": "ok" if service.ready else "loading", "model": service.name}
        return JSONResponse(body, 200 if service.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse, responses=failures.RESPONSES)
    async def metrics(service: Shared) -> Response:
        """Counts and times in the Prometheus text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_pages(app: FastAPI) -> None:
    """What a browser shows."""
    headers = {"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"}
    chat = (PAGE / "index.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(chat, headers=headers)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi()), headers=headers)

    mimetypes.add_type("text/javascript", ".js")   # a Windows registry may say text/plain, which no browser would run
    app.mount("/page", StaticFiles(directory=PAGE))


class _Addresses:
    """ASGI middleware that accepts other spellings of an address: without /v1, or with a slash at the end. It also answers
    HEAD as GET without a body."""

    SHORT = ("/chat/completions", "/completions", "/models", "/responses", "/messages", "/embeddings")

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        root = scope.get("root_path", "")
        path = scope["path"].removeprefix(root)
        meant = path.rstrip("/") or "/"
        if any(meant == short or meant.startswith(f"{short}/") for short in self.SHORT):
            meant = f"/v1{meant}"
        if meant != path and not path.startswith("/page"):
            scope = {**scope, "path": root + meant, "raw_path": (root + meant).encode()}
        if scope["method"] == "HEAD":
            async def without_body(message: Message) -> None:
                await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

            await self._app({**scope, "method": "GET"}, receive, without_body)
            return
        await self._app(scope, receive, send)


class _Count:
    """ASGI middleware that counts requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Not the raw path and method: a client could send any number of different ones.
                path: Any = getattr(scope.get("route"), "path", None) or "other"
                method = scope["method"] if scope["method"] in METHODS else "other"
                self._metrics.requests.labels(method, path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
