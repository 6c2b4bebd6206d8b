"""The sample JSON of the Mistral model cards: a request with input_data becomes answers under the keys "0", "1", ...

    {"input_data": {"input_string": ..., "parameters": {...}}}  ->  [{"0": "the answer"}]

`input_string` is one of
    [{"role": ..., "content": ...}, ...]     one conversation, one answer
    ["text", ...]                            prompts: each is a conversation with one user message
    [[{"role": ..., ...}, ...], ...]         conversations
With "per_message": true in the parameters, every message of a single conversation is a separate prompt. The card's sample
output was made that way: it has three answers to three messages, and the third answer does not know the first message.
"safe_prompt": true puts the guardrail that Mistral recommends before every conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edgemistral.errors import BadRequest
from edgemistral.generate.sampler import SamplingParams
from edgemistral.generate.tasks import Cancel, Progress
from edgemistral.model import Model, Reply
from edgemistral.spellings import normalised
from edgemistral.text.chat import ROLES, chat_turns
from edgemistral.text.guardrail import with_guardrail
from edgemistral.text.tokenizer import Messages, check_text

INPUT = "input_data.input_string"
PARAMETERS = "input_data.parameters"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
OTHERS = ("do_sample", "max_new_tokens", "stop", "return_full_text", "per_message", "safe_prompt")


@dataclass(frozen=True)
class Prompt:
    """One conversation to answer, and its path in the request."""

    messages: Messages
    field: str


@dataclass(frozen=True)
class SampleRequest:
    """A checked request: what to answer, and how."""

    prompts: list[Prompt]
    options: dict[str, Any]   # arguments of Model.chat
    return_full_text: bool
    safe_prompt: bool
    warnings: list[str]       # a line for each unknown name in the request


def parse(data: object) -> SampleRequest:
    """Check a decoded request. Raises BadRequest whose `field` is a path such as input_data.parameters.top_p."""
    request = _typed(data, dict, "the request")
    body = _typed(request.get("input_data"), dict, "input_data")
    parameters = _typed(body.get("parameters", {}), dict, PARAMETERS)
    flags = {
        name: _typed(parameters.get(name, default), bool, f"{PARAMETERS}.{name}")
        for name, default in (("do_sample", True), ("return_full_text", False), ("per_message", False),
                              ("safe_prompt", False))
    }
    parameters = _in_our_words(parameters)
    options = {name: parameters[name] for name in SAMPLING if parameters.get(name) is not None}
    with _renamed({name: f"{PARAMETERS}.{name}" for name in SAMPLING}):
        SamplingParams(**options)
    if not flags["do_sample"]:
        options["temperature"] = 0
    options["max_new_tokens"] = parameters.get("max_new_tokens")
    options["stop"] = stop = parameters.get("stop") or []
    if not isinstance(stop, (str, list)):
        raise BadRequest(f"{PARAMETERS}.stop must be a string or a list of strings", f"{PARAMETERS}.stop")
    prompts = _prompts(_typed(body.get("input_string"), list, INPUT), flags["per_message"])
    known = (("", request, ("input_data",)), ("input_data.", body, ("input_string", "parameters")),
             (f"{PARAMETERS}.", parameters, SAMPLING + OTHERS))
    warnings = [f"{at}{name} is not known and was ignored" for at, given, names in known for name in given
                if name not in names]
    return SampleRequest(prompts, options, flags["return_full_text"], flags["safe_prompt"], warnings)


def _in_our_words(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters under our names. BadRequest: one is not supported, as in the other interfaces."""
    flags = {name: value for name, value in parameters.items() if name in OTHERS and name not in ("max_new_tokens", "stop")}
    try:
        made = normalised({name: value for name, value in parameters.items() if name not in flags})
    except BadRequest as error:
        field = f"{PARAMETERS}.{error.field}"
        raise BadRequest(str(error).replace(error.field, field, 1), field) from None
    if made.pop("n", None) not in (None, 1):
        raise BadRequest(f"{PARAMETERS}.n: every prompt has one answer here", f"{PARAMETERS}.n")
    if "max_tokens" in made:
        made["max_new_tokens"] = made.pop("max_tokens")
    return {**made, **flags}


def answer(model: Model, request: SampleRequest) -> list[dict[str, str]]:
    """Answer all prompts, one after another: [{"0": text, "1": text, ...}]. Raises as `replies` does."""
    return output(model, request, ["".join(reply) for reply in replies(model, request)])


def replies(
    model: Model, request: SampleRequest, progress: Progress | None = None, cancel: Cancel | None = None
) -> list[Reply]:
    """A reply for each prompt. Nothing is computed yet.

    Raises BadRequest, as `parse` does, and ContextOverflow, for any of the prompts.
    """
    names = {name: f"{PARAMETERS}.{name}" for name in ("stop", "max_new_tokens")}
    made = []
    for prompt in request.prompts:
        with _renamed({"messages": prompt.field, **names}):
            chat_turns(prompt.messages)   # checked before the guardrail, which shifts the message numbers
            messages = with_guardrail(prompt.messages) if request.safe_prompt else prompt.messages
            made.append(model.chat(messages, progress=progress, cancel=cancel, **request.options))
    return made


def output(model: Model, request: SampleRequest, texts: Sequence[str]) -> list[dict[str, str]]:
    """The answers' texts in the shape of the sample output."""
    if request.return_full_text:
        prompts = [_text_of(prompt.messages, model) for prompt in request.prompts]
        texts = [f"{prompt} {text}" for prompt, text in zip(prompts, texts, strict=True)]
    return [{str(i): text for i, text in enumerate(texts)}]


def _text_of(messages: Messages, model: Model) -> str:
    """A single message unchanged; a conversation in the form of the chat template."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return model.tokenizer.decode(model.tokenizer.encode_chat(messages))


def _prompts(items: list[Any], per_message: bool) -> list[Prompt]:
    """The items of input_string, all of one kind, as conversations."""
    kind = type(items[0]) if items else None
    if kind not in (dict, str, list):
        raise BadRequest(f"{INPUT} must be a list of messages, of strings or of conversations, and not empty", INPUT)
    fields = [f"{INPUT}[{i}]" for i in range(len(items))]
    for field, item in zip(fields, items, strict=True):
        _typed(item, kind, field)
    if per_message and kind is not dict:
        field = f"{PARAMETERS}.per_message"
        raise BadRequest(f"{field} needs {INPUT} to be a list of messages", field)
    if kind is dict and not per_message:
        return [Prompt(items, INPUT)]
    if kind is list:
        return [Prompt(item, field) for field, item in zip(fields, items, strict=True)]
    texts = [_content(item, field) if per_message else check_text(item, field)
             for field, item in zip(fields, items, strict=True)]
    return [Prompt([{"role": "user", "content": text}], field) for field, text in zip(fields, texts, strict=True)]


def _content(message: dict[str, Any], field: str) -> str:
    if message.get("role") not in ROLES:
        raise BadRequest(f"{field}.role must be one of {', '.join(ROLES)}", f"{field}.role")
    return check_text(message.get("content"), f"{field}.content")


def _typed(value: object, kind: type, field: str) -> Any:
    """The value if it is of this JSON type."""
    if type(value) is not kind:
        name = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}[kind]
        found = "missing" if value is None else f"{value!r:.40}"
        raise BadRequest(f"{field} is {found}: it must be {name}", field)
    return value


@contextmanager
def _renamed(names: dict[str, str]) -> Iterator[None]:
    """Rename the field of a BadRequest, by its first name, to its path in the request."""
    try:
        yield
    except BadRequest as error:
        for name, path in names.items():
            if error.field.startswith(name):
                field = path + error.field[len(name):]
                raise BadRequest(str(error).replace(error.field, field), field) from None
        raise
