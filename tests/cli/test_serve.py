"""edgemistral serve as a process of its own: its URL, its refusals in one line, and how it stops."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
from click.testing import CliRunner

import edgemistral
from edgemistral.cli import main
from edgemistral.demo import ABOUT
from edgemistral.server import runner
from tests.checkpoints import babbler
from tests.serving import wait_for

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ENDLESS = {"prompt": ["Hello"] * 256, "max_tokens": None, "logit_bias": {"2": -100}, "stream": True}
posix = pytest.mark.skipif(sys.platform == "win32", reason="no signals like these there")


@pytest.fixture(scope="module", autouse=True)
def demo():
    path = edgemistral.demo_model()
    with edgemistral.load(path) as model:
        model.engine.prefill([1])   # compiles
    return str(path)


@contextmanager
def served(*arguments, model="demo"):
    """A process that serves a model on a free port, and its URL."""
    command = [sys.executable, "-m", "edgemistral", "serve", model, "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), process.stderr.read()
            yield process, url
        finally:
            process.kill()


def ready(url):
    wait_for(lambda: httpx.get(f"{url}/health").status_code == 200, 60)


def stops(process, number, said=f"{ABOUT}\n"):
    """Within five seconds, with code 0 and without a word beyond what it said at its start."""
    start = time.monotonic()
    process.send_signal(number)
    assert process.wait(10) == 0
    assert time.monotonic() - start < 5
    assert process.stderr.read() == said


@posix
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_it_serves_and_stops(number):
    with served("--context", "256", "--threads", "1") as (process, url):
        ready(url)
        [card] = httpx.get(f"{url}/v1/models").json()["data"]
        assert card["max_model_len"] == 256
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "seed": 1}
        answer = httpx.post(f"{url}{CHAT}", json=body, timeout=30)
        with edgemistral.load(edgemistral.demo_model()) as model:
            assert answer.json()["choices"][0]["message"]["content"] == "".join(model.chat(body["messages"], 5, seed=1))
        assert "server" not in answer.headers
        stops(process, getattr(signal, number))


@posix
def test_it_stops_while_it_loads():
    with served() as (process, _):
        stops(process, signal.SIGTERM)


@posix
def test_it_stops_in_the_middle_of_an_answer_that_nobody_reads(tmp_path):
    with served("--max-body", "8MiB", model=babbler(tmp_path)) as (process, url), socket.socket() as unread:
        ready(url)
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        unread.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        # The echo alone is more than the 4 MB that the system takes from the server for a client that does not read.
        body = json.dumps({**ENDLESS, "prompt": ["everything " * 1700] * 256, "echo": True}).encode()
        unread.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body)
        unread.settimeout(10)
        assert unread.recv(12) == b"HTTP/1.1 200"
        with httpx.stream("POST", f"{url}{COMPLETIONS}", json={**ENDLESS, "echo": True}, timeout=30) as stream:
            lines = stream.iter_lines()
            assert "Hello" in next(lines)
            stops(process, signal.SIGINT, "")
            *_, last = (line for line in lines if line)
        assert "shutting down" in last


@posix
def test_a_second_ctrl_c_stops_at_once():
    with served() as (process, url):
        ready(url)
        with httpx.stream("POST", f"{url}{COMPLETIONS}", json=ENDLESS, timeout=30) as stream:
            next(stream.iter_lines())
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(10) in (0, -signal.SIGINT)   # the interpreter itself may have been at its end
            assert time.monotonic() - start < 2


def error_of(*arguments, code=2):
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code == code, result.output
    assert result.stdout == ""   # no URL
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.safetensors"], "there is no file nope.safetensors"),
        ([__file__], "test_serve.py"),
        (["demo", "--port", "70000"], "--port"),
        (["demo", "--host", "0.0.0.0"], "needs --api-key (or --insecure)"),
        (["demo", "--host", "::"], "needs --api-key (or --insecure)"),
        (["demo", "--host", ""], "needs --api-key (or --insecure)"),
        (["demo", "--host", "example.com"], "needs --api-key (or --insecure)"),
        (["demo", "--api-key", ""], "API key"),
        (["demo", "--allow-origin", "*"], "'*' is not an origin"),
        (["demo", "--context", "0"], "context is 0"),
        (["demo", "--context", "99999999"], "context is 99999999"),
        (["demo", "--threads", "0"], "threads is 0"),
        (["demo", "--kv-bits", "5"], "--kv-bits"),
        (["demo", "--queue", "0"], "--queue"),
        (["demo", "--max-body", "lots"], "'lots' is not a size"),
        (["demo", "extra"], "unexpected extra argument"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    assert message in error_of(*arguments)


def test_over_the_memory_budget_is_refused_before_the_port_opens():
    assert "more than the budget of 1048576" in error_of("demo", "--max-ram", "1MiB", code=1)


def test_an_address_that_cannot_be_had_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}: " in error_of("demo", "--port", port, code=1)
    for host in ("no.such.host.invalid", "a..b", "203.0.113.7"):   # the last is another computer's
        assert f"cannot listen on {host} port 8080: " in error_of("demo", "--host", host, "--insecure", code=1)


def test_a_model_that_fails_to_load_is_one_line(monkeypatch):
    monkeypatch.setattr("edgemistral.model.load", lambda *_, **__: {}["missing"])
    result = CliRunner().invoke(main, ["serve", "demo", "--port", "0"])
    assert result.exit_code == 1 and "KeyError: 'missing'" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::1", "http://[::1]:80"),
     ("::", "http://[::1]:80"), ("localhost", "http://localhost:80")],
)
def test_the_url(host, url):
    assert runner._url(host, 80) == url


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    assert runner._is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.0.1", "localhost.example.com", "::ffff:0.0.0.0"])
def test_all_else_does(host):
    assert not runner._is_loopback(host)


def test_small_answers_leave_at_once():
    """asyncio turns Nagle's algorithm off only on sockets that are marked as TCP."""
    with runner._listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP
