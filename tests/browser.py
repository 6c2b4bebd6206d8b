"""Chromium for tests of the chat page, and a model that says what a test wants."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from edgemistral.generate.engine import Engine
from edgemistral.model import Model
from edgemistral.text.sentencepiece import SentencePieceTokenizer
from tests.fake import tiny_config
from tests.serving import TOKENIZER, SlowTransformer

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge", "microsoft-edge")
TIMEOUT = 30_000   # ms, for anything to happen: machines are loaded
FLAGS = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run")


def find_browser() -> str | None:
    """A browser that Playwright can drive: EDGEMISTRAL_BROWSER, or one on the PATH."""
    return os.environ.get("EDGEMISTRAL_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def running_browser(*flags: str) -> Iterator[Browser]:
    """Skips the test if there is none."""
    expect.set_options(timeout=TIMEOUT)
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


@contextmanager
def opened(browser, url, **options):
    """A page of a fresh profile; what it complains about fails the test."""
    problems = []
    context = browser.new_context(**options)
    context.set_default_timeout(TIMEOUT)
    context.add_init_script(
        "addEventListener('securitypolicyviolation', (e) => console.error('CSP', e.violatedDirective, e.blockedURI))")
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.goto(url)
    try:
        yield page
        assert [problem for problem in problems if "Failed to load resource" not in problem] == []
    finally:
        context.close()


class Actor(Model):
    """Answers with what `script(messages)` gives, token by token, and keeps what it was asked in `asked`. If the last
    message is the beginning of that, it goes on from there.

    seconds: for each token, and for each chunk of a prompt.
    """

    def __init__(self, script: Callable[[list[dict[str, str]]], str], context: int = 2048, chunk: int = 64) -> None:
        tokenizer = SentencePieceTokenizer(TOKENIZER.read_bytes())
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
        answer = self.answers[prompt]
        logits[answer[min(len(ids) - len(prompt), len(answer) - 1)]] = 100   # guessed tokens may go beyond its end
        return logits


# ---- what most tests say and do -------------------------------------------------------------------------------------

LONG = " ".join(f"word{i}" for i in range(200))


def script(messages):
    """What the model says: a long text, what it is told to say, or which question it answers."""
    *_, user = (message["content"] for message in messages if message["role"] == "user")
    if user.startswith("long"):
        return LONG
    return user.partition(":")[2] if user.startswith("say:") else f"Answer to {user}."


def send(page, text):
    """Write it, and send it as soon as the page takes it."""
    page.get_by_label("Message", exact=True).fill(text)
    expect(page.get_by_role("button", name="Send (Enter)")).to_be_enabled()
    page.keyboard.press("Enter")


def answer(page):
    """The last answer."""
    return page.locator("article.assistant").last
