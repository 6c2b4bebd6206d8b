"""Every route of the server: hostile bodies, and hostile HTTP around them."""

from __future__ import annotations

import asyncio
import json
import logging
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Failed, Harness
from tests.fuzz.texts import SAMPLE, SCHEMA, TOOLS

USER = [{"role": "user", "content": "Where is it?"}]
PARTS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
SAMPLING = {"max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["x"], "stream": False,
    "user": "u"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f",
    "arguments": "{}"}}]}
BODIES: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        {"model": "m", "messages": USER, **SAMPLING, "n": 1, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 3}},
        {"messages": PARTS, "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 2},
        {"messages": USER, "max_tokens": 4, "response_format": {"type": "json_schema", "json_schema": {"name": "n",
        "schema": SCHEMA}}},
        {"messages": [*USER, CALL, {"role": "tool", "tool_call_id": "a", "content": "1"}], "tools": TOOLS,
        "tool_choice": "auto",
         "max_tokens": 2}, {"messages": USER, "session": "a", "max_tokens": 2, "guided_regex": "[a-z]+"},
    ],
    "/v1/completions": [{"prompt": "Paris", **SAMPLING, "echo": True, "logprobs": 1},
    {"prompt": ["a", "b"], "max_tokens": 1, "n": 2},
                        {"prompt": [1, 5, 7], "max_tokens": 2, "stream": True}],
    "/v1/responses": [{"input": "Hello", "max_output_tokens": 3, "instructions": "Be kind."},
                      {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "stream": True,
                       "max_output_tokens": 2, "text": {"format": {"type": "text"}}}],
    "/v1/messages": [{"model": "m", "max_tokens": 3, "messages": USER, "system": "Be kind.", "stop_sequences": ["x"]},
                     {"max_tokens": 2, "messages": PARTS[1:], "stream": True,
                     "tools": [{"name": "f", "input_schema": {"type": "object"}}]}],
    "/v1/messages/count_tokens": [{"model": "m", "messages": USER}],
    "/api/chat": [{"model": "m", "messages": USER, "stream": False, "options": {"num_predict": 2, "temperature": 0}},
                  {"messages": USER, "options": {"num_predict": 2}, "format": SCHEMA, "keep_alive": "5m"}],
    "/api/generate": [{"prompt": "Paris", "options": {"num_predict": 2}, "raw": True, "stream": False, "system": "s",
    "images": None}],
    "/api/show": [{"model": "m", "name": "m", "verbose": True}], "/score": [SAMPLE], "/": [SAMPLE],
    "/tokenize": [{"text": "Hello"}, {"messages": USER}], "/detokenize": [{"tokens": [1, 5, 7]}],
}
OTHERS = ("/health", "/metrics", "/v1/models", "/v1/models/x", "/v1/requests/x", "/api/tags", "/api/version", "/docs",
    "/openapi.json",
          "/page/chat.js", "/page/../app.py", "/page/%2e%2e/app.py", "/nothing", "/v1/chat/completions/", "//",
          "/page/vendor/", "/models")
HEADERS = (
    ["host", "localhost"], ["host", "127.0.0.1:8080"], ["content-type", "application/json"], ["accept", "*/*"],
    ["origin", "http://localhost"], ["sec-fetch-site", "same-origin"], ["x-request-id", "abc"], ["authorization", "Bearer x"],
    ["user-agent", "x"], ["content-encoding", "gzip"], ["range", "bytes=0-1"], ["if-none-match", "*"], ["cookie", "a=b"],
    ["expect", "100-continue"], ["transfer-encoding", "chunked"], ["content-length", "5"],
    ["access-control-request-method", "POST"],
)


class Routes(Harness):
    """Requests to the application itself."""

    name = "server"
    planted = "numbers of sampling are not checked (SamplingParams)"

    def prepare(self) -> None:
        from edgemistral.server import create_app  # noqa: F401
        from tests.serving import fake_model  # noqa: F401

    def start(self) -> None:
        from edgemistral.server import create_app
        from tests.serving import fake_model

        self.loop = asyncio.new_event_loop()
        self.app = create_app(fake_model(context=96), queue=1000)
        self.log: list[str] = []
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: self.log.append(handler.format(record))  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)

    def make(self, chance: Random) -> Any:
        path = chance.choice(list(BODIES))
        body: Any = chance.choice(BODIES[path])
        method, headers = "POST", [list(HEADERS[0]), list(HEADERS[2])]
        if chance.random() < 0.9:
            body = mutate.as_text(chance, mutate.value(chance, body))
        else:
            body = mutate.text(chance, json.dumps(body))
        if chance.random() < 0.15:
            path = mutate.text(chance, path, ("/", "..", "%00", "%2f", "?a=b", "é", "//", "\\"))
        if chance.random() < 0.1:
            path, method = chance.choice(OTHERS), "GET"
        if chance.random() < 0.05:
            method = chance.choice(("GET", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "TRACE", "BREW", "post"))
        if chance.random() < 0.15:
            headers = [[name, mutate.text(chance, value) if chance.random() < 0.3 else value]
                       for name, value in [*headers, *chance.sample(HEADERS, 2)]]
        return {"method": method, "path": path, "headers": headers, "body": body, "leaves": chance.random() < 0.03}

    def run(self, given: Any) -> str:
        self.log.clear()
        status, body = self.loop.run_until_complete(asyncio.wait_for(self._ask(given), 30))
        if self.log:
            raise Failed(f"logged: {self.log[0][-2500:]}")
        if status >= 500:
            raise Failed(f"{status}: {body[:500]!r}")
        if b"internal_error" in body or b"an error inside the server" in body:
            raise Failed(f"in a stream: {body[-500:]!r}")
        if 400 <= status != 499 and given["method"] != "HEAD" and not json.loads(body):
            raise Failed(f"{status} without a reason")
        return str(status)

    async def _ask(self, given: Any) -> tuple[int, bytes]:
        from urllib.parse import unquote_to_bytes

        raw, _, query = given["path"].encode("utf-8", "surrogatepass").partition(b"?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": given["method"], "scheme": "http",
            "path": unquote_to_bytes(raw).decode("utf-8", "replace"), "raw_path": raw, "query_string": query, "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in given["headers"]],
            "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 8080),
        }
        events = [{"type": "http.request", "body": given["body"].encode("utf-8", "surrogatepass"), "more_body": False}]
        gone = asyncio.Event()
        if given["leaves"]:
            asyncio.get_running_loop().call_later(0.002, gone.set)
        status, body = 0, b""

        async def receive() -> Any:
            if events:
                return events.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(event: Any) -> None:
            nonlocal status, body
            if event["type"] == "http.response.start":
                status = event["status"]
            else:
                body += event.get("body", b"")

        await self.app(scope, receive, send)
        gone.set()
        return (status or 499), body

    def plant(self) -> None:
        from edgemistral.generate import sampler

        sampler.SamplingParams.__post_init__ = lambda self: None


class Wire(Harness):
    """Bytes on a connection, through the server's own HTTP."""

    name = "http"
    planted = "an exception escapes the application (server.safety.Guard)"

    def prepare(self) -> None:
        from tests.serving import Server  # noqa: F401

    def start(self) -> None:
        from tests.serving import Server

        self.server = Server(seconds=0.0)
        self.server.__enter__()
        self.log: list[str] = []
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: self.log.append(handler.format(record))  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        logging.getLogger("uvicorn.error").addHandler(handler)

    def make(self, chance: Random) -> Any:
        body = json.dumps({"messages": USER, "max_tokens": 2, "stream": chance.random() < 0.5}).encode()
        chunked = chance.random() < 0.3
        method, path = chance.choice(("POST", "POST", "GET", "HEAD", "OPTIONS")), chance.choice((*BODIES, *OTHERS))
        lines = [f"{method} {path} HTTP/1.{chance.randrange(2)}",
                 "Host: localhost", "Content-Type: application/json", "Connection: close"]
        lines.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}")
        content = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
        data = "\r\n".join(lines).encode() + b"\r\n\r\n" + content
        if chance.random() < 0.3:
            data += data
        for _ in range(chance.randrange(3)):
            words = (b"\r\n", b"\r", b"\n", b"\0", b": ", b"Host: evil\r\n", b"Content-Length: 9\r\n",
                b"Transfer-Encoding: x\r\n",
                     b"HTTP/2.0", b"\xff\xfe", b" " * 100, b"X: " + b"y" * 70000 + b"\r\n",
                     b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
            at = chance.randrange(len(data) + 1)
            data = data[:at] + chance.choice(words) + data[at + chance.choice((0, 0, 1, 5)):]
        return {"data": (mutate.data(chance, data) if chance.random() < 0.5 else data)[: 1 << 18].hex(),
            "cut": chance.random() < 0.2}

    def run(self, given: Any) -> str:
        import socket

        self.log.clear()
        data = bytes.fromhex(given["data"])
        answer = b""
        with socket.create_connection(self.server.address, timeout=20) as connection:
            try:
                connection.sendall(data[: len(data) // 2] if given["cut"] else data)
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(1 << 16):
                    answer += part
            except OSError:                  # it hung up
                pass
        if self.log:
            raise Failed(f"logged: {self.log[0][-2500:]}")
        if not answer:
            return "closed"
        status = answer[9:12].decode("ascii", "replace")
        if not answer.startswith(b"HTTP/1.1 ") or status[0] == "5":
            raise Failed(f"{answer[:300]!r}")
        return status

    def plant(self) -> None:
        from edgemistral.server import safety

        safety.Guard._refusal = lambda self, scope, headers, origin: headers["x-missing"]


