"""The bodies of requests and responses. Types are strict; what is not known is ignored and named in a header."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgemistral.generate.sampler import MAX_TOP_LOGPROBS
from edgemistral.session import SESSION_NAME

MAX_TEXT = 2_000_000       # characters of one text: 32768 tokens of English are about 150 thousand
MAX_MESSAGES = 10_000
MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_STOP = 1000            # characters
MAX_GRAMMAR = 65_536       # characters
MAX_SEED = (1 << 63) - 1

Text = Annotated[str, Field(max_length=MAX_TEXT)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TEXT)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    def warnings(self) -> Iterator[str]:
        """A line for each name in the request that means nothing here."""
        return (f"{name} is not known and was ignored" for name in self.model_extra or {})


# ---- requests --------------------------------------------------------------------------------------------------------

class TextPart(Request):
    type: Literal["text"]
    text: Text


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]

    def plain(self) -> dict[str, str]:
        """As the tokenizer takes it: one text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class JsonSchema(Request):
    name: Annotated[str, Field(max_length=200)] = ""
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Request):
    type: Literal["text"]


class JsonObjectFormat(Request):
    type: Literal["json_object"]


class JsonSchemaFormat(Request):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(Request):
    include_usage: bool = False


class Sampling(Request):
    """What chat and raw completions share. null means the default, as if it were not there."""

    model: Annotated[str, Field(max_length=500)] | None = Field(
        None, description="Ignored: there is one model, and the response names it."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.001, le=1000)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    n: Literal[1] | None = Field(None, description="One answer only.")
    grammar: Annotated[str, Field(max_length=MAX_GRAMMAR)] | None = Field(
        None, description="Only texts of this grammar: Lark as llguidance writes it, or GBNF."
    )
    user: Annotated[str, Field(max_length=500)] | None = Field(None, description="Users of one program take turns.")

    def sampling(self) -> dict[str, Any]:
        """The arguments of Model.chat and Model.complete but for the length."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop"
        )
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.seed is not None:
            options["seed"] = self.seed % (1 << 64)
        if self.logit_bias:
            options["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return options

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: Annotated[
        TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
    ] | None = None
    session: Annotated[str, Field(pattern=SESSION_NAME)] | None = Field(
        None, description="Keep the tokens of this conversation under this name, if the server has a --session-dir."
    )
    on_overflow: Literal["error", "drop-oldest"] | None = Field(
        None, description="A conversation longer than the context: refuse it, or leave out its oldest turns."
    )
    safe_prompt: bool = Field(False, description="Put the guardrail that Mistral recommends before the conversation.")

    model_config = ConfigDict(json_schema_extra={
        "example": {"messages": [{"role": "user", "content": "What should I see in Paris?"}], "stream": True}
    })


class CompletionRequest(Sampling):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)] | Ids | Annotated[
        list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)
    ]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = 16
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
    """One of the two: a text (without <s>), or a conversation (with it)."""

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
    dropped_messages: list[int] = Field([], description="Messages that were left out: the conversation was too long.")


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
    content: str


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"]


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
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
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
    created: int
    owned_by: str = "edgemistral"
    max_model_len: int = Field(description="Positions there is room for.")


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
