"""What HTTP costs: the time to the first text and the time of a token, over the Python API's, for the same prompts in turns.

    python bench/server_overhead.py WORK          # the 7B that bench/seven_b.py left in WORK; five minutes
    python bench/server_overhead.py WORK --model demo

Each prompt is asked in this process and of a server beside it, one after the other, in changing order. Both have the same
threads and the same cache, so what differs is the road of the request and of the text. The last part asks /health while a
long prompt is read.
"""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import click
import harness
from server_process import CHAT, Server, ask, content, events
from tqdm import tqdm

import edgemistral
from edgemistral.model import Model

ROUNDS = 21
TOKENS = 32
LONG_PROMPT = 1024   # words
HEALTH_PAUSE = 0.02
Times = tuple[float, float]   # seconds to the first text, and from there to the end


def options(model: Model) -> dict[str, Any]:
    """Greedy, and never the end."""
    return {"temperature": 0, "logit_bias": {model.config.eos_id: -100}}


def ask_api(model: Model, messages: list[dict[str, str]]) -> Times:
    start = time.perf_counter()
    reply = model.chat(messages, TOKENS, **options(model))
    next(reply)
    first = time.perf_counter()
    for _ in reply:
        pass
    return first - start, time.perf_counter() - first


def ask_server(server: Server, model: Model, messages: list[dict[str, str]]) -> Times:
    body = {"messages": messages, "max_tokens": TOKENS, "stream": True, **options(model)}
    with closing(server.connect()) as connection:
        start, first = time.perf_counter(), 0.0
        for event in events(ask(connection, "POST", CHAT, body)):
            if not first and content(event):
                first = time.perf_counter()
            elif event["choices"][0]["finish_reason"]:
                end = time.perf_counter()
    return first - start, end - first


def measure(path: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    api, http = [], []
    with edgemistral.load(path) as model, Server(path) as server:
        for number in tqdm(range(-2, rounds), disable=None):   # two to warm up
            messages = [{"role": "user", "content": f"{number}: what should I see in Paris?"}]
            order = [lambda m=messages: api.append(ask_api(model, m)),
                    lambda m=messages: http.append(ask_server(server, model, m))]
            for measured in order if number % 2 else reversed(order):
                measured()
            if number < 0:
                api.clear()
                http.clear()
        health = ask_health(server)
        server.stop()
    first = [(b[0] - a[0]) for a, b in zip(api, http, strict=True)]
    decode = [b[1] / a[1] for a, b in zip(api, http, strict=True)]
    return {
        "rounds": rounds,
        "tokens": TOKENS,
        "first_text_seconds": {"api": median(a for a, _ in api), "server": median(a for a, _ in http)},
        "token_seconds": {"api": median(b for _, b in api) / (TOKENS - 1), "server": median(b for _, b in http) / (TOKENS - 1)},
        "first_text_added_seconds": _spread(first),
        "decode_ratio": _spread(decode),
        "health_seconds": {"asked": len(health), "median": median(health), "max": max(health)},
    }


def ask_health(server: Server) -> list[float]:
    """Seconds that /health takes while a long prompt is read."""
    body = {"messages": [{"role": "user", "content": "see " * LONG_PROMPT}], "max_tokens": 1}
    taken = []
    with closing(server.connect()) as busy, closing(server.connect()) as connection:
        reading = threading.Thread(target=lambda: ask(busy, "POST", CHAT, body).read())
        reading.start()
        while reading.is_alive():
            start = time.perf_counter()
            ask(connection, "GET", "/health").read()
            taken.append(time.perf_counter() - start)
            time.sleep(HEALTH_PAUSE)
    return taken


def _spread(values: list[float]) -> dict[str, float]:
    ordered, quarter = sorted(values), len(values) // 4
    return {"median": median(ordered), "lower_quartile": ordered[quarter], "upper_quartile": ordered[-1 - quarter]}


def print_table(results: dict[str, Any]) -> None:
    first, token = results["first_text_seconds"], results["token_seconds"]
    added, ratio, health = results["first_text_added_seconds"], results["decode_ratio"], results["health_seconds"]
    print(f"{'':14}{'Python API':>12}{'server':>12}{'':4}pairs: median (quartiles)")
    print(f"{'first text':14}{1000 * first['api']:9.2f} ms{1000 * first['server']:9.2f} ms    {1000 * added['median']:+.2f} ms "
          f"({1000 * added['lower_quartile']:+.2f} to {1000 * added['upper_quartile']:+.2f})")
    print(f"{'a token':14}{1000 * token['api']:9.2f} ms{1000 * token['server']:9.2f} ms    {ratio['median'] - 1:+.2%} "
          f"({ratio['lower_quartile'] - 1:+.2%} to {ratio['upper_quartile'] - 1:+.2%})")
    print(f"/health while a prompt is read: median {1000 * health['median']:.1f} ms, longest {1000 * health['max']:.1f} ms "
          f"of {health['asked']}")


@click.command(help=__doc__.split("\n")[0])
@harness.work_argument
@click.option("--model", type=click.Path(path_type=Path), help="Another blob, or demo.  [default: WORK/7b-q4.safetensors]")
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True)
def main(work: Path, model: Path | None, rounds: int) -> None:
    path = edgemistral.demo_model() if str(model) == "demo" else model or work / "7b-q4.safetensors"
    if not path.exists():
        raise click.ClickException(f"{path} is missing: bench/seven_b.py makes it")
    results = measure(path, rounds)
    print_table(results)
    if str(model) == "demo":
        harness.save("server_overhead_demo", "python bench/server_overhead.py WORK --model demo", results)
    elif model is None:
        harness.save("server_overhead", "python bench/server_overhead.py WORK", results)


if __name__ == "__main__":
    main()
