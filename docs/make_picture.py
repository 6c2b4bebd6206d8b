"""docs/chat.png: the chat page with the demo model's answers. `python -m docs.make_picture` draws it; it needs a Chromium."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import expect

import edgemistral
from edgemistral.server import create_app
from tests.browser import opened, running_browser, send
from tests.serving import serving

PATH = Path(__file__).parent / "chat.png"
QUESTIONS = "What should I see in Paris?", "When is the best time to go?"


def draw() -> None:
    with edgemistral.load(edgemistral.demo_model()) as model, serving(create_app(model)) as url, running_browser() as browser, \
            opened(browser, url, viewport={"width": 1080, "height": 690}, color_scheme="light") as page:
        for n, question in enumerate(QUESTIONS):
            send(page, question)
            expect(page.locator("article.assistant")).to_have_count(n + 1)
            expect(page.get_by_role("button", name="Send (Enter)")).to_be_visible(timeout=60_000)
        page.wait_for_timeout(500)
        page.screenshot(path=PATH, animations="disabled")


if __name__ == "__main__":
    draw()
