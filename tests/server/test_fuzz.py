"""Malformed requests of a seeded fuzzer, over every route and interface: no 500, no traceback, and nothing stays behind."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import tracemalloc
from http.client import HTTPConnection
from itertools import islice

import pytest

from bench import server_fuzz
from tests.serving import HTTP, Server, wait_for


def open_files():
    """Those of this process, which is the server, segments of kept conversations aside; 0 where the system does not tell."""
    count = 0
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/proc/self/fd"):    # noqa: PTH208
            with contextlib.suppress(OSError):      # the listing itself
                count += "(deleted)" not in os.readlink(f"/proc/self/fd/{name}")    # noqa: PTH115
    return count


@pytest.mark.parametrize("number", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_requests_are_refused_and_leave_nothing(number, caplog):
    with Server(seconds=0, chunk=512) as server:
        def connect():
            return HTTPConnection(*server.address, timeout=60)

        sent = server_fuzz.requests(number)
        _, found = server_fuzz.run(connect, islice(sent, number // 4))
        server.idle()
        threads, files = threading.active_count(), open_files()
        gc.collect()
        tracemalloc.start()
        statuses, more = server_fuzz.run(connect, sent)
        server.idle()
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        wait_for(lambda: threading.active_count() <= threads + 1)
        wait_for(lambda: open_files() <= files + 2)
        assert found + more == []
        assert statuses[200] and statuses[422] and sum(statuses.values()) == number - number // 4
        assert HTTP.get(f"{server.url}/health").status_code == 200
    assert kept < 32 << 20
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_the_same_seed_makes_the_same_requests():
    assert list(server_fuzz.requests(200)) == list(server_fuzz.requests(200))
    assert {request.path for request in server_fuzz.requests(2000)} >= {path for path, _ in server_fuzz.RIGHT}
