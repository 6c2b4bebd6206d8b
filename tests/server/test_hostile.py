"""What nobody should send: odd HTTP, endless heads, bodies, numbers that fit nowhere, hostile schemas, senseless settings."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path

import httpx
import openai
import pytest

from edgemistral.server import create_app, runner
from tests.serving import CHAT, HTTP, USER, Server, fake_model, serving


@pytest.fixture
def server():
    with Server() as server:
        yield server


def request_bytes(method="POST", path=CHAT, version="1.1", body=b"", *headers):
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", "Content-Type: application/json",
             f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_a_client_of_http_1_0_gets_its_stream(server):
    body = json.dumps({"messages": USER, "max_tokens": 3, "stream": True}).encode()
    head, _, answer = server.raw(request_bytes(version="1.0", body=body)).partition(b"\r\n\r\n")
    assert b" 200 " in head and b"chunked" not in head.lower()
    assert answer.startswith(b"data: {") and answer.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),                                            # no Host
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET /health HTTP/1.0\r\nConnection: close\r\n\r\n", 403),                       # in 1.0 it may be missing
        (request_bytes("HEAD", "/health", "1.1", b"", "Connection: close"), 200),
        (request_bytes("OPTIONS", "/health", "1.1", b"", "Connection: close"), 405),
        (request_bytes("PUT", "/score", "1.1", b"{}", "Connection: close"), 405),
        (request_bytes("BREW", "/score", "1.1", b"{}", "Connection: close"), 405),
        (request_bytes("GET", "/nothing", "1.1", b"", "Connection: close"), 404),
        (b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5\r\n"
         b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n", 422),          # chunked wins; nothing is smuggled
        (b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
         b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
def test_odd_http_is_answered_once(server, content, status):
    answer = server.raw(content)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1
    assert HTTP.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("head", [b"GET /" + b"x" * 2_000_000, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2_000_000,
                                  b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: x\r\n" * 300_000])
def test_an_endless_head_is_given_up(server, head):
    with contextlib.suppress(OSError):   # closed while we send
        assert server.raw(head).startswith(b"HTTP/1.1 400 ")
    assert HTTP.get(f"{server.url}/health").status_code == 200


def test_a_head_that_does_not_come_is_given_up(server, monkeypatch):
    monkeypatch.setattr(runner, "HEAD_SECONDS", 0.3)
    for beginning in (b"", b"GET /health HTTP/1.1\r\nHost: loc"):
        with socket.create_connection(server.address, timeout=60) as connection:
            start = time.monotonic()
            connection.sendall(beginning)
            for _ in range(3):   # byte by byte does not help
                time.sleep(0.08)
                connection.sendall(b"a" if beginning else b"")
            assert connection.recv(1000) == b""
            assert time.monotonic() - start > 0.2


def test_a_slow_answer_is_no_slow_head(server, monkeypatch):
    monkeypatch.setattr(runner, "HEAD_SECONDS", 0.1)
    with httpx.Client(base_url=server.url) as client:
        for _ in range(2):   # also on a connection that is used again
            answer = client.post(CHAT, json={"messages": USER, "max_tokens": 40, "logit_bias": {"2": -100}})
            assert answer.json()["usage"]["completion_tokens"] == 40


def test_a_body_that_is_too_large_is_told_to_a_client_that_still_sends():
    with Server(max_body=1000) as server:
        for _ in range(5):
            assert server.post({"messages": [{"role": "user", "content": "x" * 20_000_000}]}).status_code == 413
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client, pytest.raises(
                openai.APIStatusError) as error:
            client.completions.create(model="any", prompt="x" * 5_000_000)
        assert error.value.status_code == 413 and error.value.code == "body_too_large"


def test_numbers_that_fit_nowhere(server):
    huge = "1" + "0" * 400
    def post(path, text):
        return HTTP.post(f"{server.url}{path}", content=text, headers={"content-type": "application/json"})

    chat = '{"messages": [{"role": "user", "content": "a"}], NAME: NUMBER}'
    for field in ("temperature", "top_p", "seed", "max_tokens", "top_k"):
        for number in (huge, "1" * 5000, "-Infinity"):
            answer = post(CHAT, chat.replace("NAME", f'"{field}"').replace("NUMBER", number))
            assert answer.status_code == 422, (field, answer.text)
    assert post(CHAT, chat.replace("NAME", '"logit_bias"').replace("NUMBER", f'{{"5": {huge}}}')).status_code == 422
    for field in ("temperature", "seed", "top_k", "repetition_penalty"):
        text = f'{{"input_data": {{"input_string": ["a"], "parameters": {{"{field}": {huge}}}}}}}'
        answer = post("/score", text)
        assert answer.status_code == 422 and field in answer.json()["error"]["param"]


def test_an_enormous_limit_is_the_end_of_the_context():
    with Server(seconds=0) as server:
        body = {"messages": USER, "max_tokens": (1 << 63) - 1, "logit_bias": {"2": -100}}
        answer = server.post(body).json()
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == 513


def test_a_schema_may_be_nested_deeply_or_be_hostile(server):
    def nested(depth):
        return json.loads('{"type": "array", "items": ' * depth + '{"type": "null"}' + "}" * depth)

    for schema in (nested(200), nested(900 // 2), {"$ref": "#"}, {"pattern": "(a{0,1000}){0,1000}", "type": "string"},
                   {"enum": list(range(50_000))}, {"type": "string", "minLength": 10**12}):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = server.post({"messages": USER, "max_tokens": 2, "response_format": wanted})
        assert answer.status_code in (200, 422), answer.text
    for grammar in ("root ::= " + "(" * 30_000, 'root ::= "a" root | root "b"', "start: " + "a?" * 20_000, "root ::= root"):
        answer = server.post({"messages": USER, "max_tokens": 2, "grammar": grammar})
        assert answer.status_code in (200, 422), answer.text


def test_warnings_fit_into_a_header(server):
    answer = server.post({"messages": USER, "max_tokens": 1, **{f"name {i} " + "é" * 100: 1 for i in range(5000)}})
    assert answer.status_code == 200 and 100 < len(answer.headers["warnings"]) <= 1000


def test_warnings_name_fields_inside_of_others(server):
    message = {**USER[0], "weight": 1, "cache_control": None, "content": [{"type": "text", "text": "a", "citations": True}]}
    answer = server.post({"messages": [*USER, message], "max_tokens": 1, "stream_options": {"chunks": 2}, "mood": "good"})
    assert answer.headers["warnings"] == "; ".join(f"{name} is not known and was ignored" for name in (
        "mood", "stream_options.chunks", "messages[1].weight", "messages[1].content[0].citations"))


@pytest.mark.parametrize("name", ["", " ", "\t", "\u2003", "x" * 990 + "   " * 10, "\x89"])
def test_any_name_fits_into_a_header(server, name):
    assert "not known" in server.post({"messages": USER, "max_tokens": 1, name: 1}).headers["warnings"] or len(name) > 900
    sample = {"input_data": {"input_string": ["a"], "parameters": {"max_new_tokens": 1}}}
    assert server.post({**sample, name: 1}, "/score").status_code == 200


def test_score_has_limits_of_its_own(server):
    def refused(items, **parameters):
        answer = server.post({"input_data": {"input_string": items, "parameters": parameters}}, "/score")
        return answer.json()["error"]["param"] if answer.status_code == 422 else answer.status_code

    assert refused(["a"] * 257) == "input_data.input_string"
    assert refused(["a"] * 200_000) == "input_data.input_string"
    assert refused([USER[0]] * 257, per_message=True) == "input_data.input_string"
    for stop in (["a"] * 17, ["a" * 1001], "a" * 1001):
        assert refused(["a"], stop=stop) == "input_data.parameters.stop"


def test_invented_methods_and_paths_leave_no_trace_in_the_metrics(server):
    for name in ("BREW", "FROTH"):
        HTTP.request(name, f"{server.url}/{name}")
    text = HTTP.get(f"{server.url}/metrics").text
    assert "BREW" not in text and 'method="other",path="other"' in text


def test_a_file_name_that_is_no_text_can_be_told():
    model = fake_model()
    model.path = Path("caf\udce9.safetensors")
    with serving(create_app(model)) as url:
        assert HTTP.get(f"{url}/health").json()["model"] == "caf?"
        assert HTTP.post(f"{url}{CHAT}", json={"messages": USER, "max_tokens": 1}).json()["model"] == "caf?"


@pytest.mark.parametrize("settings", [{"queue": 0}, {"max_body": 0}, {"api_key": "two words"}, {"api_key": "clé"}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match="must be"):
        create_app(fake_model(), **settings)


def test_origins_may_come_from_an_iterator_and_hosts_with_a_port():
    app = create_app(fake_model(), allow_origins=iter(["https://app.example.com"]), allow_hosts=iter(["Box.local:8080"]))
    with serving(app) as url:
        headers = {"origin": "https://app.example.com", "host": "box.local:8080"}
        assert HTTP.get(f"{url}/health", headers=headers).status_code == 200
