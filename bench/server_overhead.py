"""The cost of HTTP: time to the first text and time per token, compared with the Python API, for the same prompts in turns.

    python bench/server_overhead.py WORK          # the 7B that bench/seven_b.py left in WORK; five minutes
    python bench/server_overhead.py WORK --model demo

Each prompt goes to the Python API in two processes and to a server, one after another, in changing order. All have the same
threads and the same cache. The second process is the control: only the place of its memory differs, so its difference from
the first one is noise. Two figures have no such noise: the road, which is the time to the first text without the engine's time
for the first token; and the processor time of the server's event loop, the most that decoding can lose to it. The last part
requests /health while a long prompt is read.
"""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import click
from tqdm import tqdm

import edgemistral
from bench import harness
from bench.server_process import CHAT, Server, ask, content, events
from edgemistral.model import Model

ROUNDS = 21
TOKENS = 32
LONG_PROMPT = 1024   # words
HEALTH_PAUSE = 0.02


@dataclass(frozen=True)
class Answer:
    """Seconds of one answer."""

    first: float    # to the first text
    road: float     # the part outside of the engine
    gaps: tuple[float, ...]   # between one piece of text and the next
    loop: float | None = None # processor time of the server's event loop


def options(model: Model) -> dict[str, Any]:
    """Greedy, without an end of turn."""
    return {"temperature": 0, "logit_bias": {model.config.eos_id: -100}}


def ask_api(model: Model, text: str) -> Answer:
    start = time.perf_counter()
    reply = model.chat([{"role": "user", "content": text}], TOKENS, **options(model))
    next(reply)
    arrivals = [time.perf_counter(), *(time.perf_counter() for _ in reply)]
    return answer(start, arrivals, reply.usage.prefill_seconds)


def answer(start: float, arrivals: list[float], engine: float) -> Answer:
    gaps = tuple(after - before for before, after in itertools.pairwise(arrivals))
    return Answer(arrivals[0] - start, arrivals[0] - start - engine, gaps)


def ask_server(server: Server, model: Model, text: str) -> Answer:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "stream": True,
            "stream_options": {"include_usage": True}, **options(model)}
    with closing(server.connect()) as connection:
        before, start, arrivals, engine = server.loop_seconds(), time.perf_counter(), [], 0.0
        for event in events(ask(connection, "POST", CHAT, body)):
            if content(event):
                arrivals.append(time.perf_counter())
            elif "timings" in event:
                engine = event["timings"]["prefill_seconds"]
    after = server.loop_seconds()
    loop = None if before is None or after is None else after - before
    return replace(answer(start, arrivals, engine), loop=loop)


def control(path: str, connection: Connection) -> None:
    """The main function of the second process: answers requests."""
    with edgemistral.load(path) as model:
        while (text := connection.recv()) is not None:
            connection.send(ask_api(model, text))


def measure(path: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    second = context.Process(target=control, args=(str(path), there), daemon=True)
    second.start()

    def ask_control(text: str) -> Answer:
        here.send(text)
        return here.recv()

    answers: dict[str, list[Answer]] = {"api": [], "control": [], "server": []}
    with edgemistral.load(path) as model, Server(path) as server:
        ask_one = {"api": partial(ask_api, model), "control": ask_control, "server": partial(ask_server, server, model)}
        orders = list(itertools.permutations(ask_one))
        for number in tqdm(range(-2, rounds), disable=None):   # two to warm up
            for name in orders[number % len(orders)]:
                answers[name].append(ask_one[name](f"{number}: what should I see in Paris?"))
        health = ask_health(server)
        here.send(None)
        server.stop()
    second.join()
    answers = {name: each[2:] for name, each in answers.items()}
    api, *others = answers.values()

    def added(what: str, other: list[Answer]) -> dict[str, float]:
        return _spread([getattr(b, what) - getattr(a, what) for a, b in zip(api, other, strict=True)])

    def slower(other: list[Answer]) -> dict[str, float]:
        """The time of a piece relative to that of the same piece from the API."""
        return _spread([y / x for a, b in zip(api, other, strict=True) for x, y in zip(a.gaps, b.gaps, strict=False)])

    def undisturbed(other: list[Answer]) -> float:
        """The fastest tenth, which other programs have not disturbed."""
        fastest = [sorted(gap for each in of for gap in each.gaps) for of in (api, other)]
        return median(fastest[1][: len(fastest[1]) // 10]) / median(fastest[0][: len(fastest[0]) // 10])

    return {
        "rounds": rounds,
        "tokens": TOKENS,
        **{name: {
            "first_text_seconds": median(a.first for a in got), "road_seconds": median(a.road for a in got),
            "token_seconds": median(gap for a in got for gap in a.gaps),
        } for name, got in answers.items()},
        **{f"{name}_added": {
            "first_text_seconds": added("first", other), "road_seconds": added("road", other),
            "decode_ratio": slower(other), "undisturbed_decode_ratio": undisturbed(other),
        } for name, other in zip(("control", "server"), others, strict=True)},
        "loop_seconds_of_a_token": median(a.loop / TOKENS for a in answers["server"]) if answers["server"][0].loop else None,
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
    for name in ("api", "control", "server"):
        r, added = results[name], results.get(f"{name}_added")
        print(f"{name:8} first text {1000 * r['first_text_seconds']:9.2f} ms, road {1000 * r['road_seconds']:6.2f} ms, "
              f"a token {1000 * r['token_seconds']:7.2f} ms")
        if added:
            for what, unit in (("first_text_seconds", 1000), ("road_seconds", 1000), ("decode_ratio", 1)):
                s = added[what]
                print(f"    {what:20}{unit * s['median']:+9.3f} ({unit * s['lower_quartile']:+.3f} to "
                      f"{unit * s['upper_quartile']:+.3f})")
            print(f"    decode_ratio, the fastest tenth {added['undisturbed_decode_ratio']:.4f}")
    if loop := results["loop_seconds_of_a_token"]:
        print(f"event loop: {1000 * loop:.3f} ms of processor time a token, {loop / results['api']['token_seconds']:.2%} of it")
    health = results["health_seconds"]
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
