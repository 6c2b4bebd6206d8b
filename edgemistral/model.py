"""The Python API: a blob on disk becomes a model that answers in text."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.async_reply import AsyncReply
from edgemistral.async_reply import Threads as AnswerThreads
from edgemistral.config import ModelConfig
from edgemistral.errors import BadRequest
from edgemistral.files.blob import Blob
from edgemistral.generate.engine import Engine
from edgemistral.generate.ids import Ids
from edgemistral.generate.sampler import Logprobs, SamplingParams
from edgemistral.generate.tasks import Cancel, Generation, Progress, Usage
from edgemistral.loading import LoadProgress, told
from edgemistral.runtime.plan import Plan, Threads, plan
from edgemistral.stats import Stats
from edgemistral.text.overflow import OnOverflow, check_on_overflow, fit
from edgemistral.text.stream import StopStrings, StreamDecoder
from edgemistral.text.tokenizer import Messages, Tokenizer
from edgemistral.text.written import WrittenTexts

if TYPE_CHECKING:
    from edgemistral.session import Session

KV_STORE_QUOTA = 8 << 30    # bytes

logger = logging.getLogger("edgemistral")
logger.addHandler(logging.NullHandler())      # the application decides where log lines go


def load(
    path: str | os.PathLike[str],
    context: int | None = None,
    kv_bits: int = 8,
    threads: Threads = None,
    max_ram: int | None = None,
    kv_budget: int | None = None,
    lookup: bool = True,
    on_overflow: OnOverflow = "error",
    kv_store: str | os.PathLike[str] | None = None,
    kv_store_quota: int = KV_STORE_QUOTA,
    duty: float = 1.0,
    progress: LoadProgress | None = None,
) -> Model:
    """Map a blob and prepare to run it; a context manager.

    context: positions to make room for; None means the model's own maximum (the KV cache grows as it is used).
    kv_bits: 8, 4 for half the memory, or 16 for reference. threads: None means the performance cores that this
    process may use, "auto" the best number measured with this model (once, then remembered). max_ram: bytes.
    lookup: guess tokens from earlier text and verify several at once. Answers are the same, and faster if they quote.
    kv_budget: bytes for conversations that are kept; None means a quarter of the memory (see `runtime.plan.plan`).
    kv_store: a folder that keeps prompts and answers of all runs, up to `kv_store_quota` bytes. A prompt that begins like
    one of them is read from there.
    on_overflow: what `Model.chat` does with a conversation longer than the context, unless the call says otherwise.
    duty: the share of the time that may be spent computing, see `Model.duty`. progress: called as progress(stage, done, total)
    on this thread, with stage "reading" (bytes of the file) and "compiling" (kernels, on a machine's first run). With it,
    `load` does both, so that the first answer comes at once. Without it, the first answer does them.
    Raises BadBlob, BadRequest (its `field` names the argument) or OutOfMemoryBudget before anything is allocated.
    """
    from edgemistral.files.kv_store import KVStore
    from edgemistral.files.records import root_of
    from edgemistral.runtime.session import geometry_of
    from edgemistral.runtime.transformer import Transformer  # imports numba
    from edgemistral.session import binding_of

    began = time.perf_counter()
    if type(kv_store_quota) is not int or kv_store_quota < 1:
        raise BadRequest(f"kv_store_quota is {kv_store_quota!r}: it must be a number of bytes", "kv_store_quota")
    check_on_overflow(on_overflow)
    blob = Blob.open(path)
    try:
        planned = plan(blob, context, kv_bits, threads, kv_budget, max_ram)
        planned.check(max_ram)
        tokenizer = tokenizer_of(blob)
        transformer = Transformer(
            blob, context=planned.context, kv_bits=kv_bits, threads=planned.threads, kv_budget=planned.kv_budget
        )
    except BaseException:
        blob.close()
        raise
    engine = Engine(transformer, lookup)      # the transformer closes the blob
    try:
        engine.duty.share = duty
        if kv_store is not None:
            root, geometry = root_of(binding_of(blob, kv_bits)), geometry_of(transformer.pool)
            engine.use_store(KVStore(Path(kv_store), root, geometry, kv_store_quota))
        if progress is not None:
            told(progress, blob, lambda: engine.prefill([tokenizer.bos_id or 0]))
    except BaseException:
        engine.close()
        raise
    model = Model(engine, tokenizer, blob.path, binding_of(blob, kv_bits), on_overflow, planned)
    model.load_seconds = time.perf_counter() - began
    logger.info("%s: loaded in %.2f s with %d threads", blob.path, model.load_seconds, planned.threads)
    return model


def tokenizer_of(blob: Blob) -> Tokenizer:
    """The tokenizer in a blob. Raises BadInput if the bytes are not a tokenizer."""
    config, name = blob.config, f"{blob.path}: its tokenizer"
    return blob.text.tokenizer(blob.array("tokenizer").tobytes(), config.vocab_size, name, config.eos_id)


class Model:
    """A loaded model. Threads may share it: calls that compute take turns.

    The sampling arguments of `generate`, `chat` and `complete` are the fields of `SamplingParams`: temperature (0 is
    greedy), top_p, top_k, min_p, repetition_penalty, seed and more. `progress(done, total)` counts the prompt's tokens that had
    to be computed. `cancel()` is called before each chunk of the prompt and each token; True raises Cancelled.
    All of them raise BadRequest for a wrong argument and ContextOverflow for a prompt that is too long, at once.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, path: Path | None = None, binding: dict[str, Any] | None = None,
        on_overflow: OnOverflow = "error", planned: Plan | None = None,
    ) -> None:
        """Use `load`. This is for an engine made elsewhere, which the model closes. path: the blob's file. binding: what the
        bits of the KV cache depend on, for sessions."""
        self.engine, self.tokenizer, self.path, self.on_overflow = engine, tokenizer, path, on_overflow
        self.load_seconds = 0.0
        self._planned, self._answering = planned, AnswerThreads()
        self._binding = binding or {}
        self._written = WrittenTexts(tokenizer)
        engine.end_ids |= tokenizer.end_ids

    @property
    def config(self) -> ModelConfig:
        return self.engine.config

    @property
    def context(self) -> int:
        """The number of positions that there is room for."""
        return self.engine.context

    @property
    def kv_bytes(self) -> int:
        """Bytes that the KV cache takes on the disk now. It grows as the context fills."""
        return self.engine.kv_bytes

    @property
    def duty(self) -> float:
        """The share of the time that may be spent computing, from 0.01 to 1: the model rests after each step. Useful in the
        background or on battery. It may be set at any time, even during an answer. `threads` sets the share of cores."""
        return self.engine.duty.share

    @duty.setter
    def duty(self, share: float) -> None:
        self.engine.duty.share = share

    @property
    def stats(self) -> Stats:
        """Counts of what was computed, and memory in use. Returns at once, even while another thread computes."""
        return Stats.of(self.engine, self._planned, self.load_seconds)

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """Next-token logits (len(ids), vocab_size) at every position."""
        return self.engine.logits(ids)

    def generate(
        self,
        ids: Ids,
        max_new_tokens: int | None = None,
        *,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
        session: Session | None = None,
        **sampling: Any,
    ) -> Generation:
        """Token ids that continue `ids`, until </s> (not included), `max_new_tokens` or a full context."""
        params = SamplingParams(**{**self.tokenizer.defaults, **sampling})
        home = None if session is None else session.sequence
        return self.engine.generate(ids, params, max_new_tokens, progress, cancel, home)

    def session(self, path: str | os.PathLike[str]) -> Session:
        """Open the session in a file, or create the file. Give the session to `chat`, and a restart loses nothing.

        BadSession: the file belongs to another model, tokenizer or KV format, has a damaged header, is newer, or is in use.
        The file is not changed. If only a part of a session is valid, it continues from there, and its `notice` says so.
        """
        from edgemistral.session import Session

        return Session(self.engine, Path(path), self._binding, self.path.name if self.path else "", self._written)

    def chat(
        self,
        messages: Messages,
        max_new_tokens: int | None = None,
        *,
        stop: str | Iterable[str] = (),
        progress: Progress | None = None,
        cancel: Cancel | None = None,
        session: Session | None = None,
        on_overflow: OnOverflow | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> Reply:
        """The answer to a conversation, in pieces of text. If the last message is the assistant's, it is continued.

        tools: in OpenAI's shape, if the chat template supports them.
        session: keeps tokens and messages in its file. on_overflow, if the conversation is longer than the context: "error"
        raises ContextOverflow; "drop-oldest" leaves out whole oldest turns, never the system text, and `Reply.dropped` says
        which; None means the choice given to `load`.
        """
        on_overflow = self.on_overflow if on_overflow is None else on_overflow
        check_on_overflow(on_overflow)
        ids, dropped = self._encode(messages, on_overflow, max_new_tokens, tools)
        stops, continued = StopStrings(stop), messages[-1]["role"] == "assistant" and bool(messages[-1].get("content"))

        def answered(reply: Reply) -> None:
            if not continued:
                self._written.remember(reply.text, reply.ids_of_text)
            if session is not None and session.is_open:
                text = messages[-1]["content"] + reply.text if continued else reply.text
                said = messages[:-1] if continued else messages
                session.messages = [*map(dict, said), {"role": "assistant", "content": text}]

        generation = self.generate(ids, max_new_tokens, progress=progress, cancel=cancel, session=session, **sampling)
        generation.usage.dropped_messages = dropped
        return Reply(generation, self._decoder(ids if continued else []), stops, answered)

    def achat(self, messages: Messages, max_new_tokens: int | None = None, **options: Any) -> AsyncReply:
        """`chat` for an event loop: `async for piece in model.achat(messages)`. options: those of `chat`.

        It computes on a thread, and calls `progress` and `cancel` there. Errors in the arguments are raised when the first
        piece is requested. Cancelling the task cancels the answer.
        """
        return AsyncReply(lambda: self.chat(messages, max_new_tokens, **options), self._answering)

    def complete(
        self,
        prompt: str | Ids,
        max_new_tokens: int | None = None,
        *,
        stop: str | Iterable[str] = (),
        progress: Progress | None = None,
        cancel: Cancel | None = None,
        session: Session | None = None,
        **sampling: Any,
    ) -> Reply:
        """The continuation of a raw text (<s> is put before it) or of ids, without the chat template."""
        ids = [*self.begin(), *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        stops = StopStrings(stop)
        generation = self.generate(ids, max_new_tokens, progress=progress, cancel=cancel, session=session, **sampling)
        return Reply(generation, self._decoder(ids), stops)

    def close(self) -> None:
        """Wait for the current step, then release the KV cache, the threads and the blob. Unfinished answers raise
        EdgeMistralError."""
        self.engine.close()
        self._answering.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> list[int]:
        """The ids that a text without a template begins with."""
        return [self.tokenizer.bos_id] if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None else []

    def _encode(
        self, messages: Messages, on_overflow: OnOverflow, max_new_tokens: int | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[Ids, tuple[int, ...]]:
        """The ids of a conversation, with the ids of answers as this model wrote them; and the messages left out."""
        def encode(messages: Messages) -> list[int]:
            return self._written.restore(self.tokenizer.encode_chat(messages, tools), messages, self.engine.end_ids)

        if on_overflow == "error":
            return encode(messages), ()
        return fit(messages, encode, self.context, max_new_tokens)

    def _decoder(self, before: Ids) -> StreamDecoder:
        """A decoder for tokens after these ids. Only at the start of a text does the first piece lose its space."""
        decoder = StreamDecoder(self.tokenizer)
        for token_id in before[-1:]:
            decoder.push(token_id)
        return decoder


class Reply(Iterator[str]):
    """Text that arrives in pieces: whole characters, and nothing of a stop string.

    text: all pieces so far. usage: counts and times so far. finish_reason: None until the end, then "stop" (</s> or a
    stop string), "length" (max_new_tokens), "context" (it is full) or "cancelled". token_ids: the tokens so far. starts:
    where the text of each begins. A token that begins at or after the end of `text` is held back, or was cut off by a
    stop string.
    """

    def __init__(
        self, generation: Generation, decoder: StreamDecoder, stops: StopStrings,
        on_end: Callable[[Reply], object] | None = None,
    ) -> None:
        """on_end: called once, when no more text comes."""
        self._on_end = on_end
        self.text = ""
        self.token_ids: list[int] = []
        self.starts: list[int] = []
        self._decoded = 0   # characters out of the decoder so far
        self._generation, self._decoder, self._stops = generation, decoder, stops
        self._ended = False

    def cancel(self) -> None:
        """Stop the answer, from any thread, within one token or one chunk of a long prompt. The text so far stays, the
        iteration ends, and `finish_reason` is "cancelled". The conversation can continue from there."""
        self._generation.cancel()

    @property
    def generation(self) -> Generation:
        """The tokens that the text comes from."""
        return self._generation

    @property
    def usage(self) -> Usage:
        return self._generation.usage

    @property
    def dropped(self) -> tuple[int, ...]:
        """Numbers of the messages that were left out because the conversation was too long."""
        return self.usage.dropped_messages

    @property
    def ended(self) -> bool:
        """Whether the text is complete."""
        return self._ended

    @property
    def ids_of_text(self) -> list[int]:
        """The tokens of `text`, without those that a stop string cut off."""
        return [token for token, start in zip(self.token_ids, self.starts, strict=True) if start < len(self.text)]

    @property
    def logprobs(self) -> list[Logprobs]:
        """One for each of `token_ids`, if `top_logprobs` was given."""
        return self._generation.logprobs

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stops.found

    @property
    def finish_reason(self) -> str | None:
        return "stop" if self._stops.stopped else self._generation.finish_reason

    def __next__(self) -> str:
        while not self._ended:
            if piece := self._next_piece():
                return piece
        raise StopIteration

    def ready_text(self) -> str:
        """The text of the tokens computed so far; computes nothing."""
        text = ""
        while not self._ended and self._generation.ready:
            text += self._next_piece()
        return text

    def _next_piece(self) -> str:
        """The text of the next token; it may be empty."""
        token_id = next(self._generation, None)
        if token_id is None:
            piece = self._stops.push(self._decoder.flush()) + self._stops.flush()
        else:
            self.token_ids.append(token_id)
            self.starts.append(self._decoded)
            decoded = self._decoder.push(token_id)
            self._decoded += len(decoded)
            piece = self._stops.push(decoded)
        self._ended = token_id is None or self._stops.stopped
        self.text += piece
        if self._ended and self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self)
        return piece
