"""Runs the application on a socket of this computer until it is told to stop."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from edgemistral.errors import BadRequest, EdgeMistralError
from edgemistral.model import Model
from edgemistral.server.app import create_app
from edgemistral.server.service import Service

GRACE = 3.0             # seconds that an answer at work has to end by itself
STOP_SECONDS = 5        # all that stopping may take
MAX_CONNECTIONS = 512
SIGNALS = [signal.SIGINT, signal.SIGTERM]
if sys.platform == "win32":
    SIGNALS.append(signal.SIGBREAK)


def serve(
    loader: Callable[[], Model],
    host: str,
    port: int,
    *,
    insecure: bool = False,
    listening: Callable[[str], None] = lambda url: None,
    **settings: Any,
) -> None:
    """Serve the model that `loader` gives until Ctrl-C or SIGTERM.

    port: 0 takes a free one. listening: called with the URL. settings: as for `create_app`.
    Raises BadRequest for a host beyond loopback without an API key (unless `insecure`) and for wrong settings, OSError
    when the port cannot be had, and what the loader raises.
    """
    if not _is_loopback(host) and not settings.get("api_key") and not insecure:
        raise BadRequest(f"--host {host} lets others in: it needs --api-key (or --insecure)", "host")
    loaded: list[Model] = []
    failed: list[BaseException] = []

    def load() -> Model:
        model = loader()
        loaded.append(model)
        next(model.generate([model.config.bos_id], 1, temperature=0), None)   # compiles, or loads compiled kernels
        return model

    def on_failed_load(error: BaseException) -> None:
        failed.append(error)
        server.should_exit = True

    try:
        app = create_app(load, on_failed_load=on_failed_load, **settings)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    config = uvicorn.Config(
        app, http="h11", ws="none", log_level="warning", access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=STOP_SECONDS - 1,
    )
    with _listen(host, port) as listener:
        server = _Server(config, app.state.service)
        listening(_url(host, listener.getsockname()[1]))
        server.run(sockets=[listener])
    if failed:
        raise failed[0]
    idle = app.state.service.close(timeout=0.0)
    if not idle or (loaded and not app.state.service.ready):
        # A thread is inside a long chunk, or still loads: it uses what a regular exit would take away from under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    for model in loaded:
        model.close()


class _Server(uvicorn.Server):
    """uvicorn's server, but a signal is what it is for and no reason to die of it afterwards."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._stop) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit   # the second time
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.shut_down(grace=GRACE)
        await super().shutdown(sockets)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises OSError, with the address in place of a file's name."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        raise EdgeMistralError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
