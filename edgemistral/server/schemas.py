"""The bodies of requests and responses. Types are strict. Unknown fields are ignored and named in a header."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from edgemistral.generate.sampler import MAX_TOP_LOGPROBS, RANGES
from edgemistral.session import SESSION_NAME
from edgemistral.spellings import check_texts, normalised

MAX_TEXT = 2_000_000       # characters of one text: 32768 tokens of English are about 150 thousand
MAX_MESSAGES = 10_000
MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_STOP = 1000            # characters
MAX_GRAMMAR = 65_536       # characters
MAX_TOOLS = 256
MAX_ANSWERS = 16           # of one request
MAX_SEED = (1 << 63) - 1

Text = Annotated[str, Field(max_length=MAX_TEXT)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TEXT)]
StopString = Annotated[
    str, Field(min_length=1, max_length=MAX_STOP), WithJsonSchema({"type": "string", "maxLength": MAX_STOP})
]
# The schemas for /openapi.json: spellings.py reads any negative number as "none", and leaves out empty strings.
Limit = Annotated[int, Field(ge=0, le=MAX_SEED), WithJsonSchema({
    "anyOf": [{"type": "integer", "maximum": MAX_SEED}, {"type": "number", "exclusiveMaximum": 0}],
    "description": "A negative number means no limit.",
})]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, body: Any) -> Any:
        check_texts(body)
        return body

    def warnings(self, at: str = "") -> Iterator[str]:
        """A line for each unknown field that has a value, nested fields included."""
        for name, value in (self.model_extra or {}).items():
            if value is not None:
                yield f"{at}{name} is not known and was ignored"
        for name in type(self).model_fields:
            value = getattr(self, name)
            for path, one in ((name, value),) if isinstance(value, Request) else (
                    (f"{name}[{i}]", item) for i, item in enumerate(value)) if isinstance(value, list) else ():
                if isinstance(one, Request):
                    yield from one.warnings(f"{at}{path}.")


# ---- requests --------------------------------------------------------------------------------------------------------

class TextPart(Request):
    type: Literal["text"]
    text: Text


class FunctionCall(Request):
    name: Annotated[str, Field(max_length=500)]
    arguments: Text | dict[str, Any] = "{}"


class ToolCall(Request):
    id: Annotated[str, Field(max_length=500)] | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Request):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)] | None = None
    name: Annotated[str, Field(max_length=500)] | None = None
    tool_call_id: Annotated[str, Field(max_length=500)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    function_call: FunctionCall | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role not in ("assistant", "tool", "function"):
            raise ValueError(f"content must be a text: a message of the role {self.role} needs one")
        return self

    def plain(self) -> dict[str, Any]:
        """As the tokenizer takes it: one text, and the fields for tools."""
        parts = self.content or ""
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        more = self.model_dump(include={"name", "tool_call_id", "tool_calls", "function_call"}, exclude_none=True)
        return {"role": "system" if self.role == "developer" else self.role, "content": content, **more}


def _in_range(name: str) -> Any:
    """An optional number within the sampler's range."""
    low, high = RANGES[name]
    return Field(None, ge=low, le=high)


class StreamOptions(Request):
    include_usage: bool = False


class Sampling(Request):
    """The fields that chat and raw completions share. null means the default, as if the field were missing."""

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, body: Any) -> Any:
        check_texts(body)      # first: pydantic cannot take such a text in an error's message
        return normalised(body)

    model: Annotated[str, Field(max_length=500)] | None = Field(
        None, description="Ignored: the server has one model. The response names it."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = _in_range("temperature")
    top_p: float | None = _in_range("top_p")
    top_k: Limit | None = None
    min_p: float | None = _in_range("min_p")
    repetition_penalty: float | None = _in_range("repetition_penalty")
    presence_penalty: float | None = _in_range("presence_penalty")
    frequency_penalty: float | None = _in_range("frequency_penalty")
    logit_bias: Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = Field(None, description="Number of answers.")
    min_tokens: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(None, description="Least number of tokens.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    grammar: Annotated[str, Field(max_length=MAX_GRAMMAR)] | None = Field(
        None, description="The answer follows this grammar: Lark in llguidance's dialect, or GBNF."
    )
    response_format: dict[str, Any] | None = Field(
        None, description='type is "text", "json_object" (optionally with a schema) or "json_schema"'
    )
    json_schema: dict[str, Any] | Annotated[str, Field(max_length=MAX_GRAMMAR)] | None = None
    guided_json: dict[str, Any] | Annotated[str, Field(max_length=MAX_GRAMMAR)] | None = None
    guided_regex: Annotated[str, Field(max_length=MAX_GRAMMAR)] | None = None
    guided_choice: Annotated[list[Annotated[str, Field(max_length=MAX_STOP)]], Field(max_length=1000)] | None = None
    guided_grammar: Annotated[str, Field(max_length=MAX_GRAMMAR)] | None = None
    structured_outputs: dict[str, Any] | None = None
    format: dict[str, Any] | Annotated[str, Field(max_length=MAX_GRAMMAR)] | None = None
    user: Annotated[str, Field(max_length=500)] | None = Field(None, description="Users of one program take turns.")

    def sampling(self) -> dict[str, Any]:
        """The arguments of Model.chat and Model.complete, except the length."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop",
            "min_tokens",
        )
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.seed is not None:
            options["seed"] = self.seed % (1 << 64)
        if self.stop_token_ids:
            options["stop_token_ids"] = frozenset(self.stop_token_ids)
        if self.logit_bias:
            options["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return options

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[str, Field(max_length=500)] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Annotated[str, Field(max_length=500)] | dict[str, Any] | None = None
    session: Annotated[str, Field(pattern=SESSION_NAME)] | None = Field(
        None, description="Keep this conversation's keys and values under this name. The server needs --session-dir."
    )
    on_overflow: Literal["error", "drop-oldest"] | None = Field(
        None, description="What to do if the conversation is longer than the context: refuse it, or leave out the oldest turns."
    )
    safe_prompt: bool = Field(False, description="Put the guardrail that Mistral recommends before the conversation.")

    model_config = ConfigDict(json_schema_extra={
        "example": {"messages": [{"role": "user", "content": "What should I see in Paris?"}], "stream": True}
    })


class CompletionRequest(Sampling):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)] | Ids | Annotated[
        list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)
    ]
    max_tokens: Limit | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "Paris is", "max_tokens": 32}})

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TokenizeRequest(Request):
    """Either a text (without <s>) or a conversation (with it)."""

    text: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None

    model_config = ConfigDict(json_schema_extra={"example": {"text": "What should I see in Paris?"}})


class DetokenizeRequest(Request):
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TEXT)]

    model_config = ConfigDict(json_schema_extra={"example": {"tokens": [733, 16289, 28793]}})


# ---- responses -------------------------------------------------------------------------------------------------------

class PromptDetails(BaseModel):
    cached_tokens: int


class UsageBody(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    dropped_messages: list[int] = Field([], description="Numbers of the messages left out of a conversation that is too long.")


class Timings(BaseModel):
    """Not in the OpenAI interface: how long it took."""

    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter", "tool_calls", "function_call"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    timings: Timings


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody
    timings: Timings


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    type: Literal["base"] = "base"
    created: int
    owned_by: str = "edgemistral"
    capabilities: dict[str, bool] = Field(default_factory=lambda: {
        "completion_chat": True, "function_calling": True, "completion_fim": False, "fine_tuning": False, "vision": False,
    })
    max_model_len: int = Field(description="The context: how many tokens there is room for.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(BaseModel):
    tokens: list[int]
    count: int


class PlainText(BaseModel):
    text: str


class Health(BaseModel):
    status: Literal["ok", "loading"]
    model: str


class Cancellation(BaseModel):
    id: str
    cancelled: Literal[True] = True
