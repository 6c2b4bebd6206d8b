"""Clients that stream answers from one server at the same time: their total tokens per second, for bench/parallel.py."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from bench.server_process import Server, ask, events

TOKENS = 48
COMPLETIONS = "/v1/completions"


def measure(blob: Path, n_clients: int, rounds: int) -> dict[str, Any]:
    """tokens/s of one client and of `n_clients`, in turns, and the median of their ratio."""
    with Server(blob, "--no-lookup", "--parallel", str(n_clients)) as server:
        tokens_per_second(server, n_clients)
        samples = []
        for _ in range(rounds):
            before, several, after = (tokens_per_second(server, n) for n in (1, n_clients, 1))
            samples.append({"one": (before + after) / 2, "several": several, "gain": 2 * several / (before + after)})
        server.stop()
    return {"clients": n_clients, "samples": samples,
            **{key: median(sample[key] for sample in samples) for key in ("one", "several", "gain")}}


def tokens_per_second(server: Server, n_clients: int) -> float:
    """The rate while all clients receive tokens: from the last client's first token to the first client's last."""
    arrivals: list[list[float]] = [[] for _ in range(n_clients)]

    def client(number: int) -> None:
        body = {
            "prompt": f"Client {number} asks", "max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 0, "stream": True,
            "logprobs": 0,       # an event for each token, also for those without text
        }
        with closing(server.connect()) as connection:
            response = ask(connection, "POST", COMPLETIONS, body)
            if response.status != 200:
                raise RuntimeError(response.read().decode())
            for event in events(response):
                count = sum(len((choice.get("logprobs") or {}).get("tokens", ())) for choice in event.get("choices", ()))
                arrivals[number] += [time.perf_counter()] * count

    threads = [threading.Thread(target=client, args=(number,)) for number in range(n_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(len(times) != TOKENS for times in arrivals):
        raise RuntimeError(f"answers of {[len(times) for times in arrivals]} tokens instead of {TOKENS}")
    start, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    return sum(start < at <= end for times in arrivals for at in times) / (end - start)
