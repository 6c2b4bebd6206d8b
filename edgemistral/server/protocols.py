"""Shared by the routers of other interfaces. Each translates a request into our chat's, and our events into its own format.

A field that is neither translated nor known to be harmless is refused by name.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from edgemistral.errors import BadRequest
from edgemistral.generate.tasks import Usage
from edgemistral.server import schemas
from edgemistral.server.openai_api import Chat
from edgemistral.server.scheduler import Progress
from edgemistral.server.service import Event, Finished, Piece

# Our own fields: the same name in every interface.
OURS = (
    "seed", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens",
    "stop_token_ids", "grammar", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "session", "on_overflow",
    "safe_prompt", "user",
)


@dataclass(frozen=True)
class End:
    """The answer is complete; reason: "stop", "length", "content_filter" or "tool_calls"."""

    reason: str
    usage: Usage
    stop: str | None = None     # the stop string that ended it


@dataclass
class Whole:
    """An answer: its text, its calls in OpenAI's shape, and its end."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    end: End = field(default_factory=lambda: End("stop", Usage(0)))


def chat_request(made: Mapping[str, Any]) -> schemas.ChatRequest:
    """The checked request for our chat."""
    body = {name: value for name, value in made.items() if value is not None}
    try:
        return schemas.ChatRequest.model_validate(body)
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(found, body=body) from None


def only(value: Any, known: Collection[str], harmless: Collection[str] = (), where: str = "") -> dict[str, Any]:
    """The fields of an object that are given and known. BadRequest: not an object, or it has a field that is not supported."""
    given = as_object(value, where or "body")
    prefix = f"{where}." if where else ""
    for name, one in given.items():
        if one is not None and name not in known and name not in harmless:
            raise BadRequest(f"{prefix}{name[:100]} is not supported", prefix + name[:100])
    return {name: one for name, one in given.items() if one is not None and name in known}


def refused(given: Mapping[str, Any], **neutral: tuple[Any, ...]) -> None:
    """BadRequest if one of these fields has a value other than its neutral ones, given as name=(values)."""
    for name, values in neutral.items():
        value = given.get(name)
        if value is not None and not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
            raise BadRequest(f"{name} is {str(value)[:60]!r}: this server does not support it", name)


def as_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{where} must be an object", where)
    return value


def as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRequest(f"{where} must be a list", where)
    if len(value) > schemas.MAX_MESSAGES:
        raise BadRequest(f"{where} has more than {schemas.MAX_MESSAGES} items", where)
    return value


def as_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{where} must be a text", where)
    return value


def text_of(
    value: Any, where: str, kinds: Collection[str] = ("text",), harmless: Collection[str] = (), between: str = "\n\n"
) -> str:
    """A text, or the texts of a list of parts joined by `between`."""
    if isinstance(value, str):
        return value
    texts = []
    for i, part in enumerate(as_list(value, where)):
        at = f"{where}[{i}]"
        kind = as_object(part, at).get("type")
        if kind not in kinds:
            raise BadRequest(f"{at}.type is {str(kind)[:40]!r}: only {' and '.join(kinds)} can be read here", f"{at}.type")
        texts.append(as_text(only(part, ("type", "text"), harmless, at).get("text"), f"{at}.text"))
    return between.join(texts)


def function(name: Any, description: Any, parameters: Any) -> dict[str, Any]:
    """A tool in OpenAI's shape."""
    made = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {key: value for key, value in made.items() if value is not None}}


async def parts(
    shape: Chat, events: AsyncGenerator[Event | None, None]
) -> AsyncGenerator[str | list[dict[str, Any]] | End | Progress | None, None]:
    """The answer as it comes: texts, at most one list of calls, the end. In between: progress, or None as a sign of life."""
    called = False
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Piece):
                for choice in shape.deltas(event):
                    yield choice["delta"]["content"]
            elif isinstance(event, Finished):
                for choice in shape.ends(event.index, event.finish_reason):
                    if calls := choice["delta"].get("tool_calls"):
                        called = True
                        yield calls[:1] if shape.body.parallel_tool_calls is False else calls
                    elif text := choice["delta"].get("content"):
                        yield text
                cut = event.finish_reason != "stop"
                reason = event.finish_reason if cut or not called else "tool_calls"
                yield End(reason, event.usage, shape.replies[event.index].stop_string)
            else:
                yield event


async def whole(shape: Chat, events: AsyncGenerator[Event | None, None]) -> Whole:
    """Wait for the whole answer."""
    answer = Whole()
    async for part in parts(shape, events):
        if isinstance(part, str):
            answer.text += part
        elif isinstance(part, list):
            answer.calls = part
        elif isinstance(part, End):
            answer.end = part
    if answer.calls:
        answer.text = answer.text.strip()
    return answer
