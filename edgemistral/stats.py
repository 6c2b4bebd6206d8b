"""Figures of a model: what it has computed, and the memory it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemistral.generate.engine import Engine
    from edgemistral.runtime.plan import Plan


@dataclass(frozen=True)
class Stats:
    """Counts since `load`, and memory now. `Reply.usage` has the figures of one answer."""

    load_seconds: float
    prompt_tokens: int       # computed, without those from the cache
    decoded_tokens: int      # computed one at a time or verified; wrong guesses count
    steps: int
    compute_seconds: float
    threads: int             # this and the next four are 0 for an engine made elsewhere
    weights_bytes: int       # mapped from the file
    work_bytes: int          # ordinary memory
    kv_budget: int           # bytes for conversations that are kept
    context: int             # positions
    kv_bytes: int            # that the KV cache takes on the disk now
    duty: float

    @property
    def tokens_per_second(self) -> float:
        """The rate over everything that was computed."""
        return (self.prompt_tokens + self.decoded_tokens) / self.compute_seconds if self.compute_seconds else 0.0

    @classmethod
    def of(cls, engine: Engine, planned: Plan | None, load_seconds: float) -> Stats:
        counts = engine.counts
        return cls(
            load_seconds=load_seconds,
            prompt_tokens=counts.prompt_tokens,
            decoded_tokens=counts.decoded_tokens,
            steps=counts.steps,
            compute_seconds=counts.seconds,
            threads=planned.threads if planned is not None else 0,
            weights_bytes=planned.weights_bytes if planned is not None else 0,
            work_bytes=planned.work_bytes if planned is not None else 0,
            kv_budget=planned.kv_budget if planned is not None else 0,
            context=engine.context,
            kv_bytes=engine.kv_bytes,
            duty=engine.duty.share,
        )
