"""The OpenAI interface: /v1/chat/completions, /v1/completions, /v1/models, and the aborting of a request."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from starlette.responses import JSONResponse, Response

from edgemistral.errors import BadRequest
from edgemistral.generate.sampler import Grammar
from edgemistral.generate.tasks import PromptLogprobs, Usage
from edgemistral.model import Reply
from edgemistral.server import schemas, streaming
from edgemistral.server.answers import chat_logprobs, completion_logprobs, timings_body, usage_body
from edgemistral.server.constraints import Constraint, constraint_of
from edgemistral.server.failures import RESPONSES
from edgemistral.server.scheduler import Job
from edgemistral.server.service import Event, Finished, Piece, Service, Token, service_of, warnings_header
from edgemistral.server.tools import Tools, spelled_out, tools_of, with_arguments
from edgemistral.text.chat import chat_turns
from edgemistral.text.guardrail import with_guardrail

router = APIRouter(prefix="/v1", responses=RESPONSES)
Shared = Annotated[Service, Depends(service_of)]
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer, or with `stream` its pieces"}
}


@router.post("/chat/completions", response_model=schemas.ChatCompletion, responses=STREAMED)
async def chat_completions(body: schemas.ChatRequest, request: Request, service: Shared) -> Response:
    """Answer a conversation."""
    return await _respond(*await begin_chat(body, request, service))


async def begin_chat(
    body: schemas.ChatRequest, request: Request, service: Service, kind: str = "chatcmpl"
) -> tuple[Chat, AsyncGenerator[Event | None, None]]:
    """Queue a conversation -> the shape of its answer, and the answer's events. kind: the prefix of the id.

    A refusal is raised here, before the response begins, so that its status can say so.
    """
    job = service.job(request, kind, body.user)
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs is not None and top_logprobs is None:
        raise BadRequest("top_logprobs needs logprobs", "top_logprobs")
    _check_logprobs(service, top_logprobs)
    tools = tools_of(body.model_dump(include={"tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"}))
    constraint = _constraint(body)
    if tools is not None and tools.forced:
        if constraint is not None:
            raise BadRequest(f"{constraint.field} and a forced tool exclude each other", constraint.field)
        constraint = tools.constraint()
    elif constraint is not None and constraint.kind == "json":
        tools = None                 # a JSON answer is not parsed for calls
    messages = await service.review("prompt", [message.plain() for message in body.messages])
    chosen = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"

    shape = Chat(service, body, job, tools)

    def make() -> list[Reply]:
        with _renamed({"max_new_tokens": field}):
            model = service.model
            native = model.tokenizer.chat.takes_tools
            shown = with_arguments(messages) if native else spelled_out(messages, tools)
            if not native:
                chat_turns(spelled_out(messages, None))   # checked before the guardrail, which shifts the message numbers
            continues = messages[-1]["role"] == "assistant" and bool(messages[-1]["content"])
            sent = with_guardrail(shown) if body.safe_prompt else shown
            replies = [model.chat(
                sent, chosen,
                progress=job.progress, cancel=job.cancelled, top_logprobs=top_logprobs,
                session=service.session(body.session if number == 0 else None), on_overflow=body.on_overflow,
                tools=tools.tools if tools is not None and native else None,
                grammar=_grammar(service, constraint, continues), **sampling,
            ) for number, sampling in enumerate(_each(body))]
            for reply in replies:                                # the client's message numbers, without the texts we put first
                before = len(sent) - len(messages)
                reply.usage.dropped_messages = tuple(number - before for number in reply.dropped)
            shape.replies = replies
            return replies

    return shape, await streaming.begun(service.events(request, job, make))


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

    constraint = _constraint(body)

    def make() -> list[Reply]:
        with _renamed({"max_new_tokens": "max_tokens", "ids": "prompt", "text": "prompt"}):
            grammar = _grammar(service, constraint, continues=True)
            return [model.complete(
                prompt, body.max_tokens, progress=job.progress, cancel=job.cancelled,
                top_logprobs=body.logprobs, grammar=grammar, **sampling,
            ) for prompt, _ in prompts for sampling in _each(body)]

    echoes = [text if body.echo else "" for _, text in prompts for _ in range(body.n or 1)]
    shape = _Completion(service, body, job, echoes)
    if body.echo and body.logprobs is not None:
        shape.prompts = await _scored(service, request, body, [prompt for prompt, _ in prompts])
    return await _respond(shape, await streaming.begun(service.events(request, job, make)))


@router.get("/models")
async def models(service: Shared) -> schemas.ModelList:
    """The one model that is served."""
    return schemas.ModelList(data=[_card(service)])


@router.get("/models/{model}")
async def model(model: str, service: Shared) -> schemas.ModelCard:
    """Facts about the model."""
    card = _card(service)
    if model != card.id:
        raise HTTPException(404, f"there is no model {model[:100]!r}: it is {card.id!r}")
    return card


@router.delete("/requests/{request_id}")
async def cancel(request_id: str, service: Shared) -> schemas.Cancellation:
    """Abort a request by the id of its response."""
    if not service.scheduler.cancel(request_id):
        raise HTTPException(404, f"there is no active request {request_id[:100]!r}")
    return schemas.Cancellation(id=request_id)


class Chat:
    """How an answer looks to a client of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, body: schemas.ChatRequest, job: Job, tools: Tools | None) -> None:
        self.service, self.body, self.job, self.logprobs = service, body, job, bool(body.logprobs)
        self.choices, self.tools = body.n or 1, tools
        self.replies: list[Reply] = []      # once they are queued
        self._filters = [tools.filter() for _ in range(self.choices)] if tools is not None else []

    def opening(self) -> list[dict[str, Any]]:
        return [{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
                for index in range(self.choices)]

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        text = self._filters[piece.index].push(piece.text) if self._filters else piece.text
        if not text and not (self.logprobs and piece.tokens):
            return []
        return [self._delta(piece.index, {"content": text}, self._logprobs(piece.tokens))]

    def ends(self, index: int, finish_reason: str) -> list[dict[str, Any]]:
        rest, calls = self._filters[index].end() if self._filters else ("", [])
        parts = []
        if calls and self.tools is not None and self.tools.legacy:
            parts.append(self._delta(index, {"function_call": calls[0]["function"]}))
        elif calls:
            parts.append(self._delta(index, {"tool_calls": [{"index": n, **call} for n, call in enumerate(calls)]}))
        elif rest:
            parts.append(self._delta(index, {"content": rest}))
        last = self._delta(index, {})
        return [*parts, {**last, "finish_reason": self._reason(calls, finish_reason)}]

    def whole(self, index: int, text: str, tokens: tuple[Token, ...], finish_reason: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        calls: list[dict[str, Any]] = []
        if self._filters:
            shown = self._filters[index].push(text)
            rest, calls = self._filters[index].end()
            message["content"] = (shown or None) if calls else shown + rest
        if calls and self.tools is not None and self.tools.legacy:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens),
                "finish_reason": self._reason(calls, finish_reason)}

    def _reason(self, calls: list[dict[str, Any]], finish_reason: str) -> str:
        if not calls or self.tools is None:
            return finish_reason
        return "function_call" if self.tools.legacy else "tool_calls"

    @staticmethod
    def _delta(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: tuple[Token, ...]) -> dict[str, Any] | None:
        return chat_logprobs(self.service.model.tokenizer, tokens) if self.logprobs else None


class _Completion:
    """How answers look to a client of /v1/completions."""

    kind = chunk_kind = "text_completion"

    def __init__(self, service: Service, body: schemas.CompletionRequest, job: Job, echoes: list[str]) -> None:
        self.service, self.body, self.job, self.echoes = service, body, job, echoes
        self.choices, self.logprobs = len(echoes), body.logprobs is not None
        self.prompts: list[dict[str, Any]] = []      # log probabilities of the prompts, if they are echoed

    def opening(self) -> list[dict[str, Any]]:
        return [{**self._choice(index, text, (), None), **({"logprobs": self.prompts[index]} if self.prompts else {})}
                for index, text in enumerate(self.echoes) if text]

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        return [self._choice(piece.index, piece.text, piece.tokens, None)]

    def ends(self, index: int, finish_reason: str) -> list[dict[str, Any]]:
        return [self._choice(index, "", (), finish_reason)]

    def whole(self, index: int, text: str, tokens: tuple[Token, ...], finish_reason: str) -> dict[str, Any]:
        choice = self._choice(index, self.echoes[index] + text, tokens, finish_reason)
        if self.prompts:
            choice["logprobs"] = {name: [*values, *choice["logprobs"][name]] for name, values in self.prompts[index].items()}
        return choice

    def _choice(self, index: int, text: str, tokens: tuple[Token, ...], finish_reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self.logprobs and (tokens or finish_reason):
            logprobs = completion_logprobs(self.service.model.tokenizer, tokens, len(self.echoes[index]))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


async def _respond(shape: Chat | _Completion, events: AsyncGenerator[Event | None, None]) -> Response:
    """Stream the answers or wait for them, as the request asks."""
    headers = {"x-request-id": shape.job.echoed, **warnings_header(shape.body.warnings())}
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
    ends.sort(key=lambda end: end.index)
    choices = [shape.whole(end.index, texts[end.index], tokens[end.index], end.finish_reason) for end in ends]
    counts = _counts(ends, shape.body.n or 1)
    return JSONResponse({**common, "object": shape.kind, "choices": choices, **counts}, headers=headers)


async def _chunks(
    shape: Chat | _Completion, events: AsyncGenerator[Event | None, None], common: Mapping[str, Any]
) -> AsyncGenerator[bytes, None]:
    """The stream: comments while the prompt is read, chunks with text, and a last chunk with the finish reason."""
    def chunk(*choices: dict[str, Any], **more: Any) -> bytes:
        return streaming.data({**common, "choices": choices, **more})

    ends = []
    async with aclosing(events):
        for choice in shape.opening():
            yield chunk(choice)
        async for event in events:
            if isinstance(event, Piece):
                for choice in shape.deltas(event):
                    yield chunk(choice)
            elif isinstance(event, Finished):
                ends.append(event)
                for choice in shape.ends(event.index, event.finish_reason):
                    yield chunk(choice)
            else:
                yield streaming.comment(event)
    if shape.body.include_usage:
        yield chunk(**_counts(ends, shape.body.n or 1))
    yield streaming.DONE


def _counts(ends: list[Finished], answers: int) -> dict[str, Any]:
    usages: list[Usage] = [end.usage for end in sorted(ends, key=lambda end: end.index)]
    return {"usage": usage_body(usages, answers), "timings": timings_body(usages)}


def _card(service: Service) -> schemas.ModelCard:
    return schemas.ModelCard(id=service.name, created=service.started, max_model_len=service.model.context)


def _decoded(service: Service, ids: list[int]) -> str:
    with _renamed({"ids": "prompt"}):
        return service.model.tokenizer.decode(ids)


def _constraint(body: schemas.Sampling) -> Constraint | None:
    """The constraint that the request puts on its answer."""
    return constraint_of({
        name: getattr(body, name) for name in (
            "response_format", "structured_outputs", "format", "json_schema", "guided_json", "guided_regex", "guided_choice",
            "guided_grammar", "grammar",
        )
    })


def _grammar(service: Service, constraint: Constraint | None, continues: bool) -> Grammar | None:
    """The compiled grammar of a constraint."""
    if constraint is None:
        return None
    with _renamed({"grammar": constraint.field}):
        compiler = service.compiler()
        return (compiler.json_schema if constraint.kind == "json" else compiler.text)(constraint.value, continues)


def _each(body: schemas.Sampling) -> list[dict[str, Any]]:
    """The sampling arguments of each answer of the request. If it gives a seed, each answer gets a different one."""
    options = body.sampling()
    seed = options.get("seed")
    return [{**options, **({} if seed is None else {"seed": (seed + n) % (1 << 63)})} for n in range(body.n or 1)]


async def _scored(
    service: Service, request: Request, body: schemas.CompletionRequest, prompts: Sequence[str | list[int]]
) -> list[dict[str, Any]]:
    """The `logprobs` of each choice's prompt; its first token has none. Waits for the client's turn."""
    tokenizer = service.model.tokenizer
    tasks: list[PromptLogprobs] = []

    def make() -> list[PromptLogprobs]:
        with _renamed({"ids": "prompt", "text": "prompt"}):
            for prompt in prompts:
                begun = [*service.model.begin(), *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
                tasks.append(service.model.engine.score(begun, body.logprobs or 0))
        return tasks

    def shown(prompt: str | list[int], task: PromptLogprobs) -> dict[str, Any]:
        skipped = len(service.model.begin()) if isinstance(prompt, str) else 0
        tokens, start = [], 0
        for token_id, logprobs in list(zip(task.history.tolist(), task.logprobs, strict=True))[skipped:]:
            tokens.append(Token(token_id, start, logprobs))
            start += len(tokenizer.surface(token_id))
        return completion_logprobs(tokenizer, tokens, 0)

    await service.compute(request, service.job(request, "scores", body.user), make)
    made = [await service.aside(shown, *one) for one in zip(prompts, tasks, strict=True)]
    return [one for one in made for _ in range(body.n or 1)]


def _check_logprobs(service: Service, top_logprobs: int | None) -> None:
    if top_logprobs is not None and service.reviewed:
        raise BadRequest("logprobs are not supported here: they would show the text before its review", "logprobs")


@contextmanager
def _renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let a BadRequest name the field as the request does."""
    try:
        yield
    except BadRequest as error:
        if error.field not in names:
            raise
        raise BadRequest(str(error).replace(error.field, names[error.field], 1), names[error.field]) from None
