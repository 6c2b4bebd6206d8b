"""Chromium for tests of the chat page, and a model that says what a test wants."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fake import tiny_config
from playwright.sync_api import Browser, sync_playwright
from serving import TOKENIZER, SlowTransformer

from edgemistral.engine import Engine
from edgemistral.model import Model
from edgemistral.tokenizer import Tokenizer

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge", "microsoft-edge")
FLAGS = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run")


def find_browser() -> str | None:
    """A browser that Playwright can drive: EDGEMISTRAL_BROWSER, or one on the PATH."""
    return os.environ.get("EDGEMISTRAL_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def running_browser(*flags: str) -> Iterator[Browser]:
    """Skips the test if there is none."""
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium, Chrome or Edge on the PATH (or in EDGEMISTRAL_BROWSER)")
    sandbox = hasattr(os, "geteuid") and os.geteuid() != 0   # Chromium has none for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*FLAGS, *flags], chromium_sandbox=sandbox)
        try:
            yield browser
        finally:
            browser.close()


class Actor(Model):
    """Answers with what `script(messages)` gives, token by token, and keeps what it was asked in `asked`. If the last
    message is the beginning of that, it goes on from there.

    seconds: for each token, and for each chunk of a prompt.
    """

    def __init__(self, script: Callable[[list[dict[str, str]]], str], context: int = 2048, chunk: int = 64) -> None:
        tokenizer = Tokenizer(TOKENIZER.read_bytes())
        config = tiny_config(vocab_size=tokenizer.vocab_size, context=context, bos_id=1, eos_id=tokenizer.eos_id)
        self.stage = _Stage(config, chunk=chunk)
        self.script, self.asked, self.options = script, [], []
        super().__init__(Engine(self.stage), tokenizer, Path("folder") / "actor-q4.safetensors")

    def chat(self, messages, *args, **options):
        self.asked.append([(message["role"], message["content"]) for message in messages])
        self.options.append(options)
        answer = [*self.tokenizer.encode(self.script(messages)), self.tokenizer.eos_id]
        begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        said = next(n for n in range(len(answer)) if self.tokenizer.decode(answer[:n]) == begun)
        self.stage.answers[tuple(self.tokenizer.encode_chat(messages))] = answer[said:]
        return super().chat(messages, *args, **options)


class _Stage(SlowTransformer):
    """After a prompt that is a key of `answers`, its tokens come."""

    def __init__(self, config, chunk):
        super().__init__(config, chunk=chunk)
        self.answers: dict[tuple[int, ...], list[int]] = {}

    def expected_logits(self, ids):
        ids = tuple(ids)
        prompt = max((prompt for prompt in self.answers if ids[: len(prompt)] == prompt), key=len)
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[self.answers[prompt][len(ids) - len(prompt)]] = 100
        return logits
