"""The model card's sample JSON: `POST /score`, and `POST /` as well."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from pydantic import WithJsonSchema
from starlette.responses import JSONResponse, Response

from edgemistral import sample_json
from edgemistral.errors import BadRequest
from edgemistral.generate.sampler import RANGES
from edgemistral.server import streaming
from edgemistral.server.failures import RESPONSES
from edgemistral.server.schemas import MAX_MESSAGES, MAX_PROMPTS, MAX_SEED, MAX_STOP, MAX_STOPS
from edgemistral.server.service import Finished, Piece, Refused, Service, service_of, warnings_header

router = APIRouter(responses=RESPONSES)
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
MESSAGE = {
    "type": "object", "required": ["role", "content"],
    "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}},
}
CONVERSATION = {"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": MESSAGE}
STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP}
SampleJson = Annotated[Any, WithJsonSchema({
    "title": "SampleRequest",
    "type": "object",
    "required": ["input_data"],
    "properties": {"input_data": {
        "type": "object",
        "required": ["input_string"],
        "properties": {
            "input_string": {"anyOf": [
                CONVERSATION,
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string"}},
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": CONVERSATION},
            ]},
            "parameters": {"type": "object", "properties": {
                **{name: {"type": "number", "minimum": RANGES[name][0], "maximum": RANGES[name][1]} for name in NUMBERS},
                "top_k": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
                "seed": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": MAX_SEED}, {"type": "null"}]},
                "max_new_tokens": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
                "stop": {"anyOf": [STOP, {"type": "array", "maxItems": MAX_STOPS, "items": STOP}]},
                **{name: {"type": "boolean"} for name in ("do_sample", "return_full_text", "per_message", "safe_prompt")},
            }},
        },
    }},
    "example": {"input_data": {
        "input_string": [{"role": "user", "content": "What should I see in Paris?"}],
        "parameters": {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_new_tokens": 200},
    }},
})]


@router.post("/", response_model=list[dict[str, str]], include_in_schema=False)
@router.post("/score", response_model=list[dict[str, str]])
async def score(
    body: Annotated[SampleJson, Body()], request: Request, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Answer a conversation, or several prompts: `[{"0": "...", "1": "..."}]`."""
    job = service.job(request, "score")
    _check_sizes(body)
    sample = await service.aside(sample_json.parse, body)
    if len(sample.prompts) > MAX_PROMPTS:
        raise BadRequest(f"{sample_json.INPUT} has more than {MAX_PROMPTS} prompts", sample_json.INPUT)
    sample = replace(sample, prompts=[
        replace(prompt, messages=await service.review("prompt", prompt.messages)) for prompt in sample.prompts
    ])
    events = await streaming.begun(service.events(request, job, lambda: sample_json.replies(
        service.model, sample, job.progress, job.cancelled
    )))
    texts = [""] * len(sample.prompts)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Piece):
                texts[event.index] += event.text
            elif isinstance(event, Finished) and event.finish_reason == "content_filter":
                raise Refused(f"answer {event.index} was refused")
    headers = {"x-request-id": job.echoed, **warnings_header(sample.warnings)}
    return JSONResponse(await service.aside(sample_json.output, service.model, sample, texts), headers=headers)


def _check_sizes(body: Any) -> None:
    """Refuse a request that is too large to check. `sample_json.parse` checks the rest."""
    match body:
        case {"input_data": {"input_string": list() as items}} if len(items) > MAX_MESSAGES:
            raise BadRequest(f"{sample_json.INPUT} has more than {MAX_MESSAGES} items", sample_json.INPUT)
    match body:
        case {"input_data": {"parameters": {"stop": str() | list() as stop}}}:
            stops = [stop] if isinstance(stop, str) else stop
            if len(stops) > MAX_STOPS or any(isinstance(item, str) and len(item) > MAX_STOP for item in stops):
                field = f"{sample_json.PARAMETERS}.stop"
                raise BadRequest(f"{field} has more than {MAX_STOPS} strings, or one of more than {MAX_STOP} characters", field)
