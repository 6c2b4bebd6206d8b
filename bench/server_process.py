"""A real `edgemistral serve` on a free port of this computer, for benchmarks."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import click

from bench import harness

CHAT = "/v1/chat/completions"
if sys.platform == "win32":
    STOP_SIGNAL, FLAGS = signal.CTRL_BREAK_EVENT, subprocess.CREATE_NEW_PROCESS_GROUP
else:
    STOP_SIGNAL, FLAGS = signal.SIGTERM, 0


class Server:
    """The process; a context manager that kills it at the end if it still runs."""

    def __init__(self, model: Path, *options: str) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")   # noqa: SIM115
        command = [*harness.EDGEMISTRAL, "serve", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, encoding="utf-8", creationflags=FLAGS
        )
        assert self.process.stdout is not None
        url = urlsplit(self.process.stdout.readline().strip())
        if url.port is None:
            raise click.ClickException(f"{' '.join(command)} did not start: {self.errors()}")
        self.port = url.port

    def __enter__(self) -> Server:
        with closing(self.connect()) as connection:
            while not self._healthy(connection):
                time.sleep(0.05)
        self._at_start = self.errors()   # possibly the notice that kernels are compiled
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self._errors.close()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def errors(self) -> str:
        """What the process wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def connect(self) -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.connect()
        return connection

    def _healthy(self, connection: HTTPConnection) -> bool:
        response = ask(connection, "GET", "/health")
        response.read()
        return response.status == 200

    def resident_bytes(self) -> int | None:
        """Memory of the process, None if unknown."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text("utf-8")
        except OSError:
            return None
        found = re.search(r"^VmRSS:\s*(\d+) kB", status, re.M)
        return int(found[1]) * 1024 if found else None

    def loop_seconds(self) -> float | None:
        """Processor time of the event loop, which is the process's first thread; None if unknown."""
        try:
            return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/schedstat").read_text("ascii").split()[0]) / 1e9
        except OSError:
            return None

    def stop(self) -> float:
        """Stop the process; returns the seconds that it took. Fails if its exit code is wrong or it printed errors."""
        start = time.perf_counter()
        self.process.send_signal(STOP_SIGNAL)
        code = self.process.wait(30)
        if code != 0 or self.errors() != self._at_start:
            raise click.ClickException(f"the server ended with code {code}: {self.errors()}")
        return time.perf_counter() - start


def ask(
    connection: HTTPConnection, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> HTTPResponse:
    """The response to a request, its body not read yet. body: bytes, or a value to send as JSON."""
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
    return connection.getresponse()


def events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events, up to its end."""
    for line in response:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def content(event: Mapping[str, Any]) -> str:
    """The text in an event of a chat's stream."""
    return "".join(choice["delta"].get("content", "") for choice in event.get("choices", ()))
