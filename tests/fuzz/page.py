"""Streamed text to the chat page's Markdown, in Chromium."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Harness

WORDS = (
    "**", "*", "_", "`", "```", "```js\n", "~~~", "# ", "> ", "- ", "1. ", "| a | b |\n|---|---|\n", "|", "\n", "\n\n", "    ",
    "\\", "$", "$$",
    "\\(", "\\[", "\\frac{a}{b}", "{", "}", "\\href{javascript:alert(1)}{x}", "[x](", "[x](javascript:alert(1))",
    "[x](data:text/html,a)", ")", "![", "]", "<", ">",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>", "javascript:alert(1)", "https://example.com/", "&#106;", "&lt;", "<br>", "\u202e",
    "\U0001f600", "\0",
    "\ud800", "~~", "[^1]", "<http://a.b>", "'", '"', "==", "---\n", "\\begin{align}", "\\end{align}", "\\text{", "^", "&",
    "[ ] ", "e\u0301",
)
SEEDS = (
    "# A\n\nText with **bold**, *italic* and `code`.\n\n- a\n- b\n  1. c\n\n```python\ndef f(x):\n    return x\n```\n",
    "| a | b |\n|:-:|--:|\n| $x^2$ | [x](https://example.com) |\n\n> quote\n> > more\n\n$$\\frac{1}{2}$$\n",
    "\\[\nx = \\begin{pmatrix}a & b\\\\c & d\\end{pmatrix}\n\\]\n\n1. one\n\n   two\n\n<b>html</b> &amp; https://example.com/a?b=c",
)
RENDER = """async (inputs) => {
    const { Markdown } = await import('/page/markdown.js');
    const forbidden = new Set(['script', 'img', 'iframe', 'object', 'embed', 'form', 'base', 'meta', 'link', 'style',
        'svg', 'foreignObject']);
    const results = [];
    for (const [text, cuts] of inputs) {
        const root = document.createElement('div'), fresh = document.createElement('div');
        document.body.append(root, fresh);
        const begun = performance.now();
        let fault = '';
        try {
            const markdown = new Markdown(root);
            for (const cut of cuts) markdown.update(text.slice(0, cut), true);
            markdown.update(text);
            new Markdown(fresh).update(text);
            if (root.innerHTML !== fresh.innerHTML) fault = 'the stream ends otherwise than the whole text';
            for (const node of root.querySelectorAll('*')) {
                if (node.closest('button')) continue;      // of ours: its icon is an SVG
                if (forbidden.has(node.localName)) fault = 'an element ' + node.localName;
                for (const name of node.getAttributeNames()) {
                    if (/^(on|src$|id$|formaction|xlink)/i.test(name)) fault = 'an attribute ' + name;
                    const value = node.getAttribute(name);
                    if (name === 'href' && !/^(https?|mailto):/i.test(value)) fault = 'a link to ' + value;
                }
            }
        } catch (error) { fault = 'raised ' + error + ' ' + (error.stack ?? ''); }
        const took = performance.now() - begun;
        root.remove();
        fresh.remove();
        results.push([fault, took]);
    }
    return results;
}"""


class Page(Harness):
    """Not a forked child but a tab: what it complains about, and a tab that dies, are faults."""

    name = "markdown"
    planted = "every address may be a link (parser.validateLink)"
    batch = 50

    def prepare(self) -> None:
        from contextlib import ExitStack

        from edgemistral.server import create_app
        from tests.browser import find_browser, running_browser
        from tests.serving import fake_model, serving

        if find_browser() is None:
            raise NotImplementedError("no Chromium, Chrome or Edge")
        self.stack = ExitStack()
        self.browser = self.stack.enter_context(running_browser())
        self.url = self.stack.enter_context(serving(create_app(fake_model())))
        self.page: Any = None

    def close(self) -> None:
        self.stack.close()

    def make(self, chance: Random) -> Any:
        if chance.random() < 0.3:
            text = "".join(chance.choice(WORDS) * chance.choice((1, 1, 1, 2, 30)) for _ in range(chance.randrange(1, 40)))
        else:
            text = mutate.text(chance, chance.choice(SEEDS), WORDS)
            text = mutate.text(chance, text, WORDS) if chance.random() < 0.5 else text
        return [text, sorted(chance.randint(0, len(text)) for _ in range(chance.randrange(8)))]

    def run_batch(self, seed: int, first: int, count: int, plant: bool = False) -> Iterator[tuple[int, str, str]]:
        for start in range(first, first + count, self.batch):
            numbers = range(start, min(start + self.batch, first + count))
            inputs = [self.nth(seed, number) for number in numbers]
            results = self._render(inputs, plant)
            if results is None:        # which one is it?
                results = [(self._render([one], plant) or [("the tab died or hung", 0.0)])[0] for one in inputs]
            for number, (fault, took) in zip(numbers, results, strict=True):
                if fault:
                    yield number, "traceback", fault
                elif took > 1000 * self.seconds:
                    yield number, "slow", f"{took:.0f} ms"
                else:
                    yield number, "rendered", ""

    def run(self, given: Any) -> str:
        [(fault, _)] = self._render([given], False) or [("the tab died or hung", 0.0)]
        if fault:
            raise AssertionError(fault)
        return "rendered"

    def _render(self, inputs: list[Any], plant: bool) -> list[tuple[str, float]] | None:
        from playwright.sync_api import Error

        try:
            if self.page is None:
                self._open(plant)
            self.problems.clear()
            found = self.page.evaluate(RENDER, json.loads(json.dumps(inputs)))
            if self.problems:
                found[0][0] = found[0][0] or f"the page complains: {self.problems[0]}"
            return [(fault, took) for fault, took in found]
        except Error:
            if self.page is not None:
                self.page.close()
            self.page = None
            time.sleep(0.1)
            return None

    def _open(self, plant: bool) -> None:
        self.page = self.browser.new_page()
        self.page.set_default_timeout(30_000)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: request.url.startswith(self.url) or self.problems.append(request.url))
        if plant:
            self.page.route("**/page/markdown.js", _unchecked)
        self.page.goto(self.url)


def _unchecked(route: Any) -> None:
    answer = route.fetch()
    text = answer.text()
    for check, without in (("urlOf(url) !== null", "true"), ("SCHEMES.includes(", "(true || "),
                           (r"!/^(https?:\/\/|mailto:)/i.test(address)", "false")):
        assert check in text
        text = text.replace(check, without)
    route.fulfill(response=answer, body=text)
