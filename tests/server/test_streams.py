"""What happens while answers are under way: aborts, clients that go away, signs of life, queues, slow readers, errors."""

from __future__ import annotations

import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

import edgemistral
from edgemistral.errors import BadInput
from edgemistral.server import create_app, service
from tests.serving import CHAT, HTTP, USER, Server, fake_model, serving, wait_for

LONG = [{"role": "user", "content": "Where is it? " * 60}]   # about 400 tokens
ENDLESS = {"messages": USER, "max_tokens": 400, "seed": 1, "stream": True, "logit_bias": {"2": -100}}


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
    with HTTP.stream("POST", f"{server.url}{CHAT}", json=ENDLESS) as first:
        pieces = texts(first)   # which would close the connection when it is thrown away
        next(pieces)
        with pytest.raises(httpx.ReadTimeout):
            HTTP.post(f"{server.url}{CHAT}", json={"messages": LONG}, timeout=httpx.Timeout(60, read=0.2))
        wait_for(lambda: not server.scheduler.waiting)
        assert server.scheduler.running
    server.idle()
    assert max(map(len, server.transformer.calls)) < 64   # of the long prompt nothing was read


@pytest.mark.parametrize("named", [False, True])
def test_an_abort_by_id_ends_the_stream_with_an_error_and_touches_no_other(server, named):
    expected = "".join(fake_model().chat(USER, 30, seed=5))
    with ThreadPoolExecutor(1) as pool:
        headers = {"x-request-id": "mine"} if named else {}
        with HTTP.stream("POST", f"{server.url}{CHAT}", json=ENDLESS, headers=headers) as stream:
            lines = stream.iter_lines()
            chunk = json.loads(next(line for line in lines if line.startswith("data: "))[6:])
            assert stream.headers["x-request-id"] == ("mine" if named else chunk["id"])
            other = pool.submit(server.post, {"messages": USER, "max_tokens": 30, "seed": 5})
            wait_for(lambda: len(server.scheduler._active) == 2)
            answer = HTTP.delete(f"{server.url}/v1/requests/{chunk['id']}")
            assert answer.status_code == 200 and answer.json() == {"id": chunk["id"], "cancelled": True}
            last = [line for line in lines if line][-1]
            assert json.loads(last[6:])["error"]["code"] == "cancelled"
        assert other.result(60).json()["choices"][0]["message"]["content"] == expected
    assert HTTP.delete(f"{server.url}/v1/requests/{chunk['id']}").status_code == 404


def test_an_aborted_request_that_was_not_streamed_answers_499(server):
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, {**ENDLESS, "stream": False}, **{"x-request-id": "mine"})
        wait_for(lambda: server.scheduler.running)
        assert HTTP.delete(f"{server.url}/v1/requests/mine").status_code == 404        # the id is our own
        [job] = [one.job for one in server.scheduler._active]
        assert HTTP.delete(f"{server.url}/v1/requests/{job.id}").status_code == 200
        assert answer.result(60).status_code == 499


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
        assert second.result(60).json()["usage"]["completion_tokens"] == 300


def test_shutting_down_ends_streams_with_an_error(server):
    with HTTP.stream("POST", f"{server.url}{CHAT}", json=ENDLESS) as stream:
        lines = stream.iter_lines()
        next(lines)
        threading.Thread(target=server.app.state.service.close).start()
        *_, last = (line for line in lines if line)
        assert "shutting down" in json.loads(last[6:])["error"]["message"]
    answer = server.post({"messages": USER})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0


# ---- turns and the queue ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_answers_are_written_at_once_and_others_wait(parallel):
    with Server(parallel=parallel) as server, ThreadPoolExecutor(5) as pool:
        for n in range(parallel):
            pool.submit(server.post, {**ENDLESS, "stream": False}, **{"user-agent": str(n)})
            wait_for(lambda n=n: len(server.scheduler._active) == n + 1)
        short = pool.submit(server.post, {"messages": USER, "max_tokens": 3}, **{"user-agent": "a"})
        wait_for(lambda: server.scheduler.waiting == 1)
        told = len(server.transformer.steps)
        wait_for(lambda: len(server.transformer.steps) >= told + 4)      # the last one's prompt may be under way still
        assert {len(step) for step in server.transformer.steps[-3:]} <= {parallel}
        server.scheduler.stop(server.scheduler._active[0].job)
        assert short.result(60).json()["usage"]["completion_tokens"] == 3
        server.app.state.service.close()


def test_an_answer_is_the_same_whatever_is_written_beside_it(server):
    bodies = [{"messages": [{"role": "user", "content": f"Where is {n}?"}], "max_tokens": 20, "seed": n} for n in range(4)]
    alone = [server.post(body).json()["choices"] for body in bodies]
    with ThreadPoolExecutor(4) as pool:
        together = [one.json()["choices"] for one in pool.map(server.post, bodies)]
    assert together == alone
    assert max(len(step) for step in server.transformer.steps) > 1


def test_a_full_queue_says_when_to_come_again():
    with Server(queue=2, parallel=1) as server, ThreadPoolExecutor(3) as pool:
        for waiting, name in enumerate("abc"):
            pool.submit(server.post, {**ENDLESS, "stream": False}, **{"user-agent": name})
            wait_for(lambda waiting=waiting: server.scheduler.running and server.scheduler.waiting == waiting)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            for streamed in (False, True):
                with pytest.raises(openai.RateLimitError) as error:
                    client.chat.completions.create(model="any", messages=USER, stream=streamed)
                assert int(error.value.response.headers["retry-after"]) >= 1 and error.value.code == "queue_full"
        server.app.state.service.close()


def test_the_log_probabilities_of_a_prompt_wait_their_turn():
    body = {"prompt": "a b c", "echo": True, "logprobs": 1, "max_tokens": 1}
    with Server(queue=2, parallel=1) as server, ThreadPoolExecutor(3) as pool:
        for waiting, name in enumerate("ab"):
            pool.submit(server.post, {**ENDLESS, "stream": False}, **{"user-agent": name})
            wait_for(lambda waiting=waiting: server.scheduler.running and server.scheduler.waiting == waiting)
        waits = pool.submit(server.post, body, "/v1/completions", **{"user-agent": "c"})
        wait_for(lambda: server.scheduler.waiting == 2)
        assert server.post(body, "/v1/completions", **{"user-agent": "d"}).status_code == 429
        server.transformer.seconds = 0
        choice = waits.result(60).json()["choices"][0]
        assert choice["logprobs"]["token_logprobs"][0] is not None and choice["text"].startswith("a b c")
    with Server() as server:
        assert server.post({**body, "prompt": "a " * 600}, "/v1/completions").status_code == 400
        assert server.post({**body, "prompt": [1 << 30]}, "/v1/completions").json()["error"]["param"] == "prompt"


def test_health_and_errors_while_the_model_loads():
    go = threading.Event()

    def loader():
        assert go.wait(60)
        return fake_model()

    with serving(create_app(loader)) as url:
        answer = HTTP.get(f"{url}/health")
        assert answer.status_code == 503 and answer.json() == {"status": "loading", "model": ""}
        for path, body in ((CHAT, {"messages": USER}), ("/v1/completions", {"prompt": "a"}), ("/tokenize", {"text": "a"}),
                           ("/score", {"input_data": {"input_string": ["a"]}})):
            answer = HTTP.post(f"{url}{path}", json=body)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert HTTP.get(f"{url}/v1/models").status_code == 503
        assert HTTP.get(f"{url}/metrics").status_code == 200
        go.set()
        wait_for(lambda: HTTP.get(f"{url}/health").status_code == 200)
        assert HTTP.post(f"{url}{CHAT}", json={"messages": USER, "max_tokens": 1}).status_code == 200


def test_a_model_that_cannot_be_loaded_is_told_to_the_host():
    failed = []

    def loader():
        raise BadInput("no such model")

    with serving(create_app(loader, on_failed_load=failed.append)) as url:
        wait_for(lambda: failed)
        assert HTTP.get(f"{url}/health").status_code == 503
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


def test_who_waits_gets_signs_of_life(monkeypatch):
    monkeypatch.setattr(service, "KEEP_ALIVE", 0.05)
    with Server(parallel=1) as server, HTTP.stream("POST", f"{server.url}{CHAT}", json=ENDLESS) as first:
        pieces = texts(first)   # which would close the connection when it is thrown away
        next(pieces)
        with HTTP.stream("POST", f"{server.url}{CHAT}", json=ENDLESS) as second:
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
            HTTP.post(f"{url}{CHAT}", json={"messages": USER, "max_tokens": 1}, timeout=120)   # compiles
            for n in range(3):
                answered = 0
                answer = pool.submit(HTTP.post, f"{url}{CHAT}", json={
                    "messages": [{"role": "system", "content": str(n)}, *prompt], "max_tokens": 60}, timeout=60)
                while not answer.done():
                    assert client.get(f"{url}/health").status_code == 200
                    answered += 1
                assert answer.result().status_code == 200 and answered      # bench/ measures how fast


# ---- slow readers, errors of the host ---------------------------------------------------------------------------------

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
