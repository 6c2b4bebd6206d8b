"""The OpenAI interface: /v1/chat/completions, /v1/completions, /v1/models, and the aborting of a request."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from starlette.responses import JSONResponse, Response

from edgemistral.errors import BadRequest
from edgemistral.generate.sampler import Grammar
from edgemistral.generate.tasks import Usage
from edgemistral.model import Reply
from edgemistral.server import schemas, streaming
from edgemistral.server.answers import chat_logprobs, completion_logprobs, timings_body, usage_body
from edgemistral.server.failures import RESPONSES
from edgemistral.server.scheduler import Job
from edgemistral.server.service import Event, Finished, Piece, Service, Token, service_of, warnings_header
from edgemistral.text.chat import chat_turns
from edgemistral.text.guardrail import with_guardrail

router = APIRouter(prefix="/v1", responses=RESPONSES)
Shared = Annotated[Service, Depends(service_of)]
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer, or with `stream` its pieces"}
}
ANY_OBJECT = {"type": "object"}


@router.post("/chat/completions", response_model=schemas.ChatCompletion, responses=STREAMED)
async def chat_completions(body: schemas.ChatRequest, request: Request, service: Shared) -> Response:
    """Answer a conversation."""
    job = service.job(request, "chatcmpl", body.user)
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs is not None and top_logprobs is None:
        raise BadRequest("top_logprobs needs logprobs", "top_logprobs")
    _check_logprobs(service, top_logprobs)
    messages = await service.review("prompt", [message.plain() for message in body.messages])
    chosen = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"

    def make() -> list[Reply]:
        with _renamed({"max_new_tokens": field}):
            chat_turns(messages)   # before the guardrail, which would shift the numbers of messages
            return [service.model.chat(
                with_guardrail(messages) if body.safe_prompt else messages, chosen,
                progress=job.progress, cancel=job.cancelled, top_logprobs=top_logprobs,
                session=service.session(body.session), on_overflow=body.on_overflow,
                grammar=_grammar(service, body, continues=messages[-1]["role"] == "assistant"), **body.sampling(),
            )]

    return await _respond(_Chat(service, body, job), await streaming.begun(service.events(request, job, make)))


@router.post("/completions", response_model=schemas.Completion, responses=STREAMED)
async def completions(body: schemas.CompletionRequest, request: Request, service: Shared) -> Response:
    """Continue raw texts or token ids, without the chat template."""
    job = service.job(request, "cmpl", body.user)
    _check_logprobs(service, body.logprobs)
    model, prompts = service.model, []
    for prompt in body.prompts():
        text = prompt if isinstance(prompt, str) else ""
        if not isinstance(prompt, str) and (body.echo or service.reviewed):
            text = await service.aside(_decoded, service, prompt)
        reviewed = await service.review("prompt", text)
        prompts.append((prompt if reviewed == text else reviewed, reviewed))

    def make() -> list[Reply]:
        with _renamed({"max_new_tokens": "max_tokens", "ids": "prompt", "text": "prompt"}):
            grammar = _grammar(service, body, continues=True)
            return [model.complete(
                prompt, body.max_tokens, progress=job.progress, cancel=job.cancelled,
                top_logprobs=body.logprobs, grammar=grammar, **body.sampling(),
            ) for prompt, _ in prompts]

    echoes = [text if body.echo else "" for _, text in prompts]
    return await _respond(_Completion(service, body, job, echoes), await streaming.begun(service.events(request, job, make)))


@router.get("/models")
async def models(service: Shared) -> schemas.ModelList:
    """The one model that is served."""
    return schemas.ModelList(data=[_card(service)])


@router.get("/models/{model}")
async def model(model: str, service: Shared) -> schemas.ModelCard:
    """What is known of the model."""
    card = _card(service)
    if model != card.id:
        raise HTTPException(404, f"there is no model {model[:100]!r}: it is {card.id!r}")
    return card


@router.delete("/requests/{request_id}")
async def cancel(request_id: str, service: Shared) -> schemas.Cancellation:
    """Abort a request: the id of its response, or the X-Request-Id that it was sent with."""
    if not service.scheduler.cancel(request_id):
        raise HTTPException(404, f"no request {request_id[:100]!r} is under way")
    return schemas.Cancellation(id=request_id)


class _Chat:
    """How an answer looks to a client of /v1/chat/completions."""

    kind, chunk_kind, choices = "chat.completion", "chat.completion.chunk", 1

    def __init__(self, service: Service, body: schemas.ChatRequest, job: Job) -> None:
        self.service, self.body, self.job, self.logprobs = service, body, job, bool(body.logprobs)

    def opening(self) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]

    def delta(self, piece: Piece) -> dict[str, Any]:
        return {"index": 0, "delta": {"content": piece.text}, "logprobs": self._logprobs(piece.tokens),
                "finish_reason": None}

    def end(self, index: int, finish_reason: str) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish_reason}

    def whole(self, index: int, text: str, tokens: tuple[Token, ...], finish_reason: str) -> dict[str, Any]:
        return {"index": index, "message": {"role": "assistant", "content": text},
                "logprobs": self._logprobs(tokens), "finish_reason": finish_reason}

    def _logprobs(self, tokens: tuple[Token, ...]) -> dict[str, Any] | None:
        return chat_logprobs(self.service.model.tokenizer, tokens) if self.logprobs else None


class _Completion:
    """How answers look to a client of /v1/completions."""

    kind = chunk_kind = "text_completion"

    def __init__(self, service: Service, body: schemas.CompletionRequest, job: Job, echoes: list[str]) -> None:
        self.service, self.body, self.job, self.echoes = service, body, job, echoes
        self.choices, self.logprobs = len(echoes), body.logprobs is not None

    def opening(self) -> list[dict[str, Any]]:
        return [self._choice(index, text, (), None) for index, text in enumerate(self.echoes) if text]

    def delta(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece.index, piece.text, piece.tokens, None)

    def end(self, index: int, finish_reason: str) -> dict[str, Any]:
        return self._choice(index, "", (), finish_reason)

    def whole(self, index: int, text: str, tokens: tuple[Token, ...], finish_reason: str) -> dict[str, Any]:
        return self._choice(index, self.echoes[index] + text, tokens, finish_reason)

    def _choice(self, index: int, text: str, tokens: tuple[Token, ...], finish_reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self.logprobs and (tokens or finish_reason):
            logprobs = completion_logprobs(self.service.model.tokenizer, tokens, len(self.echoes[index]))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


async def _respond(shape: _Chat | _Completion, events: AsyncGenerator[Event | None, None]) -> Response:
    """Stream the answers or wait for them, as the request asks."""
    headers = {"x-request-id": shape.job.id, **warnings_header(shape.body.warnings())}
    common = {"id": shape.job.id, "created": int(time.time()), "model": shape.service.name}
    if shape.body.stream:
        return streaming.EventStream(_chunks(shape, events, {**common, "object": shape.chunk_kind}), headers)
    texts, tokens = [""] * shape.choices, [()] * shape.choices   # type: list[str], list[tuple[Token, ...]]
    ends: list[Finished] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Piece):
                texts[event.index] += event.text
                tokens[event.index] += event.tokens
            elif isinstance(event, Finished):
                ends.append(event)
    choices = [shape.whole(end.index, texts[end.index], tokens[end.index], end.finish_reason) for end in ends]
    return JSONResponse({**common, "object": shape.kind, "choices": choices, **_counts(ends)}, headers=headers)


async def _chunks(
    shape: _Chat | _Completion, events: AsyncGenerator[Event | None, None], common: Mapping[str, Any]
) -> AsyncGenerator[bytes, None]:
    """The stream: comments while the prompt is read, chunks with text, one with the reason of the end."""
    def chunk(*choices: dict[str, Any], **more: Any) -> bytes:
        return streaming.data({**common, "choices": choices, **more})

    ends = []
    async with aclosing(events):
        for choice in shape.opening():
            yield chunk(choice)
        async for event in events:
            if isinstance(event, Piece):
                yield chunk(shape.delta(event))
            elif isinstance(event, Finished):
                ends.append(event)
                yield chunk(shape.end(event.index, event.finish_reason))
            else:
                yield streaming.comment(event)
    if shape.body.include_usage:
        yield chunk(**_counts(ends))
    yield streaming.DONE


def _counts(ends: list[Finished]) -> dict[str, Any]:
    usages: list[Usage] = [end.usage for end in ends]
    return {"usage": usage_body(usages), "timings": timings_body(usages)}


def _card(service: Service) -> schemas.ModelCard:
    return schemas.ModelCard(id=service.name, created=service.started, max_model_len=service.model.context)


def _decoded(service: Service, ids: list[int]) -> str:
    with _renamed({"ids": "prompt"}):
        return service.model.tokenizer.decode(ids)


def _grammar(service: Service, body: schemas.Sampling, continues: bool) -> Grammar | None:
    """The grammar that a request asks for in one of three ways."""
    wanted = body.response_format if isinstance(body, schemas.ChatRequest) else None
    if isinstance(wanted, (schemas.JsonObjectFormat, schemas.JsonSchemaFormat)):
        if body.grammar is not None:
            raise BadRequest("grammar and response_format exclude each other", "grammar")
        schema = ANY_OBJECT if isinstance(wanted, schemas.JsonObjectFormat) else wanted.json_schema.json_schema
        with _renamed({"grammar": "response_format.json_schema.schema"}):
            return service.compiler().json_schema(schema, continues)
    return None if body.grammar is None else service.compiler().text(body.grammar, continues)


def _check_logprobs(service: Service, top_logprobs: int | None) -> None:
    if top_logprobs is not None and service.reviewed:
        raise BadRequest("logprobs are not given here: they would show the text before its review", "logprobs")


@contextmanager
def _renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let a BadRequest name the field as the request does."""
    try:
        yield
    except BadRequest as error:
        if error.field not in names:
            raise
        raise BadRequest(str(error).replace(error.field, names[error.field], 1), names[error.field]) from None
