"""What happens while answers are under way: aborts, clients that go away, signs of life, queues, odd HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from serving import fake_model, serving, wait_for

import edgemistral
from edgemistral.errors import BadInput
from edgemistral.server import create_app, runner, service

USER = [{"role": "user", "content": "Where is it?"}]
LONG = [{"role": "user", "content": "Where is it? " * 60}]   # about 400 tokens
CHAT = "/v1/chat/completions"
ENDLESS = {"messages": USER, "max_tokens": 400, "seed": 1, "stream": True, "logit_bias": {"2": -100}}


class Server:
    """A server over a fake model, with what the tests look at."""

    def __init__(self, seconds=0.01, chunk=64, **settings):
        self.model = fake_model(seconds, chunk=chunk)
        self.transformer = self.model.engine._transformer
        self.app = create_app(self.model, **settings)
        self.scheduler = self.app.state.service.scheduler
        self._serving = serving(self.app)

    def __enter__(self):
        self.url = self._serving.__enter__()
        return self

    def __exit__(self, *error):
        return self._serving.__exit__(*error)

    @property
    def address(self):
        return "127.0.0.1", int(self.url.rpartition(":")[2])

    def idle(self):
        wait_for(lambda: not self.scheduler.running and not self.scheduler.waiting)

    def stops_within(self, calls, action):
        """After the action, at most so many more calls of the model."""
        before = len(self.transformer.calls)
        action()
        self.idle()
        assert len(self.transformer.calls) <= before + calls

    def post(self, body, path=CHAT, **headers):
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=30)

    def raw(self, content):
        """Everything that comes back for these bytes."""
        with socket.create_connection(self.address, timeout=5) as connection:
            connection.sendall(content)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.fixture
def server():
    with Server() as server:
        yield server


def texts(response):
    """The text of a stream so far, piece by piece."""
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])["choices"][0]["delta"].get("content", "")


# ---- aborts ----------------------------------------------------------------------------------------------------------

def test_closing_a_stream_stops_the_answer_within_a_token(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="any", **ENDLESS)
        next(piece for piece in stream if piece.choices[0].delta.content)
        server.stops_within(3, stream.close)   # one under way, and what the news takes to arrive


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_away_while_its_prompt_is_read_stops_it_within_a_chunk(streamed):
    with Server(seconds=0.05, chunk=8) as server:
        body = json.dumps({"messages": LONG, "stream": streamed}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(server.address)
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: len(server.transformer.calls) > 2)
        server.stops_within(2, connection.close)
        assert len(server.transformer.calls) < 20   # of 50


def test_a_client_that_goes_away_leaves_the_queue(server):
    with httpx.stream("POST", f"{server.url}{CHAT}", json=ENDLESS) as first:
        pieces = texts(first)   # which would close the connection when it is thrown away
        next(pieces)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}{CHAT}", json={"messages": LONG}, timeout=0.2)
        wait_for(lambda: not server.scheduler.waiting)
        assert server.scheduler.running
    server.idle()
    assert max(map(len, server.transformer.calls)) < 64   # of the long prompt nothing was read


@pytest.mark.parametrize("named", [False, True])
def test_an_abort_by_id_ends_the_stream_with_an_error_and_touches_no_other(server, named):
    expected = "".join(fake_model().chat(USER, 30, seed=5))
    with ThreadPoolExecutor(1) as pool:
        headers = {"x-request-id": "mine"} if named else {}
        with httpx.stream("POST", f"{server.url}{CHAT}", json=ENDLESS, headers=headers) as stream:
            lines = stream.iter_lines()
            chunk = json.loads(next(line for line in lines if line.startswith("data: "))[6:])
            assert chunk["id"] == stream.headers["x-request-id"] and (chunk["id"] == "mine") == named
            other = pool.submit(server.post, {"messages": USER, "max_tokens": 30, "seed": 5})
            wait_for(lambda: server.scheduler.waiting)
            answer = httpx.delete(f"{server.url}/v1/requests/{chunk['id']}")
            assert answer.status_code == 200 and answer.json() == {"id": chunk["id"], "cancelled": True}
            last = [line for line in lines if line][-1]
            assert json.loads(last[6:])["error"]["code"] == "cancelled"
        assert other.result(20).json()["choices"][0]["message"]["content"] == expected
    assert httpx.delete(f"{server.url}/v1/requests/{chunk['id']}").status_code == 404


def test_an_aborted_request_that_was_not_streamed_answers_499(server):
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, {**ENDLESS, "stream": False}, **{"x-request-id": "mine"})
        wait_for(lambda: server.scheduler.running)
        assert server.post(ENDLESS, **{"x-request-id": "mine"}).status_code == 409
        assert httpx.delete(f"{server.url}/v1/requests/mine").status_code == 200
        assert answer.result(5).status_code == 499


def test_the_id_of_an_answer_still_being_read_is_free_for_another(server):
    """The end of the first response must not stop the second request, which has its id."""
    body = {"messages": USER, "max_tokens": 300, "seed": 1, "logit_bias": {"2": -100}}
    names = {"x-request-id": "same"}
    content = json.dumps({**body, "max_tokens": 2, "stream": True}).encode()
    with httpx.Client() as client, ThreadPoolExecutor(1) as pool:
        request = client.build_request("POST", f"{server.url}{CHAT}", content=content, headers={
            **names, "content-type": "application/json"})
        first = client.send(request, stream=True)
        server.idle()
        second = pool.submit(server.post, body, **names)
        wait_for(lambda: server.scheduler.running)
        first.read()
        first.close()
        assert second.result(20).json()["usage"]["completion_tokens"] == 300


def test_shutting_down_ends_streams_with_an_error(server):
    with httpx.stream("POST", f"{server.url}{CHAT}", json=ENDLESS) as stream:
        lines = stream.iter_lines()
        next(lines)
        threading.Thread(target=server.app.state.service.close).start()
        *_, last = (line for line in lines if line)
        assert "shutting down" in json.loads(last[6:])["error"]["message"]
    answer = server.post({"messages": USER})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0


# ---- turns and the queue ---------------------------------------------------------------------------------------------

def test_an_answer_does_not_wait_for_the_answers_of_others(server):
    with ThreadPoolExecutor(2) as pool, httpx.stream("POST", f"{server.url}{CHAT}", json=ENDLESS) as first:
        pieces = texts(first)   # which would close the connection when it is thrown away
        next(pieces)
        short = pool.submit(server.post, {"messages": USER, "max_tokens": 3}, **{"user-agent": "a"})
        wait_for(lambda: server.scheduler.waiting == 1)
        pool.submit(server.post, {**ENDLESS, "stream": False}, **{"user-agent": "b"})
        wait_for(lambda: server.scheduler.waiting == 2)
        first.close()
        assert short.result(20).json()["usage"]["completion_tokens"] == 3
        assert server.scheduler.running   # the second one, which takes four seconds
        server.app.state.service.close()


def test_a_full_queue_says_when_to_come_again():
    with Server(queue=2) as server, ThreadPoolExecutor(3) as pool:
        for waiting, name in enumerate("abc"):
            pool.submit(server.post, {**ENDLESS, "stream": False}, **{"user-agent": name})
            wait_for(lambda waiting=waiting: server.scheduler.running and server.scheduler.waiting == waiting)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            for streamed in (False, True):
                with pytest.raises(openai.RateLimitError) as error:
                    client.chat.completions.create(model="any", messages=USER, stream=streamed)
                assert int(error.value.response.headers["retry-after"]) >= 1 and error.value.code == "queue_full"
        server.app.state.service.close()


def test_health_and_errors_while_the_model_loads():
    go = threading.Event()

    def loader():
        assert go.wait(5)
        return fake_model()

    with serving(create_app(loader)) as url:
        answer = httpx.get(f"{url}/health")
        assert answer.status_code == 503 and answer.json() == {"status": "loading", "model": ""}
        for path, body in ((CHAT, {"messages": USER}), ("/v1/completions", {"prompt": "a"}), ("/tokenize", {"text": "a"}),
                           ("/score", {"input_data": {"input_string": ["a"]}})):
            answer = httpx.post(f"{url}{path}", json=body)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert httpx.get(f"{url}/v1/models").status_code == 503
        assert httpx.get(f"{url}/metrics").status_code == 200
        go.set()
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        assert httpx.post(f"{url}{CHAT}", json={"messages": USER, "max_tokens": 1}).status_code == 200


def test_a_model_that_cannot_be_loaded_is_told_to_the_host():
    failed = []

    def loader():
        raise BadInput("no such model")

    with serving(create_app(loader, on_failed_load=failed.append)) as url:
        wait_for(lambda: failed)
        assert httpx.get(f"{url}/health").status_code == 503
    assert str(failed[0]) == "no such model"


# ---- signs of life ---------------------------------------------------------------------------------------------------

def test_a_long_prompt_tells_its_progress_in_comments():
    with Server(seconds=0.02, chunk=32) as server:
        lines = server.post({"messages": LONG, "stream": True, "max_tokens": 2}).text.splitlines()
    told = [(int(found[1]), int(found[2])) for line in lines if (found := re.fullmatch(r": prompt (\d+)/(\d+)", line))]
    assert len(told) > 5 and told == sorted(set(told)) and len({total for _, total in told}) == 1
    assert told[0][0] <= 64 and told[-1][0] < told[-1][1] == len(server.model.tokenizer.encode_chat(LONG))
    first_text = next(i for i, line in enumerate(lines) if line.startswith("data: ") and '"content": ""' not in line)
    assert max(i for i, line in enumerate(lines) if line.startswith(":")) < first_text


def test_who_waits_gets_signs_of_life(server, monkeypatch):
    monkeypatch.setattr(service, "KEEP_ALIVE", 0.05)
    with httpx.stream("POST", f"{server.url}{CHAT}", json=ENDLESS) as first:
        pieces = texts(first)   # which would close the connection when it is thrown away
        next(pieces)
        with httpx.stream("POST", f"{server.url}{CHAT}", json=ENDLESS) as second:
            lines = second.iter_lines()
            assert next(line for line in lines if line.startswith(":")) == ": waiting"


def test_an_answer_under_review_gives_signs_of_life(monkeypatch):
    monkeypatch.setattr(service, "KEEP_ALIVE", 0.05)
    with Server(review=lambda kind, value: value) as server:
        lines = server.post({**ENDLESS, "max_tokens": 60}).text.splitlines()
    assert 3 < lines.count(": waiting") < 30


def test_the_loop_answers_while_the_real_model_reads_a_prompt_and_decodes():
    with edgemistral.load(edgemistral.demo_model()) as model:
        prompt = [{"role": "user", "content": "What did the village see? " * 80}]
        app = create_app(model)
        with serving(app) as url, ThreadPoolExecutor(1) as pool, httpx.Client() as client:
            httpx.post(f"{url}{CHAT}", json={"messages": USER, "max_tokens": 1}, timeout=120)   # compiles
            seconds = []
            for n in range(3):
                answer = pool.submit(httpx.post, f"{url}{CHAT}", json={
                    "messages": [{"role": "system", "content": str(n)}, *prompt], "max_tokens": 60}, timeout=60)
                while not answer.done():
                    start = time.perf_counter()
                    assert client.get(f"{url}/health").status_code == 200
                    seconds.append(time.perf_counter() - start)
                assert answer.result().status_code == 200
    assert sorted(seconds)[len(seconds) // 2] < 0.05, sorted(seconds)[-5:]


# ---- what else can go wrong ------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_the_hosts_review_is_told_and_logged(caplog):
    def broken(kind, value):
        if kind == "answer":
            raise KeyError("secret")
        return value

    with Server(review=broken) as server:
        body = {"messages": USER, "max_tokens": 2}
        assert "secret" not in server.post(body).text and server.post(body).status_code == 500
        answer = server.post({**body, "stream": True})
        assert answer.status_code == 200 and "an error inside the server" in answer.text and "secret" not in answer.text
    assert sum("secret" in (record.exc_text or "") for record in caplog.records) == 3


def test_slow_readers_hold_up_nobody(server):
    body = {"messages": USER, "max_tokens": 20, "seed": 5}
    expected = "".join(fake_model().chat(USER, 20, seed=5))
    streams = [httpx.Client() for _ in range(4)]
    try:
        responses = []
        for client in streams:
            request = client.build_request("POST", f"{server.url}{CHAT}", json={**body, "stream": True})
            responses.append(client.send(request, stream=True))
        assert server.post(body).json()["choices"][0]["message"]["content"] == expected
        for response in responses:
            assert "".join(texts(response)) == expected
            response.close()
    finally:
        for client in streams:
            client.close()


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
        (request_bytes("HEAD", "/health", "1.1", b"", "Connection: close"), 405),
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
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("head", [b"GET /" + b"x" * 2_000_000, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2_000_000,
                                  b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: x\r\n" * 300_000])
def test_an_endless_head_is_given_up(server, head):
    with contextlib.suppress(OSError):   # closed while we send
        assert server.raw(head).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_head_that_does_not_come_is_given_up(server, monkeypatch):
    monkeypatch.setattr(runner, "HEAD_SECONDS", 0.3)
    for beginning in (b"", b"GET /health HTTP/1.1\r\nHost: loc"):
        with socket.create_connection(server.address, timeout=5) as connection:
            start = time.monotonic()
            connection.sendall(beginning)
            for _ in range(3):   # byte by byte does not help
                time.sleep(0.08)
                connection.sendall(b"a" if beginning else b"")
            assert connection.recv(1000) == b""
            assert 0.2 < time.monotonic() - start < 3


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
        return httpx.post(f"{server.url}{path}", content=text, headers={"content-type": "application/json"})

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
        httpx.request(name, f"{server.url}/{name}")
    text = httpx.get(f"{server.url}/metrics").text
    assert "BREW" not in text and 'method="other",path="other"' in text


def test_a_file_name_that_is_no_text_can_be_told():
    model = fake_model()
    model.path = Path("caf\udce9.safetensors")
    with serving(create_app(model)) as url:
        assert httpx.get(f"{url}/health").json()["model"] == "caf?"
        assert httpx.post(f"{url}{CHAT}", json={"messages": USER, "max_tokens": 1}).json()["model"] == "caf?"


@pytest.mark.parametrize("settings", [{"queue": 0}, {"max_body": 0}, {"api_key": "two words"}, {"api_key": "clé"}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match="must be"):
        create_app(fake_model(), **settings)


def test_origins_may_come_from_an_iterator_and_hosts_with_a_port():
    app = create_app(fake_model(), allow_origins=iter(["https://app.example.com"]), allow_hosts=iter(["Box.local:8080"]))
    with serving(app) as url:
        headers = {"origin": "https://app.example.com", "host": "box.local:8080"}
        assert httpx.get(f"{url}/health", headers=headers).status_code == 200
