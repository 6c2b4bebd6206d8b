"""The chat page when something is wrong: a missing key, a model that loads, a server that is gone, a full queue or context."""

from __future__ import annotations

import json
import re
import threading

import pytest
from playwright.sync_api import expect

from edgemistral.server import create_app
from tests.browser import Actor, answer, opened, running_browser, script, send
from tests.serving import serving

KEY = "a-key-of-ours"


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


def test_a_key_is_asked_for(browser):
    with serving(create_app(Actor(script), api_key=KEY)) as url, opened(browser, url) as page:
        page.get_by_role("textbox", name="API key").fill("wrong ключ")
        page.keyboard.press("Enter")
        expect(page.get_by_role("textbox", name="API key")).to_have_value("")
        page.get_by_role("textbox", name="API key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#server")).to_have_text("actor-q4")
        send(page, "Hello")
        expect(answer(page)).to_contain_text("Answer to Hello.")
        page.reload()
        expect(page.locator("#server")).to_have_text("actor-q4")
        assert KEY not in json.dumps(page.evaluate("Object.values(localStorage)"))


def test_the_page_waits_for_the_model(browser):
    go = threading.Event()

    def load():
        assert go.wait(60)
        return Actor(script)

    with serving(create_app(load)) as url, opened(browser, url) as page:
        expect(page.locator("#server")).to_have_text("Loading the model")
        page.get_by_label("Message", exact=True).fill("Hello")
        page.keyboard.press("Enter")
        expect(page.get_by_text("The model is not ready yet.")).to_be_visible()
        expect(page.get_by_label("Message", exact=True)).to_have_value("Hello")   # nothing is lost
        go.set()
        expect(page.locator("#server")).to_have_text("actor-q4")
        page.keyboard.press("Enter")
        expect(answer(page)).to_contain_text("Answer to Hello.")


def test_a_server_that_is_gone_and_comes_back(browser):
    with serving(create_app(Actor(script))) as url, opened(browser, url) as page:
        expect(page.locator("#server")).to_have_text("actor-q4")
        page.context.set_offline(True)
        send(page, "Hello")
        expect(page.locator("#notice")).to_contain_text("The server does not answer.")
        expect(page.locator("#server")).to_have_text("Not connected")
        page.context.set_offline(False)
        expect(page.locator("#server")).to_have_text("actor-q4")
        page.get_by_role("button", name="Try again").click()
        expect(answer(page)).to_contain_text("Answer to Hello.")


def test_a_stream_that_breaks_keeps_what_came(browser):
    actor = Actor(script)
    actor.stage.seconds = 0.02
    with opened(browser, "about:blank") as page:
        with serving(create_app(actor)) as url:
            page.goto(url)
            send(page, "long")
            expect(answer(page)).to_contain_text("word3 ")
            actor.stage.seconds = 0.2
        expect(page.locator("#notice")).to_have_class("error")
        expect(answer(page)).to_contain_text("word3 ")
        expect(page.locator("#server")).to_have_text("Not connected")


def test_a_full_queue_and_a_full_context_are_said_in_a_line(browser):
    actor = Actor(script, context=400)
    actor.stage.seconds = 0.02
    with serving(create_app(actor, queue=1, parallel=1)) as url, opened(browser, url) as page:
        for name in ("long 1", "long 2", "long 3"):
            page.get_by_role("button", name="New chat").click()
            send(page, name)
            expect(page.locator("article.user")).to_contain_text(name)
        expect(page.locator("#notice")).to_contain_text(re.compile(r"Too many requests are waiting. Try again in \d+ s."))
        actor.stage.seconds = 0
        page.get_by_role("link", name="long 1").click()
        expect(answer(page).locator("footer")).to_contain_text("The model's context is full")
        page.get_by_label("Message", exact=True).fill("too much of it " * 40)
        expect(page.locator("#context")).to_have_class("full")
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_contain_text("This conversation is too long for the model")
