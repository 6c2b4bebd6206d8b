"""Runs the application on a socket of this computer until a signal stops it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgemistral.child import ParentWatch, only_user_of
from edgemistral.errors import BadRequest, EdgeMistralError, FileLost
from edgemistral.files import lost
from edgemistral.model import Model
from edgemistral.runtime.memory import return_large_blocks
from edgemistral.server.app import create_app
from edgemistral.server.service import Service

logger = logging.getLogger(__name__)

# Seconds from Ctrl-C on:
GRACE = 3.0             # for an answer at work to end by itself
LINGER = 3.5            # for clients to read to the end
STOP = 4.7              # for all of it
ORPHAN_STOP = 1.2       # seconds after the parent's death: no client is left to wait for
HEAD_SECONDS = 10.0     # for the head of a request to arrive
MAX_CONNECTIONS = 512
TURN = 0.0005           # for which a thread may keep the interpreter while the event loop waits for it; Python's is 0.005
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
    ready: Callable[[str], None] = lambda url: None,
    parent: ParentWatch | None = None,
    **settings: Any,
) -> None:
    """Serve the model that `loader` returns until Ctrl-C or SIGTERM. Main thread only.

    port: 0 takes a free one. listening: called with the URL. ready: the same, once requests are answered. parent: the server
    stops when it ends. settings: as for `create_app`.
    Raises BadRequest for a host other than loopback without an API key (unless `insecure`) and for wrong settings, BadInput
    if another server uses the folder of sessions, EdgeMistralError if the port is not available, and what the loader raises.
    Ends the process if some work cannot be stopped in time.
    """
    if not _is_loopback(host) and not settings.get("api_key") and not insecure:
        raise BadRequest(f"--host {host} lets other computers in: it needs --api-key (or --insecure)", "host")
    return_large_blocks()
    loaded: list[Model] = []
    failed: list[BaseException] = []

    def load() -> Model:
        model = loader()
        loaded.append(model)
        next(model.generate([model.config.bos_id], 1, temperature=0), None)   # compiles, or loads compiled kernels
        gc.collect()
        gc.freeze()      # a full collection would visit every object of the libraries, and stop all threads for 60 ms
        gc.collect()     # Python waits for a quarter of the objects of the last full collection before the next one
        return model

    def on_load() -> None:
        ready(url)

    def on_failed_load(error: BaseException) -> None:
        failed.append(error)
        server.should_exit = True

    try:
        app = create_app(load, on_load=on_load, on_failed_load=on_failed_load, **settings)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    service: Service = app.state.service
    config = uvicorn.Config(
        app, http=_Protocol, ws="none", log_level="error", access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=round(STOP),
    )
    with only_user_of(settings.get("session_dir")), _listen(host, port) as listener:
        url = _url(host, listener.getsockname()[1])
        server = _Server(config, service)
        if parent is not None:
            parent.on_gone = server.orphan
        with server.handling_signals(), _short_turns():
            listening(url)
            server.run(sockets=[listener])
            if server.lost is not None:
                failed.append(server.lost)
            if not failed and (not service.close(timeout=0.0) or service.loading):
                _exit()   # a thread still computes or loads: a regular exit would close what it uses
            for model in loaded:
                model.close()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _exit() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _Server(uvicorn.Server):
    """uvicorn's server. It handles the signal itself: uvicorn would raise it again after the shutdown."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._grace = GRACE
        self.lost: FileLost | None = None
        self._last_resort = self._exit_in(STOP)   # a thread that tokenizes or compiles a grammar cannot be stopped

    @staticmethod
    def _exit_in(seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, _exit)
        timer.daemon = True
        return timer

    def orphan(self) -> None:
        """Stop at once, on whatever thread this is called."""
        self._grace = 0.0
        self._exit_in(ORPHAN_STOP).start()
        self.should_exit = True

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._stop) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()   # `handling_signals` begins earlier and ends later

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.should_exit:   # the second time
            _exit()
        self.should_exit = True

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            super().run(sockets)
        finally:
            self._last_resort.cancel()

    async def on_tick(self, counter: int) -> bool:
        try:
            lost.check()
        except FileLost as error:     # nothing can be answered any more
            self.lost = error
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._last_resort.start()
        self._service.shut_down(grace=self._grace)
        asyncio.get_running_loop().call_later(LINGER if self._grace else 0.0, self._hang_up)
        await super().shutdown(sockets)

    def _hang_up(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class _Protocol(H11Protocol):
    """uvicorn's HTTP with a time limit for the head of a request. Without it, a client that sends its head very slowly, or
    sends nothing, would keep its connection for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def send_400_response(self, msg: str) -> None:
        # After HEAD, or during an answer, h11 refuses to send a 400: then the connection is closed.
        if self.cycle is not None:
            self.cycle.disconnected = True         # it must not send anything more
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:   # a request is here
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()      # IPv4, too
        if host == "::" and not both:
            logger.warning("on this system :: accepts only IPv6; use --host 0.0.0.0 for IPv4")
        made = socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS, dualstack_ipv6=both)
        # asyncio sets TCP_NODELAY only on sockets whose protocol says TCP; without it a small answer waits 40 ms.
        return socket.socket(made.family, made.type, socket.IPPROTO_TCP, made.detach())
    except (OSError, UnicodeError) as error:   # UnicodeError: an invalid name, such as "a..b"
        reason = getattr(error, "strerror", None) or str(error)
        raise EdgeMistralError(f"cannot listen on {host} port {port}: {reason.partition(' (while')[0]}") from None


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
