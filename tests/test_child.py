"""`edgemistral serve` as a child process: what it announces, that it ends with its parent, and that a folder has one server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest

import edgemistral
from edgemistral.child import LOCK_FILE, PROTOCOL, ParentWatch, announcement, only_user_of
from edgemistral.errors import BadInput
from tests.serving import wait_for

SERVE = [sys.executable, "-m", "edgemistral", "serve", "demo", "--port", "0"]
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
# A parent: starts the server as its arguments say, passes its first line on, and waits to be killed.
PARENT = """
import subprocess, sys, time
pipe = sys.argv[1] == "pipe"
child = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE if pipe else subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline(), flush=True)
time.sleep(600)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module", autouse=True)
def demo():
    with edgemistral.load(edgemistral.demo_model()) as model:
        model.engine.prefill([1])   # compiles


@contextmanager
def child(*arguments, **streams):
    pipe = subprocess.PIPE
    with subprocess.Popen([*SERVE, *arguments], stdout=pipe, stderr=pipe, text=True, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def lives(pid):
    """Whether a process runs: one that has ended and was not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_announces_itself_and_ends_when_its_input_closes():
    with child("--announce", "--parent-watch", stdin=subprocess.PIPE) as process:
        told = json.loads(process.stdout.readline())
        assert set(told) == {"url", "key", "pid", "protocol"}
        assert told["pid"] == process.pid and told["protocol"] == PROTOCOL and len(told["key"]) == 32
        url = f"{told['url']}/v1/chat/completions"
        assert httpx.get(f"{told['url']}/health").json()["status"] == "ok"      # ready, not only listening
        assert httpx.post(url, json=CHAT).status_code == 401
        answer = httpx.post(url, json=CHAT, headers={"Authorization": f"Bearer {told['key']}"}, timeout=30)
        assert answer.status_code == 200
        process.stdin.write("whatever comes means nothing\n")
        process.stdin.flush()
        time.sleep(0.2)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(2) == 0
        assert process.stdout.read() == ""      # one line, and nothing else


def test_a_key_that_is_given_is_announced():
    with child("--announce", "--api-key", "mine", stdin=subprocess.DEVNULL) as process:
        assert json.loads(process.stdout.readline())["key"] == "mine"
        assert process.poll() is None            # nothing watches: an empty input ends nothing


@linux
@pytest.mark.parametrize("stdin", ["pipe", pytest.param("none", marks=pytest.mark.slow)])
def test_a_parent_that_is_killed_leaves_no_child(stdin):
    command = [sys.executable, "-c", PARENT, stdin, *SERVE, "--announce", "--parent-watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid, line = parent.stdout.readline().split(maxsplit=1)
        told = json.loads(line)
        assert told["pid"] == int(pid)
        with httpx.stream(
            "POST", f"{told['url']}/v1/completions", timeout=30, headers={"Authorization": f"Bearer {told['key']}"},
            json={"prompt": ["Hello"] * 64, "max_tokens": None, "logit_bias": {"2": -100}, "stream": True},
        ) as answer:                              # in the middle of work
            next(answer.iter_lines())
            parent.send_signal(signal.SIGKILL)
            wait_for(lambda: not lives(pid), 2)


@linux
def test_a_parent_that_dies_while_the_child_loads_leaves_none():
    command = [sys.executable, "-c", PARENT.replace(", child.stdout.readline()", ""), "pipe", *SERVE, "--parent-watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.4)                           # Python has started and imports
        parent.kill()
        wait_for(lambda: not lives(pid), 2.5)


def test_one_server_for_a_folder_of_sessions(tmp_path):
    folder = tmp_path / "my sessions"
    with child("--announce", "--session-dir", str(folder), stdin=subprocess.PIPE) as first:
        told = json.loads(first.stdout.readline())
        with child("--session-dir", str(folder)) as second:
            out, err = second.communicate(timeout=60)
            assert second.returncode == 2 and out == ""
        *_, line = err.splitlines()
        assert line.startswith("error: ") and f"another server uses this folder of sessions (process {told['pid']})" in line
        assert "--session-dir" in line
        first.kill()                              # leaves its lock file behind
        first.wait()
    assert (folder / LOCK_FILE).exists()
    with only_user_of(folder):
        pass


def test_the_lock_of_a_folder(tmp_path):
    again = pytest.raises(BadInput, match=f"process {os.getpid()}")
    with only_user_of(None), only_user_of(tmp_path / "new"), again, only_user_of(tmp_path / "new"):
        pass
    with only_user_of(tmp_path / "new"):          # free again
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be the folder of sessions"), only_user_of(tmp_path / "file"):
        pass
    (tmp_path / "odd" / LOCK_FILE).mkdir(parents=True)
    with pytest.raises(BadInput, match="cannot be the folder of sessions"), only_user_of(tmp_path / "odd"):
        pass


def test_the_announcement_is_one_line():
    told = json.loads(announcement("http://127.0.0.1:80", 'a "key"'))
    assert told == {"url": "http://127.0.0.1:80", "key": 'a "key"', "pid": os.getpid(), "protocol": PROTOCOL}
    assert "\n" not in announcement("x", "y")


def test_what_watches_the_parent_tells_once(monkeypatch):
    told = []
    monkeypatch.setattr("edgemistral.child._piped_input", lambda: None)
    watch = ParentWatch()
    watch.on_gone = lambda: told.append(1)
    watch._watch(lambda: None)
    watch._watch(lambda: None)
    assert told == [1]
