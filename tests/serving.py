"""A server on a free port of this computer, in a thread, over a model of random logits that can be made slow."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from edgemistral.generate.engine import Engine
from edgemistral.model import Model
from edgemistral.server import create_app, runner
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from tests.fake import FakeTransformer, tiny_config

USER = [{"role": "user", "content": "Where is it?"}]
CHAT = "/v1/chat/completions"
HTTP = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))   # `httpx.get` alone takes 80 ms
TOKENIZER = Path(__file__).parent / "data" / "tokenizer.model"


class SlowTransformer(FakeTransformer):
    """Takes `seconds` for every call; set to 0, it also ends the call that takes its time now."""

    def __init__(self, *arguments, **options):
        self._hurry = threading.Event()
        self.seconds = 0.0
        super().__init__(*arguments, **options)

    @property
    def seconds(self):
        return self._seconds

    @seconds.setter
    def seconds(self, value):
        self._seconds = value
        (self._hurry.clear if value else self._hurry.set)()

    def step(self, rows):
        self._hurry.wait(self._seconds)
        return super().step(rows)


def fake_model(seconds=0.0, context=512, chunk=64, script=None) -> Model:
    """A model whose answers depend on every id before them: an answer to another prompt, or mixed ones, would show."""
    tokenizer = SentencePieceTokenizer(TOKENIZER.read_bytes())
    config = tiny_config(vocab_size=tokenizer.vocab_size, context=context, bos_id=1, eos_id=tokenizer.eos_id)
    transformer = SlowTransformer(config, chunk=chunk, script=script)
    transformer.seconds = seconds
    return Model(Engine(transformer), tokenizer, Path("folder") / "fake-q4.safetensors")


def saying(answer: str, prompt_ids, context=512, seconds=0.0) -> Model:
    """A model that answers this prompt with this text."""
    model = fake_model(seconds, context)
    ids = model.tokenizer.encode(answer)
    model.engine._transformer.script = dict(enumerate([*ids, model.tokenizer.eos_id], len(prompt_ids)))
    return model


@contextmanager
def serving(app) -> Iterator[str]:
    """The URL of the app while it is served."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=runner._Protocol, ws="none", log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def wait_for(condition, seconds=60.0) -> None:
    """Until the condition holds; fails if it does not within so many seconds, which are many: machines are loaded."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


class Server:
    """A server over a fake model, with what the tests look at; settings are those of `create_app`."""

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
        self.transformer.seconds = 0.25      # on a loaded machine the news takes a while
        action()
        self.idle()
        assert len(self.transformer.calls) <= before + calls

    def post(self, body, path=CHAT, **headers):
        return HTTP.post(f"{self.url}{path}", json=body, headers=headers)

    def raw(self, content):
        """Everything that comes back for these bytes."""
        with socket.create_connection(self.address, timeout=60) as connection:
            connection.sendall(content)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))
