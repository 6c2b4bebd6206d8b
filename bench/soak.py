"""python bench/soak.py HOURS: a real server with the demo model under mixed load; answers and growth of memory are checked.

Clients chat, stream, fork conversations, disconnect during an answer, read slowly and use sessions; now and then another
process loads the model. Every answer is greedy, so it must be the text that a quiet server gave to the same messages: any other
text is a mixed answer. Memory, open files, threads and temporary bytes are sampled. Adds to bench/results/soak.json.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import httpx

from bench import harness

RECORD = harness.RESULTS / "soak.json"
CLIENTS, TOPICS, EVERY = 6, 40, 5.0
PLACES = ("Paris", "Rome", "Berlin", "Kyoto", "Lima", "Cairo", "Oslo", "Delhi", "Prague", "Boston")


class Soak:
    def __init__(self, url: str, pid: int, work: Path) -> None:
        self.url, self.pid, self.work = url, pid, work
        self.counts: Counter[str] = Counter()
        self.mixed: list[str] = []
        self.samples: list[dict[str, float]] = []
        self.stop = threading.Event()
        self.conversations = [self._conversation(number) for number in range(TOPICS)]
        self.answers = [self._ask(messages) for messages in self.conversations]      # quiet: one after another

    def _conversation(self, number: int) -> list[dict[str, str]]:
        place = PLACES[number % len(PLACES)]
        shared = [{"role": "user",
            "content": f"I am going to {place}. " + "What should I see there? " * (1 + number // 10 * 8)}]
        more = [{"role": "assistant", "content": "There is a lot to see."},
            {"role": "user", "content": f"Tell me {number} things."}]
        return shared + more if number % 3 else shared

    def _body(self, messages: list[dict[str, str]], **more: Any) -> dict[str, Any]:
        return {"messages": messages, "max_tokens": 24, "temperature": 0, **more}

    def _ask(self, messages: list[dict[str, str]], **more: Any) -> str:
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=self._body(messages, **more), timeout=120)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"])

    def _stream(self, messages: list[dict[str, str]], pause: float, leave: int | None) -> str | None:
        text, pieces = "", 0
        body = self._body(messages, stream=True)
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                pieces += 1
                time.sleep(pause)
                if leave is not None and pieces >= leave:
                    return None
        return text

    def client(self, number: int) -> None:
        chance = random.Random(number)
        while not self.stop.is_set():
            which = chance.randrange(TOPICS)
            messages, wanted = self.conversations[which], self.answers[which]
            kind = chance.choice(("chat", "chat", "stream", "slow", "leave", "session", "hang up"))
            try:
                if kind == "hang up":
                    self._hang_up(messages)
                    got: str | None = None
                elif kind in ("chat", "session"):
                    more = {"session": f"s{which}-{number}"} if kind == "session" else {}
                    got = self._ask(messages, **more)
                else:
                    got = self._stream(messages, 0.02 if kind == "slow" else 0,
                        chance.randint(1, 8) if kind == "leave" else None)
            except (httpx.HTTPError, OSError) as error:
                self.counts[f"failed: {type(error).__name__}"] += 1
                continue
            self.counts[kind] += 1
            if got is not None and got != wanted:
                self.mixed.append(f"{kind} {which}: {got!r} instead of {wanted!r}")

    def _hang_up(self, messages: list[dict[str, str]]) -> None:
        body = json.dumps(self._body(messages, stream=True)).encode()
        with socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2]))) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                               b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            time.sleep(0.05)

    def sample(self, since: float) -> None:
        status = dict(line.split(":",
            1) for line in Path(f"/proc/{self.pid}/status").read_text("utf-8").splitlines() if ":" in line)
        self.samples.append({
            "seconds": round(time.monotonic() - since, 1), "anonymous_bytes": int(status["RssAnon"].split()[0]) * 1024,
            "threads": int(status["Threads"]), "files": len(os.listdir(f"/proc/{self.pid}/fd")),  # noqa: PTH208
            "disk_bytes": sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file()),
        })

    def run(self, seconds: float) -> None:
        threads = [threading.Thread(target=self.client, args=(number,)) for number in range(CLIENTS)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        loads = 0
        while time.monotonic() - begun < seconds:
            self.sample(begun)
            time.sleep(EVERY)
            if time.monotonic() - begun > 60 * (loads + 1):      # another process loads the model, and ends
                subprocess.run([*harness.EDGEMISTRAL, "run", "demo", "Hello", "--greedy", "--max-new-tokens", "4"],
                               check=True, capture_output=True)
                loads += 1
        self.stop.set()
        for thread in threads:
            thread.join()
        self.counts["model loads"] += loads
        self.sample(begun)


def grown(samples: list[dict[str, float]], name: str) -> float:
    """Growth after the first quarter: median of the last tenth over that of the tenth after the first quarter, minus 1."""
    n, part = len(samples), max(1, len(samples) // 10)
    values = [sample[name] for sample in samples]
    first, last = sorted(values[n // 4 : n // 4 + part]), sorted(values[-part:])
    return last[len(last) // 2] / first[len(first) // 2] - 1


@click.command(help=__doc__.split("\n")[0])
@click.argument("hours", type=float, default=2.0)
def main(hours: float) -> None:
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        command = [*harness.EDGEMISTRAL, "serve", "demo", "--port", "0", "--session-dir", f"{work}/sessions",
                   "--kv-budget", "64MiB", "--kv-store-quota", "256MiB", f"--kv-store={work}/store"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                url = server.stdout.readline().strip()
                while httpx.get(f"{url}/health").status_code != 200:
                    time.sleep(0.1)
                soak = Soak(url, server.pid, Path(work))
                soak.run(3600 * hours)
            finally:
                server.terminate()
                errors = server.communicate()[1]
    result = {
        "hours": round(soak.samples[-1]["seconds"] / 3600, 3), "requests": dict(soak.counts), "mixed": len(soak.mixed),
        "grown": {name: round(grown(soak.samples, name), 4) for name in ("anonymous_bytes", "threads", "files", "disk_bytes")},
        "tracebacks": errors.count("Traceback"), "first": soak.samples[len(soak.samples) // 4], "last": soak.samples[-1],
        "megabytes": [round(one["anonymous_bytes"] / 1e6, 2) for one in soak.samples[:: max(1, len(soak.samples) // 120)]],
        "commit": harness.commit(), "machine": harness.machine()["cpu"],
    }
    print(json.dumps(result, indent=1), *soak.mixed[:5], sep="\n")
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"runs": []}
    record |= {"runs": [*record["runs"], result], "commit": result["commit"], "command": "python bench/soak.py HOURS"}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(soak.mixed or result["tracebacks"]))


if __name__ == "__main__":
    main()
