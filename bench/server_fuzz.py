"""Malformed requests of a seeded fuzzer over every route: no 500, no leak, and how long /health takes meanwhile.

    python bench/server_fuzz.py [MODEL] [--requests 10000]   # takes minutes with the demo model, the default

Each request is a valid one of some interface with one to three changes: a value, a name, the text of the JSON, a header, the
method or the address. The same seed makes the same requests.
"""

from __future__ import annotations

import copy
import http.client
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

import edgemistral
from bench import harness
from bench.server_process import Server, ask

CLIENTS, SEED, WARM_UP = 8, 7, 0.2        # of the requests, before memory is measured
USER = [{"role": "user", "content": "Where is it?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": PARAMETERS}}]
CALL = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
HISTORY = [{"role": "system", "content": "s"}, *USER, {"role": "assistant", "content": None, "tool_calls": CALL},
           {"role": "tool", "tool_call_id": "c1", "content": "r"}]
CHAT, SHORT = "/v1/chat/completions", {"max_tokens": 2}
RIGHT: tuple[tuple[str, Any], ...] = (
    (CHAT, {"messages": USER, **SHORT, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 1, "stop": ["x"], "n": 1}),
    (CHAT, {"messages": HISTORY, **SHORT, "tools": TOOLS, "tool_choice": "auto", "stream": True}),
    (CHAT, {"messages": USER, **SHORT, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    (CHAT, {"messages": USER, **SHORT, "response_format": {"type": "json_schema", "json_schema": {"schema": PARAMETERS}}}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], **SHORT, "logprobs": True,
            "top_logprobs": 2, "logit_bias": {"5": 1.0}, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": "a b", **SHORT, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": [[1, 5, 6], [1, 7]], **SHORT, "stream": True, "grammar": 'root ::= "a"'}),
    ("/v1/responses", {"input": USER, "max_output_tokens": 2, "instructions": "i", "text": {"format": {"type": "text"}}}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "stream": True,
                       "max_output_tokens": 2, "tools": [{"type": "function", "name": "f", "parameters": PARAMETERS}]}),
    ("/v1/messages", {"messages": USER, **SHORT, "system": [{"type": "text", "text": "s"}], "stop_sequences": ["x"]}),
    ("/v1/messages", {"messages": [*USER, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "c1", "name": "f", "input": {}}]}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "r"}]}], **SHORT, "stream": True,
        "tools": [{"name": "f", "input_schema": PARAMETERS}], "tool_choice": {"type": "any"}}),
    ("/v1/messages/count_tokens", {"messages": USER}),
    ("/api/chat", {"model": "m", "messages": USER, "options": {"num_predict": 2, "temperature": 0.1}, "stream": False}),
    ("/api/chat", {"messages": USER, "tools": TOOLS, "format": PARAMETERS, "options": {"num_predict": 2}}),
    ("/api/generate", {"prompt": "a", "system": "s", "options": {"num_predict": 2, "stop": ["x"]}}),
    ("/api/show", {"model": "m"}),
    ("/score", {"input_data": {"input_string": USER, "parameters": {"max_new_tokens": 2, "do_sample": True, "top_p": 0.9}}}),
    ("/", {"input_data": {"input_string": ["a", "b"], "parameters": {"max_new_tokens": 2, "return_full_text": True}}}),
    ("/tokenize", {"text": "a"}), ("/tokenize", {"messages": USER}), ("/detokenize", {"tokens": [5, 6]}),
    ("/v1/models", None), ("/v1/requests/x", None), ("/api/tags", None), ("/health", None), ("/metrics", None), ("/docs", None),
)
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, 1 << 31, 1 << 64, -(1 << 70), float("nan"), float("inf"), "", " ", "a",
    "\0", "\ud800", "\u2028", "é🙂" * 3, "x" * 5000, "[INST]", "</s>", "auto", "none", "json", "text", [], {}, [[]], [None],
    [1], ["a", 1], [{}], {"": None}, {"type": "text"}, {"type": "function"}, {"$ref": "#"}, {"type": []}, {"type": "object"},
)
NAMES = ("", "stream", "messages", "tools", "n", "seed", "stop", "grammar", "format", "type", "session", "user", "x" * 300,
         "\0é", "json_schema", "guided_regex", "guided_choice", "min_tokens", "on_overflow", "suffix", "best_of", "raw")
HEADERS = ({"Content-Type": "text/plain"}, {"Content-Type": ""}, {"Host": "evil.example"}, {"Origin": "null"}, {"Expect": "x"},
           {"Origin": "https://evil.example"}, {"X-Request-Id": "a" * 3000}, {"Authorization": "Bearer"}, {"Accept": "*"},
           {"Content-Type": "application/json; charset=latin-1"}, {"Content-Encoding": "gzip"},
           {"Sec-Fetch-Site": "cross-site"})
METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW")


@dataclass(frozen=True)
class Request:
    """method, path, body and headers, as they are sent."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


def requests(number: int, seed: int = SEED) -> Iterator[Request]:
    """`number` requests, the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(number):
        path, value = rng.choice(RIGHT)
        value = copy.deepcopy(value)
        for _ in range(rng.choice((1, 1, 1, 2, 3)) if value is not None else 0):
            value = _changed(value, rng)
        request = Request("POST" if value is not None else "GET", path, b"" if value is None else _text(value, rng))
        if rng.random() < 0.08:
            request = replace(request, headers={**request.headers, **rng.choice(HEADERS)})
        if rng.random() < 0.04:
            request = replace(request, method=rng.choice(METHODS))
        if rng.random() < 0.04:
            other = rng.choice((f"{path}/", path[:-1] or "/x", "//", f"{path}/x", f"{path}?a=%00"))
            request = replace(request, path=other)
        yield request


def _changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one change: something replaced, removed or added."""
    places: list[tuple[Any, Any]] = []

    def visit(inner: Any) -> None:
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ():
            places.append((inner, key))
            visit(inner[key])

    visit(value)
    if not places or rng.random() < 0.03:
        return rng.choice(JUNK)
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.5:
        holder[key] = copy.deepcopy(rng.choice(JUNK))
    elif kind < 0.65:
        del holder[key]
    elif isinstance(holder, dict):
        holder[rng.choice(NAMES)] = copy.deepcopy(rng.choice((*JUNK, holder[key])))
    else:
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice((*JUNK, holder[key]))))
    return value


def _text(value: Any, rng: random.Random) -> bytes:
    """The value as JSON text, sometimes damaged."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    kind, at = rng.random(), rng.randrange(len(text) + 1)
    if kind < 0.04:
        return text[:at]
    if kind < 0.08:
        return text[:at] + rng.randbytes(rng.randrange(1, 4)) + text[at:]
    if kind < 0.09:
        return text[:at] + b"[" * rng.choice((50, 5000)) + text[at:]
    return text


# ---- against a server ------------------------------------------------------------------------------------------------

def send(connect: Callable[[], HTTPConnection], request: Request) -> tuple[int, bytes]:
    """The status and the body of the answer; status 0 if there was no HTTP answer."""
    with closing(connect()) as connection:
        try:
            connection.request(request.method, request.path or "/", request.body or None, request.headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (http.client.HTTPException, OSError) as problem:
            return 0, repr(problem).encode()


def wrong(request: Request, status: int, body: bytes) -> str | None:
    """The fault of an answer that must never be given, or None."""
    if status in (0, 500) or status > 503 or b"Traceback" in body or b"an error inside the server" in body:
        return f"{request.method} {request.path} {request.body[:300]!r} {request.headers}: {status} {body[:200]!r}"
    return None


def run(
    connect: Callable[[], HTTPConnection], sent: Iterator[Request], clients: int = CLIENTS
) -> tuple[Counter[int], list[str]]:
    """Send the requests, some at once -> how often each status came, and the faults."""
    statuses: Counter[int] = Counter()
    found: list[str] = []

    def one(request: Request) -> None:
        status, body = send(connect, request)
        statuses[status] += 1
        if problem := wrong(request, status, body):
            found.append(problem)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, sent))
    return statuses, found


class Health:
    """A process that asks /health again and again, on one connection: the clients' threads must not delay it."""

    def __init__(self, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop, theirs = context.Pipe()
        self._process = context.Process(target=_ask_health, args=(port, theirs), daemon=True)
        self._process.start()
        theirs.close()       # so that the end of that process is an error here
        self._stop.recv()

    def stop(self) -> list[float]:
        """Seconds that each answer took."""
        self._stop.send(None)
        seconds: list[float] = self._stop.recv()
        self._process.join()
        return seconds


def _ask_health(port: int, pipe: Connection) -> None:
    seconds: list[float] = []
    with closing(HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        connection.connect()
        pipe.send(None)
        while not pipe.poll(0.02):
            start = time.perf_counter()
            ask(connection, "GET", "/health").read()
            seconds.append(time.perf_counter() - start)
    pipe.send(seconds)


def held(server: Server) -> dict[str, int]:
    """Threads and open files of the process, if the system reports them."""
    folder = Path(f"/proc/{server.process.pid}")
    return {name: len(list((folder / place).iterdir())) for name, place in (("threads", "task"), ("files", "fd"))
            if (folder / place).exists()}


def measure(path: Path, number: int, seed: int = SEED) -> dict[str, Any]:
    with Server(path, "--context", "512") as server:
        sent = list(requests(number, seed))
        first = round(number * WARM_UP)
        statuses, found = run(server.connect, iter(sent[:first]))
        warm, before = server.resident_bytes(), held(server)
        health = Health(server.port)
        start = time.perf_counter()
        more, worse = run(server.connect, iter(sent[first:]))
        seconds, took = time.perf_counter() - start, health.stop()
        end, after = server.resident_bytes(), held(server)
        server.stop()
    cuts = quantiles(took, n=100)
    return {
        "requests": number, "seed": seed, "clients": CLIENTS, "seconds": seconds,
        "statuses": {str(status): count for status, count in sorted((statuses + more).items())}, "wrong": [*found, *worse],
        "health": {"asked": len(took), "median_seconds": median(took), "p99_seconds": cuts[98], "max_seconds": max(took)},
        "resident_bytes_warm": warm, "resident_bytes_end": end, "held_before": before, "held_after": after,
    }


@click.command(help=__doc__.split("\n")[0])
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option("--requests", "number", default=10_000, show_default=True, help="How many to send.")
def main(model: Path | None, number: int) -> None:
    results = measure(model or edgemistral.demo_model(), number)
    health = results["health"]
    print(f"{number} requests in {results['seconds']:.0f} s: {results['statuses']}")
    print(f"wrong: {len(results['wrong'])}", *results["wrong"][:10], sep="\n  ")
    print(f"/health: median {health['median_seconds'] * 1e3:.1f} ms, p99 {health['p99_seconds'] * 1e3:.1f} ms, "
          f"longest {health['max_seconds'] * 1e3:.1f} ms of {health['asked']}")
    print(f"memory {harness.in_gb(results['resident_bytes_warm'])} to {harness.in_gb(results['resident_bytes_end'])}, "
          f"{results['held_before']} to {results['held_after']}")
    harness.save("server_fuzz", "python bench/server_fuzz.py", results)
    if results["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
