"""Answers as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgemistral.server import failures
from edgemistral.server.scheduler import Progress
from edgemistral.server.service import Event


def data(value: Any) -> bytes:
    """One event with a JSON value."""
    return f"data: {json.dumps(value)}\n\n".encode("ascii")   # some clients treat U+2028 as the end of a line


def named(kind: str, **fields: Any) -> bytes:
    """One event with its kind, as in Anthropic's interface and OpenAI's newer one."""
    return f"event: {kind}\n".encode() + data({"type": kind, **fields})


def line(value: Any) -> bytes:
    """One line of JSON, as in Ollama's interface."""
    return json.dumps(value).encode() + b"\n"


def comment(event: Progress | None) -> bytes:
    """A comment, which clients skip: a sign of life, or the prompt's progress. No empty line: some take it for an event."""
    return b": waiting\n" if event is None else f": prompt {event.done}/{event.total}\n".encode()


DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends the chunks as they come. A failure is sent as an event, because the headers are already sent."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(headers={**headers, "x-accel-buffering": "no"})     # a proxy must not collect events
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def body(chunk: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

        async with aclosing(self._chunks) as chunks:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for chunk in chunks:
                    await body(chunk)
            except Exception as error:
                await body(data(failures.describe(error)[1]))
        await body(b"", more=False)


async def begun(events: AsyncGenerator[Event | None, None]) -> AsyncGenerator[Event | None, None]:
    """Wait for the first event. A refusal is raised here, before the response begins, so that its status can say so."""
    await anext(events)
    return events
