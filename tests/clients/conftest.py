"""Servers for real clients, and the clients themselves, each family in an environment of its own."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import platformdirs
import pytest

import edgemistral
from bench.server_process import Server
from edgemistral.server import create_app
from tests.browser import Actor
from tests.serving import serving

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="session")
def url():
    """A server as users start it, with the demo model."""
    with Server(edgemistral.demo_model()) as server:
        yield f"http://127.0.0.1:{server.port}"


def calling(messages):
    """Calls a tool for the weather, and says what came back."""
    if any(message["content"].startswith("Result of") for message in messages):
        return "It is 21 degrees."
    return '{"name": "weather", "arguments": {"city": "Paris"}}'


@pytest.fixture(scope="session")
def loop():
    """The same server with a model that calls tools by itself, as the demo model is too small to do."""
    with serving(create_app(Actor(calling))) as url:
        yield url


def _made(name, files, make):
    """A folder of the cache that `make(folder)` fills, once for these files; skips the test where that cannot be done.

    EDGEMISTRAL_CLIENTS names another folder than the user's cache.
    """
    content = b"".join(file.read_bytes() for file in files) + sys.version.encode()
    cache = Path(os.environ.get("EDGEMISTRAL_CLIENTS") or platformdirs.user_cache_path("edgemistral") / "test-clients")
    folder = cache / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            make(folder)
        except (OSError, subprocess.SubprocessError) as problem:
            pytest.skip(f"{name} cannot be installed: {problem}")
        done.touch()
    return folder


def _python(folder):
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _environment(name, requirements):
    def make(folder):
        venv.create(folder, with_pip=True)
        subprocess.run([_python(folder), "-m", "pip", "install", "-q", "-r", requirements], check=True, timeout=1200)

    return _python(_made(name, [requirements], make))


@pytest.fixture(scope="session")
def python():
    """Runs scripts of Python clients."""
    return lambda: [_environment("python", SCRIPTS / "requirements.txt")]


@pytest.fixture(scope="session")
def harness_python():
    """Runs lm-evaluation-harness, whose requirements exclude others'."""
    return lambda: [_environment("lm-eval", SCRIPTS / "requirements-lm-eval.txt")]


@pytest.fixture(scope="session")
def node():
    """Runs scripts of JavaScript clients, which stand beside their packages."""
    def make(folder):
        npm = shutil.which("npm")
        if npm is None:
            raise OSError("there is no npm on the PATH")
        for file in (SCRIPTS / "package.json", *SCRIPTS.glob("*.mjs")):
            shutil.copy(file, folder)
        subprocess.run([npm, "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True, timeout=1200)

    files = [SCRIPTS / "package.json", *sorted(SCRIPTS.glob("*.mjs"))]
    return lambda: ["node", _made("node", files, make)]
