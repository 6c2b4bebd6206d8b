"""Handles a conversation that is longer than the context: refuses it, or leaves out its oldest turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from edgemistral.errors import BadRequest, ContextOverflow
from edgemistral.text.tokenizer import Messages

OnOverflow = Literal["error", "drop-oldest"]
ON_OVERFLOW: tuple[str, ...] = get_args(OnOverflow)
ROOM = 512              # tokens for an answer without a length limit, at most a quarter of the context
KEPT = 0.5              # share of the prompt's room that the turns may fill after some were left out



def check_on_overflow(value: object) -> None:
    """Raise BadRequest unless it is one of ON_OVERFLOW."""
    if value not in ON_OVERFLOW:
        raise BadRequest(f"on_overflow is {value!r:.40}: it must be {' or '.join(ON_OVERFLOW)}", "on_overflow")


def fit(
    messages: Messages, encode: Callable[[Messages], list[int]], context: int, max_new_tokens: int | None
) -> tuple[list[int], tuple[int, ...]]:
    """The ids of a conversation without its oldest turns, until it fits; and the numbers of the messages left out.

    A turn is a user's messages and the answers to them. System texts and the last turn always stay. Room is kept for
    `max_new_tokens`, at most a quarter of the context. The choice of turns depends only on the conversation, and several are
    left out at once: the next prompts then begin like this one, and can use its KV cache.
    Raises ContextOverflow if system text and last turn alone are too long.
    """
    ids = encode(messages)
    answer = max_new_tokens if type(max_new_tokens) is int else ROOM
    limit = context - max(0, min(answer, context // 4))
    if len(ids) <= limit:
        return ids, ()
    system, turns = _turns(messages)
    if len(turns) > 1:
        lengths = _lengths(messages, system, turns, encode)
        first = _first(lengths, limit)
        while True:
            kept = sorted([*system, *(n for turn in turns[first:] for n in turn)])
            ids = encode([messages[n] for n in kept])
            if len(ids) <= limit or first == len(turns) - 1:
                break
            first += 1
        if len(ids) <= context:
            return ids, tuple(n for turn in turns[:first] for n in turn)
    if len(ids) <= context:
        return ids, ()
    raise ContextOverflow(len(ids), context)


def _turns(messages: Messages) -> tuple[list[int], list[list[int]]]:
    """The numbers of the system messages, and of the messages of each turn."""
    system: list[int] = []
    turns: list[list[int]] = []
    before = "assistant"
    for n, message in enumerate(messages):
        role = message["role"]
        if role == "system":
            system.append(n)
            continue
        if not turns or (role == "user" and before != "user"):
            turns.append([])
        turns[-1].append(n)
        before = role
    return system, turns


def _lengths(
    messages: Messages, system: list[int], turns: list[list[int]], encode: Callable[[Messages], list[int]]
) -> tuple[int, list[int]]:
    """Tokens of the system texts, and about how many each turn adds."""
    head = [messages[n] for n in system]
    user = {"role": "user", "content": ""}
    base = len(encode([*head, user]))
    return base, [max(1, len(encode([*head, *(messages[n] for n in turn)])) - base) for turn in turns]


def _first(lengths: tuple[int, list[int]], limit: int) -> int:
    """The first turn to keep: whenever the growing conversation passed the limit, turns were removed down to a KEPT share."""
    base, turns = lengths
    first, size = 0, base
    for n, turn in enumerate(turns):
        size += turn
        if size > limit:
            while first < n and size > base + KEPT * (limit - base):
                size -= turns[first]
                first += 1
    return first
