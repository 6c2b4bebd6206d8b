"""The Python API: a blob on disk becomes a model that answers in text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemistral.config import ModelConfig
from edgemistral.files.blob import Blob
from edgemistral.generate.engine import Cancel, Engine, Generation, Ids, Progress, Usage
from edgemistral.generate.sampler import Logprobs, SamplingParams
from edgemistral.runtime.plan import Threads, plan
from edgemistral.text.stream import StopStrings, StreamDecoder
from edgemistral.text.tokenizer import Tokenizer, open_tokenizer

Messages = Sequence[Mapping[str, Any]]   # {"role": "system" | "user" | "assistant", "content": str} each


def load(
    path: str | os.PathLike[str],
    context: int | None = None,
    kv_bits: int = 8,
    threads: Threads = None,
    max_ram: int | None = None,
) -> Model:
    """Map a blob and make ready to run it; a context manager.

    context: positions to make room for; None means the model's own maximum (the KV file is sparse).
    kv_bits: 8, or 16 for reference. threads: None means the performance cores that this
    process may use, "auto" the best number measured with this model (once, then remembered). max_ram: bytes.
    Raises BadBlob, BadRequest (its `field` names the argument) or OutOfMemoryBudget before anything is allocated.
    """
    from edgemistral.runtime.transformer import Transformer  # imports numba

    blob = Blob.open(path)
    try:
        planned = plan(blob, context, kv_bits, threads)
        planned.check(max_ram)
        config = blob.config
        tokenizer = open_tokenizer(
            blob.array("tokenizer").tobytes(), blob.text, config.vocab_size, f"{path}: its tokenizer", config.end_ids
        )
        transformer = Transformer(blob, context=planned.context, kv_bits=kv_bits, threads=planned.threads)
    except BaseException:
        blob.close()
        raise
    return Model(Engine(transformer), tokenizer, blob.path)   # the transformer closes the blob


class Model:
    """A loaded model. Threads may share it: calls that compute take turns.

    The sampling arguments of `generate`, `chat` and `complete` are the fields of `SamplingParams`: temperature (0 is
    greedy), top_p, top_k, min_p, repetition_penalty, seed and more. Those that are not given are the model's own
    (`defaults`, from its generation_config.json), else those of `SamplingParams`. `progress(done, total)` counts the
    prompt's tokens that had to be computed; `cancel()` is asked before each chunk of the prompt and each token, and True
    raises Cancelled. All of them raise BadRequest for a wrong argument and ContextOverflow for a prompt that is too long,
    at once.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, path: Path | None = None) -> None:
        """Use `load`; this is for an engine made elsewhere, which the model closes. path: the blob's file."""
        self.engine, self.tokenizer, self.path = engine, tokenizer, path

    @property
    def config(self) -> ModelConfig:
        return self.engine.config

    @property
    def context(self) -> int:
        """Positions there is room for."""
        return self.engine.context

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV file now: it grows as the context fills."""
        return self.engine.kv_bytes

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The model's own sampling arguments, which count where a caller gives none; empty if its files have none."""
        return self.tokenizer.settings.defaults

    def sampling(self, **given: Any) -> SamplingParams:
        """Sampling arguments with the model's own defaults for those that are not given."""
        return SamplingParams(**{**self.defaults, **given})

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
        **sampling: Any,
    ) -> Generation:
        """Token ids that continue `ids`, until </s> (which is not given), `max_new_tokens` or a full context."""
        return self.engine.generate(ids, self.sampling(**sampling), max_new_tokens, progress, cancel)

    def chat(
        self,
        messages: Messages,
        max_new_tokens: int | None = None,
        *,
        stop: str | Iterable[str] = (),
        progress: Progress | None = None,
        cancel: Cancel | None = None,
        **sampling: Any,
    ) -> Reply:
        """The answer to a conversation, in pieces of text. A last message of the assistant's is continued."""
        ids = self.tokenizer.encode_chat(messages)
        stops, continued = StopStrings(stop), messages[-1]["role"] == "assistant"
        generation = self.generate(ids, max_new_tokens, progress=progress, cancel=cancel, **sampling)
        return Reply(generation, self._decoder(ids if continued else []), stops)

    def complete(
        self,
        prompt: str | Ids,
        max_new_tokens: int | None = None,
        *,
        stop: str | Iterable[str] = (),
        progress: Progress | None = None,
        cancel: Cancel | None = None,
        **sampling: Any,
    ) -> Reply:
        """The continuation of a raw text (<s> is put before it, unless the model's texts have none) or of ids, without
        the chat template."""
        if isinstance(prompt, str):
            start = [self.config.bos_id] if self.tokenizer.settings.add_bos else []
            ids: Ids = [*start, *self.tokenizer.encode(prompt)] or [self.config.bos_id]
        else:
            ids = prompt
        stops = StopStrings(stop)
        generation = self.generate(ids, max_new_tokens, progress=progress, cancel=cancel, **sampling)
        return Reply(generation, self._decoder(ids), stops)

    def close(self) -> None:
        """Wait for the call in progress, then let go of the KV file, the threads and the blob."""
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decoder(self, before: Ids) -> StreamDecoder:
        """A decoder for what follows these ids: only at the start of a text does the first piece lose its space."""
        decoder = StreamDecoder(self.tokenizer)
        for token_id in before[-1:]:
            decoder.push(token_id)
        return decoder


class Reply(Iterator[str]):
    """Text that arrives in pieces: whole characters, and nothing of a stop string.

    text: all pieces so far. usage: counts and times so far. finish_reason: None until the end, then "stop" (</s> or a
    stop string), "length" (max_new_tokens) or "context" (it is full). token_ids: of the tokens so far, and starts:
    where the text of each begins; a token that begins at or after the end of `text` is still held back, or at the end
    was cut off by a stop string.
    """

    def __init__(self, generation: Generation, decoder: StreamDecoder, stops: StopStrings) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.starts: list[int] = []
        self._decoded = 0   # characters out of the decoder so far
        self._generation, self._decoder, self._stops = generation, decoder, stops
        self._ended = False

    @property
    def usage(self) -> Usage:
        return self._generation.usage

    @property
    def logprobs(self) -> list[Logprobs]:
        """One for each of `token_ids`, if `top_logprobs` was given."""
        return self._generation.logprobs

    @property
    def finish_reason(self) -> str | None:
        return "stop" if self._stops.stopped else self._generation.finish_reason

    def __next__(self) -> str:
        while not self._ended:
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
            if piece:
                self.text += piece
                return piece
        raise StopIteration
