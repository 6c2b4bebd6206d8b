"""`GET /metrics`, in the Prometheus text format. It contains no text of prompts or answers."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from edgemistral.generate.tasks import Usage

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
RATES = (1, 2, 5, 10, 15, 20, 30, 50, 100, 200, 500, 1000)


class Metrics:
    """One registry for each app: a process may hold several apps."""

    def __init__(self, waiting: Callable[[], int], running: Callable[[], bool], kv_bytes: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter(
            "edgemistral_requests", "Requests, by route and status", ["method", "path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("edgemistral_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter(
            "edgemistral_cached_prompt_tokens", "Tokens of prompts found in the KV cache", registry=registry
        )
        self.new_tokens = Counter("edgemistral_generated_tokens", "Tokens generated", registry=registry)
        self.first_token = Histogram(
            "edgemistral_time_to_first_token_seconds", "From a request to the first text of its answer",
            buckets=SECONDS, registry=registry,
        )
        self.rate = Histogram(
            "edgemistral_tokens_per_second", "Tokens per second of an answer after its first", buckets=RATES,
            registry=registry,
        )
        for name, text, read in (
            ("edgemistral_queue_length", "Requests that wait", waiting),
            ("edgemistral_busy", "1 while the compute thread is at work", running),
            ("edgemistral_kv_bytes", "Bytes of the KV file", kv_bytes),
        ):
            Gauge(name, text, registry=registry).set_function(read)

    def count(self, usage: Usage) -> None:
        """Add the tokens and the rate of one answer, complete or cancelled."""
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.cached_tokens.inc(usage.cached_tokens)
        self.new_tokens.inc(usage.new_tokens)
        if usage.decode_rate:
            self.rate.observe(usage.decode_rate)

    def text(self) -> bytes:
        return generate_latest(self.registry)
