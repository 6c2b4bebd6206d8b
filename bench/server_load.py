"""Many clients at once, some of them hostile: checks every answer, and the server's memory and shutdown.

    python bench/server_load.py [MODEL]   # two minutes with the demo model, the default

The right answers are those of the Python API for the same messages and seed: both compute the same bits. So an answer that is
lost, mixed up with another or computed in a damaged cache is different.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

import click

import edgemistral
from bench import harness
from bench.server_process import CHAT, Server, ask, content, events
from training.travel import cities

CLIENTS, REQUESTS, WARM_UP = 50, 1000, 400
QUESTIONS, MAX_TOKENS = 60, 32
SAMPLING = {"temperature": 0.8, "top_p": 0.95}
MALFORMED = (   # body, headers, the expected status
    (b"{", {}, 422), (b"", {}, 422), (b"[" * 100_000, {}, 422), (b'{"messages": "\xff"}', {}, 422), (b"null", {}, 422),
    ({"messages": []}, {}, 422), ({"messages": [{"role": "user", "content": 5}]}, {}, 422),
    ({"messages": [{"role": "user", "content": "a"}], "temperature": -1}, {}, 422),
    ({"messages": [{"role": "user", "content": "word " * 50_000}]}, {}, 400),
    ({"messages": [{"role": "user", "content": "a"}]}, {"Content-Type": "text/plain"}, 415),
    ({"messages": [{"role": "user", "content": "a"}]}, {"Host": "evil.example"}, 403),
    ({"messages": [{"role": "user", "content": "a"}]}, {"Origin": "https://evil.example"}, 403),
    (b" " * (5 << 20), {}, 413),
)


@dataclass(frozen=True)
class Question:
    """A question, and the Python API's answers with the seed and greedily."""

    messages: list[dict[str, str]]
    seed: int
    answer: str
    greedy: str

    def body(self, **more: Any) -> dict[str, Any]:
        return {"messages": self.messages, "seed": self.seed, "max_tokens": MAX_TOKENS, **SAMPLING, **more}


def questions(path: Path, number: int) -> list[Question]:
    """`number` different questions with different answers."""
    asked, places = [], cities()
    with edgemistral.load(path) as model:
        for i in range(number):
            messages = [{"role": "user", "content": f"What should I see in {places[i].name}? " * (1 + i % 5)}]
            answer = "".join(model.chat(messages, MAX_TOKENS, seed=i, **SAMPLING))
            greedy = "".join(model.chat(messages, MAX_TOKENS, temperature=0))
            asked.append(Question(messages, i, answer, greedy))
    if len({question.answer for question in asked}) < number:
        raise click.ClickException("two questions have the same answer: a mix-up could not be seen")
    return asked


# ---- how clients behave: each asks and raises AssertionError when what comes back is wrong ------------------------------

def whole(connection: HTTPConnection, asked: list[Question], rng: random.Random) -> None:
    question = rng.choice(asked)
    response = ask(connection, "POST", CHAT, question.body())
    answer = json.loads(response.read())
    assert response.status == 200 and answer["choices"][0]["message"]["content"] == question.answer, answer


def streamed(connection: HTTPConnection, asked: list[Question], rng: random.Random) -> None:
    question = rng.choice(asked)
    _compare(ask(connection, "POST", CHAT, question.body(stream=True)), question, 0.0)


def read_slowly(connection: HTTPConnection, asked: list[Question], rng: random.Random) -> None:
    question = rng.choice(asked)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    _compare(ask(connection, "POST", CHAT, question.body(stream=True)), question, 0.02)


def three_at_once(connection: HTTPConnection, asked: list[Question], rng: random.Random) -> None:
    chosen = rng.sample(asked, 3)
    parameters = {"max_new_tokens": MAX_TOKENS, "do_sample": False}
    request = {"input_data": {"input_string": [question.messages for question in chosen], "parameters": parameters}}
    answer = json.loads(ask(connection, "POST", "/score", request).read())
    assert answer == [{str(i): question.greedy for i, question in enumerate(chosen)}], answer


def gone(connection: HTTPConnection, asked: list[Question], rng: random.Random) -> None:
    """Disconnects before or during the answer."""
    question, wanted = rng.choice(asked), rng.randrange(8)
    if wanted == 0:
        connection.request("POST", CHAT, json.dumps(question.body()), {"Content-Type": "application/json"})
    else:
        text = ""
        for event in events(ask(connection, "POST", CHAT, question.body(stream=True))):
            text += content(event)
            if (wanted := wanted - 1) == 0:
                break
        assert question.answer.startswith(text), text


def aborted(connection: HTTPConnection, asked: list[Question], rng: random.Random) -> None:
    question, text, ended = rng.choice(asked), "", ""
    response = ask(connection, "POST", CHAT, question.body(stream=True))
    name = response.headers["X-Request-Id"]
    for event in events(response):
        if not text and content(event):
            with closing(HTTPConnection(connection.host, connection.port)) as other:
                assert ask(other, "DELETE", f"/v1/requests/{name}").status in (200, 404)
        text += content(event)
        ended = event["error"]["code"] if "error" in event else event["choices"][0]["finish_reason"]
    assert question.answer.startswith(text) and (ended == "cancelled" or text == question.answer), (text, ended)


def malformed(connection: HTTPConnection, asked: list[Question], rng: random.Random) -> None:
    body, headers, status = rng.choice(MALFORMED)
    response = ask(connection, "POST", CHAT, body, headers)
    assert response.status == status and json.loads(response.read())["error"]["message"], response.status


def _compare(response: Any, question: Question, pause: float) -> None:
    text, reasons = "", []
    for event in events(response):
        time.sleep(pause)
        assert "error" not in event, event
        text += content(event)
        reasons += [choice["finish_reason"] for choice in event["choices"] if choice["finish_reason"]]
    assert response.status == 200 and text == question.answer and len(reasons) == 1, (text, reasons)


Behaviour = Callable[[HTTPConnection, list[Question], random.Random], None]
BEHAVIOURS: dict[Behaviour, int] = {   # and their shares in percent
    whole: 35, streamed: 20, read_slowly: 8, three_at_once: 7, gone: 12, aborted: 8, malformed: 10,
}


# ---- the measurement -------------------------------------------------------------------------------------------------

class Crowd:
    """Clients in threads; each asks one question after another."""

    def __init__(self, server: Server, asked: list[Question]) -> None:
        self.server, self.asked = server, asked
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.wrong: list[str] = []

    def run(self, clients: int, numbers: range) -> None:
        left = iter(numbers)   # next() of it is atomic
        threads = [threading.Thread(target=self._client, args=(left,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, left: Any) -> None:
        for number in left:
            rng = random.Random(number)
            [behaviour] = rng.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))
            start = time.perf_counter()
            try:
                with closing(self.server.connect()) as connection:
                    behaviour(connection, self.asked, rng)
            except (AssertionError, OSError, ValueError, KeyError) as error:
                self.wrong.append(f"request {number}, {behaviour.__name__}: {error!r:.500}")
            self.seconds[behaviour.__name__].append(time.perf_counter() - start)


def measure(
    path: Path, clients: int = CLIENTS, requests: int = REQUESTS, warm_up: int = WARM_UP, n_questions: int = QUESTIONS
) -> dict[str, Any]:
    asked = questions(path, n_questions)
    with Server(path) as server:
        crowd = Crowd(server, asked)
        start = time.perf_counter()
        crowd.run(clients, range(warm_up))
        warm = server.resident_bytes()
        crowd.run(clients, range(warm_up, requests))
        seconds, end = time.perf_counter() - start, server.resident_bytes()
        stop_seconds = server.stop()
    return {
        "clients": clients,
        "requests": requests,
        "warm_up": warm_up,
        "seconds": seconds,
        "behaviours": {
            name: {"requests": len(took), "median_seconds": median(took), "max_seconds": max(took)}
            for name, took in sorted(crowd.seconds.items())
        },
        "wrong": crowd.wrong,
        "resident_bytes_warm": warm,
        "resident_bytes_end": end,
        "growth": end / warm - 1 if warm and end else None,
        "stop_seconds": stop_seconds,
    }


def print_table(results: dict[str, Any]) -> None:
    print(f"{'':16}{'requests':>10}{'median':>10}{'longest':>10}")
    for name, row in results["behaviours"].items():
        print(f"{name:16}{row['requests']:10}{row['median_seconds']:8.2f} s{row['max_seconds']:8.2f} s")
    print(f"{results['clients']} clients, {results['requests']} requests in {results['seconds']:.0f} s")
    print(f"wrong: {len(results['wrong'])}", *results["wrong"][:10], sep="\n  ")
    growth = results["growth"]
    print(f"memory {harness.in_gb(results['resident_bytes_warm'])} after {results['warm_up']} requests",
          "" if growth is None else f"and {growth:+.1%} at the end")
    print(f"stopped within {results['stop_seconds']:.1f} s")


@click.command(help=__doc__.split("\n")[0])
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
def main(model: Path | None) -> None:
    results = measure(model or edgemistral.demo_model())
    print_table(results)
    harness.save("server_load", "python bench/server_load.py", results)
    if results["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
