"""A mapped file that is cut: an error that names it, in a child process, whoever notices; and a server that ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from edgemistral.demo import demo_model
from edgemistral.files import lost

pytestmark = pytest.mark.skipif(not lost.SUPPORTED, reason="here no mapped file can be cut, or nothing can be done about it")

CHAT = """if True:
    import os, sys
    import edgemistral
    from edgemistral.errors import FileLost
    path, which = sys.argv[1], sys.argv[2]
    with edgemistral.load(path, threads=2) as model, edgemistral.load(path, threads=1) as other:
        session = model.session(path + ".session") if which != "blob" else None
        said = [{"role": "user", "content": "What should I see in Paris? " * 50}]
        print(len("".join(model.chat(said, 8, temperature=0, session=session))))
        os.truncate(path if which == "blob" else path + ".session", 70000)
        for _ in range(2):
            try:
                said[0]["content"] += "And then?"
                list(model.chat(said, 8, temperature=0, session=session))
                print("answered")
            except FileLost as error:
                print(error)
        if which != "blob":
            session.close()
    if which != "blob":
        with edgemistral.load(path, threads=1) as model, model.session(path + ".session") as session:
            print("opened", session.tokens)
"""
FOREIGN = """if True:
    import faulthandler, mmap, os, sys
    faulthandler.enable()
    from edgemistral.files import lost
    with open(sys.argv[1], "r+b") as file:
        ours, theirs = mmap.mmap(file.fileno(), 8192), mmap.mmap(file.fileno(), 8192)
        lost.watch(ours, sys.argv[1])
        lost.install()
        os.truncate(sys.argv[1], 0)
        print(ours[5000], flush=True)
        theirs[5000]
"""


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copy(demo_model(), tmp_path / "model.safetensors"))


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("which", ["blob", "session"])
def test_the_file_is_named_and_the_process_lives(copy, which):
    done = run(CHAT, copy, which)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    name = copy.name if which == "blob" else f"{copy.name}.session"
    assert all(line.startswith(f"{copy.parent / name}: was cut") for line in lines[1:3]), lines
    if which == "session":
        assert lines[3].startswith("opened ")


def test_faults_of_others_go_where_they_went_before(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8192)
    done = run(FOREIGN, path)
    assert done.returncode == -7 and done.stdout == "0\n" and "Bus error" in done.stderr


def test_the_server_refuses_further_requests_and_ends_with_one_line(copy):
    command = [sys.executable, "-m", "edgemistral", "serve", str(copy), "--port", "0", "--context", "512"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip()
            deadline = time.monotonic() + 60
            while httpx.get(f"{url}/health").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.truncate(copy, 70000)
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
            answer = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(body),
                                headers={"content-type": "application/json"}, timeout=30)
            assert answer.status_code >= 500 and "was cut" in answer.text
            assert server.wait(30) == 1
        finally:
            server.kill()
        errors = server.stderr.read().splitlines()
    assert len([line for line in errors if line.startswith("error: ") and str(copy) in line]) == 1
    assert not any("Traceback" in line for line in errors)
