"""Builds the parts of an OpenAI response from the events of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from edgemistral.generate.tasks import Usage
from edgemistral.server.service import Token
from edgemistral.text.tokenizer import Tokenizer

LOWEST = -9999.0   # OpenAI's value for a probability of 0: JSON has no infinity


def usage_body(usages: Iterable[Usage], answers: int = 1) -> dict[str, Any]:
    """The `usage` of a response. usages: of all its answers, in order. answers: how many each prompt has."""
    usages = list(usages)
    first = usages[::answers]          # a prompt is read once for all its answers
    prompt, new = sum(usage.prompt_tokens for usage in first), sum(usage.new_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in first)
    body = {
        "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    dropped = [number for usage in usages for number in usage.dropped_messages]
    return {**body, "dropped_messages": dropped} if dropped else body


def timings_body(usages: Sequence[Usage]) -> dict[str, float]:
    """The `timings` of a response: seconds summed over its answers, and the rate of the last one."""
    return {
        "prefill_seconds": round(sum(usage.prefill_seconds for usage in usages), 6),
        "decode_seconds": round(sum(usage.decode_seconds for usage in usages), 6),
        "tokens_per_second": round(usages[-1].decode_rate, 3) if usages else 0.0,
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""
    return {
        "content": [
            {
                **_entry(tokenizer, token.token_id, token.logprobs.drawn),
                "top_logprobs": [_entry(tokenizer, token_id, value) for token_id, value in token.logprobs.top],
            }
            for token in tokens if token.logprobs is not None
        ]
    }


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """The `logprobs` of a raw completion's choice, whose text begins at `offset`."""
    return {
        "tokens": [_text(tokenizer, token.token_id) for token in tokens],
        "token_logprobs": [None if token.logprobs is None else max(token.logprobs.drawn, LOWEST) for token in tokens],
        "top_logprobs": [
            None if token.logprobs is None else
            {_text(tokenizer, token_id): max(value, LOWEST) for token_id, value in token.logprobs.top} for token in tokens
        ],
        "text_offset": [offset + token.start for token in tokens],
    }


def _entry(tokenizer: Tokenizer, token_id: int, value: float) -> dict[str, Any]:
    spelled = list(tokenizer.token_bytes(token_id)) or None
    return {"token": _text(tokenizer, token_id), "logprob": max(value, LOWEST), "bytes": spelled}


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of a token; its name if the token is a single byte or has no text."""
    if tokenizer.byte(token_id) is None and (surface := tokenizer.surface(token_id)):
        return surface
    return tokenizer.piece(token_id)
