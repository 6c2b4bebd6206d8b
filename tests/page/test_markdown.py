"""How the chat page shows Markdown: the structure that is meant, never anything that acts, and never for long."""

from __future__ import annotations

import random
import re

import pytest

from edgemistral.server import create_app
from tests.browser import running_browser
from tests.serving import fake_model, serving

RENDER = """async ([texts]) => {
    const { Markdown } = await import('/page/markdown.js');
    const root = document.createElement('div');
    document.body.append(root);
    const markdown = new Markdown(root);
    for (const text of texts) markdown.update(text);
    const html = root.innerHTML;
    root.remove();
    return html;
}"""
LINK = '<a href="https://example.com/a" target="_blank" rel="noopener noreferrer" title="https://example.com/a">'


@pytest.fixture(scope="module")
def page():
    with running_browser() as browser, serving(create_app(fake_model())) as url:
        page = browser.new_page()
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("request", lambda request: request.url.startswith(url) or problems.append(request.url))
        page.goto(url)
        yield page
        assert problems == []


def render(page, *texts):
    """HTML of the last text, which the others grew into; without the buttons of code blocks."""
    html = page.evaluate(RENDER, [texts])
    return re.sub(r"<button.*?</button>", "", html)


def code(language, text):
    return f'<div class="code"><div><span>{language}</span></div><pre tabindex="0"><code>{text}</code></pre></div>'


@pytest.mark.parametrize(("text", "html"), [
    ("One\nline\n\nTwo", "<p>One<br>line</p><p>Two</p>"),
    ("# A\n## B\n###### C\n#none\n#", "<h3>A</h3><h4>B</h4><h6>C</h6><p>#none</p><h3></h3>"),
    ("**b** *i* ***both*** __b__ _i_ ~~s~~", "<p><strong>b</strong> <em>i</em> <em><strong>both</strong></em> "
     "<strong>b</strong> <em>i</em> <del>s</del></p>"),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    ("2 * 3 * 4, snake_case_name, ~5 and ~6, **open, ** a **", "<p>2 * 3 * 4, snake_case_name, ~5 and ~6, **open, ** a **</p>"),
    ("`a*b*` ``x`y`` ` open", "<p><code>a*b*</code> <code>x`y</code> ` open</p>"),
    (r"\*not\* \<b\> a\b", "<p>*not* &lt;b&gt; a\\b</p>"),
    ("```py\nx = y\n\n  y\n```\nafter", code("py", "x = y\n\n  y") + "<p>after</p>"),
    ("````\n```\n````", code("text", "```")),
    ("~~~\nopen", code("text", "open")),
    ("```\n<b>&amp;", code("text", "&lt;b&gt;&amp;amp;")),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n4. b\n   more\n\nafter", '<ol start="3"><li>a</li><li>b<br>more</li></ol><p>after</p>'),
    ("1. a\n\n2. b", '<ol start="1"><li><p>a</p></li><li><p>b</p></li></ol>'),
    ("1. a\n   - b\n2. c", '<ol start="1"><li>a<ul><li>b</li></ul></li><li>c</li></ol>'),
    ("1. a\n  - b\n2. c", '<ol start="1"><li>a</li></ol><ul><li>b</li></ul><ol start="2"><li>c</li></ol>'),
    ("1. a\n   ```sh\n   run\n   ```\n2. b", '<ol start="1"><li>a' + code("sh", "run") + "</li><li>b</li></ol>"),
    ("1. a\n```\nx\n```\n2. b", '<ol start="1"><li>a</li></ol>' + code("text", "x") + '<ol start="2"><li>b</li></ol>'),
    ("- [ ] a\n- [x] b", "<ul><li>☐ a</li><li>☑ b</li></ul>"),
    ("In\n2024. it was", "<p>In<br>2024. it was</p>"),
    ("> a\n> > b\n> - c", "<blockquote><p>a</p><blockquote><p>b</p></blockquote><ul><li>c</li></ul></blockquote>"),
    ("a\n\n---\n\n* * *", "<p>a</p><hr><hr>"),
    ("| a | b |\n|:-:|--:|\n| `x` | \\| |\n| 1 | 2 | 3 |\n\nend",
     '<div class="table" tabindex="0"><table><thead><tr><th class="center">a</th><th class="right">b</th></tr></thead><tbody>'
     '<tr><td class="center"><code>x</code></td><td class="right">|</td></tr>'
     '<tr><td class="center">1</td><td class="right">2</td></tr></tbody></table></div><p>end</p>'),
    ("a | b", "<p>a | b</p>"),
    ("a<br>b<BR />c", "<p>a<br>b<br>c</p>"),
    ("[*a*](https://example.com/a)", f"<p><span>{LINK}<em>a</em></a><small> (example.com)</small></span></p>"),
    ("(https://example.com/a).", f"<p>({LINK}https://example.com/a</a>).</p>"),
    ("<https://example.com/a>", f"<p>{LINK}https://example.com/a</a></p>"),
    ("![a](https://example.com/a)", f"<p><span>{LINK}a</a><small> (example.com)</small></span></p>"),
])
def test_structure(page, text, html):
    assert render(page, text).replace(' class=""', "") == html
    assert render(page, *(text[:end] for end in range(len(text) + 1))).replace(' class=""', "") == html   # as it grows


MATH = """(texts) => import('/page/markdown.js').then(({ Markdown }) => texts.map((text) => {
    const root = document.createElement('div');
    new Markdown(root).update(text);
    const found = [...root.querySelectorAll('.math')].map((node) => [node.localName,
        node.querySelector('math') ? 'drawn' : node.textContent]);
    for (const node of root.querySelectorAll('.math')) node.replaceWith('·');
    return [found, root.textContent.trim()];
}))"""


@pytest.mark.parametrize(("text", "found", "rest"), [
    (r"For $x^2$ and \(y_i * z_i * w\).", [["span", "drawn"]] * 2, "For · and ·."),
    (r"$$x = \frac{1}{2}$$", [["div", "drawn"]], "·"),
    ("so\n\\[\na * b * c\n- d\n= e\n\\]\nand", [["div", "drawn"]], "so·and"),
    ("\\begin{align}\na &= b \\\\\nc &= d\n\\end{align}", [["div", "drawn"]], "·"),
    ("- item\n  $$\n  x\n  $$\n- \\[ y \\]", [["div", "drawn"]] * 2, "item··"),
    (r"a $$x$$ b \[y\] c", [["div", "drawn"]] * 2, "a · b · c"),
    ("```math\nx^2\n```", [["div", "drawn"]], "·"),
    ("| a |\n|---|\n| $x$ |", [["span", "drawn"]], "a·"),
    ("It costs $5, or $10; from 5$ to 10$, US$ 3 and $ 4 $.", [], "It costs $5, or $10; from 5$ to 10$, US$ 3 and $ 4 $."),
    ("`$x$` and\n```\n\\(y\\) $z$\n```", [], "$x$ andtext\\(y\\) $z$"),
    (r"$\frobnicate{x}$", [["span", r"\frobnicate{x}"]], "·"),                    # unknown: as it was written
    ("\\[\na_1 * b_1 * c", [["div", "\\[\na_1 * b_1 * c"]], "·"),                 # its end has not come
    ("$" + "{" * 3000 + "$", [["span", "{" * 3000]], "·"),                        # not valid
    (r"$\def\a{\a\a}\a$", [["span", r"\def\a{\a\a}\a"]], "·"),                    # endless
])
def test_formulas(page, text, found, rest):
    [[nodes, left]] = page.evaluate(MATH, [text])
    assert (nodes, left) == (found, rest)


@pytest.mark.parametrize("tex", [
    r"\href{javascript:alert(1)}{x}", r"\url{https://example.com}", r"\includegraphics{https://example.com/a.png}",
    r"\htmlId{draft}{x}", r"\id{draft}{x}", r"\class{code}{x}", r"\style{position:fixed}{x}", r"\data{a=b}{x}",
    r"\label{draft} x", r"\begin{equation} x \label{log} \end{equation}", r"\text{<img src=x onerror=alert(1)>}",
    r"\rule{9999em}{9999em}", r"\ref{draft}", r"\begin{align}\label{draft} x \tag{1}\end{align}",
])
def test_no_formula_reaches_out_of_itself(page, tex):
    found = page.evaluate("""async (tex) => {
        const { mathNode } = await import('/page/math.js');
        const node = mathNode(tex, true);
        document.body.append(node);
        const nodes = [...node.querySelectorAll('*')];
        const result = [nodes.filter(({ localName }) => ['img', 'script', 'iframe'].includes(localName)).length,
            nodes.flatMap((each) => each.getAttributeNames()).filter((name) => /^(id|href|src|on.*)$/.test(name)),
            Math.max(0, ...nodes.map((each) => each.getBoundingClientRect().height))];
        node.remove();
        return result;
    }""", tex)
    assert found[:2] == [0, []] and found[2] < 1000


@pytest.mark.parametrize(("language", "text", "words"), [
    ("python", "def f(x):  # a\n    return 'b'", {"h-keyword": "def", "h-comment": "# a", "h-string": "'b'"}),
    ("js", "const a = 1;", {"h-keyword": "const", "h-number": "1"}),
    ("html", "<p class='a'>b</p><script>let c = 1;</script>", {"h-tag": "<p class='a'>", "h-keyword": "let"}),
    ("json", '{"a": null}', {"h-attr": '"a"'}), ("c++", "int a;", {"h-type": "int"}),
    ("sql", "SELECT 1", {"h-keyword": "SELECT"}),
    ("nonesuch", "def f", {}), ("", "def f", {}), ("__proto__", "x", {}), ("constructor", "x", {}),
])
def test_code_is_coloured_and_stays_the_same_text(page, language, text, words):
    found, shown = page.evaluate("""async ([language, text]) => {
        const { coloured } = await import('/page/code.js');
        const code = coloured(text, language), words = {};
        for (const node of [...code.querySelectorAll('span')].reverse()) words[node.className] = node.textContent;
        return [words, code.textContent];
    }""", [language, text])
    assert shown == text and {name: found.get(name) for name in words} == words
    assert words or found == {}


def test_a_long_code_that_grows_is_coloured_at_its_end(page):
    plain, coloured, again = page.evaluate("""async () => {
        const { Markdown } = await import('/page/markdown.js');
        const root = document.createElement('div'), markdown = new Markdown(root);
        const text = '```python\\n' + 'x = 1\\n'.repeat(2000), words = () => root.querySelectorAll('.h-number').length;
        const found = [];
        markdown.update(text, true);
        found.push(words());
        markdown.update(text + '```\\nmore', true);
        found.push(words());
        const kept = root.firstChild;
        markdown.update(text + '```\\nmore and more', false);
        return [...found, kept === root.firstChild];
    }""")
    assert (plain, coloured, again) == (0, 2000, True)


@pytest.mark.parametrize("text", [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<a href='javascript:alert(1)'>x</a>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x]( javascript:alert(1) )",
    "[x](\x01javascript:alert(1))",
    "[x](<javascript:alert(1)>)",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x) [y](file:///etc/passwd) [z](blob:https://example.com/1) [w](about:blank)",
    "[x](/v1/models) [y](//example.com/) [z](?a#b)",
    "<javascript:alert(1)>",
    "![x](https://example.com/secret.png)",
    "[x](https://example.com/\" onmouseover=\"alert(1))",
    "```\" onclick=alert(1)\n</code></pre><img src=x onerror=alert(1)>\n```",
    "| <img src=x onerror=alert(1)> |\n|---|\n| <script>alert(1)</script> |",
    "`<img src=x onerror=alert(1)>`",
    "https://example.com/<img/src=x/onerror=alert(1)>",
    "&lt;img src=x onerror=alert(1)&gt;",
    "\r<b>\u2028<i>\u0000```\r```",
])
def test_nothing_that_acts_comes_of_any_text(page, text):
    found = page.evaluate("""async (text) => {
        const { Markdown } = await import('/page/markdown.js');
        const root = document.createElement('div');
        document.body.append(root);
        new Markdown(root).update(text);
        const nodes = [...root.querySelectorAll('*')];
        for (const node of root.querySelectorAll('p, span, li, code')) node.dispatchEvent(new MouseEvent('mouseover'));
        const result = { names: nodes.map((node) => node.localName), text: root.textContent,
            attributes: nodes.flatMap((node) => node.closest('button') ? [] : node.getAttributeNames()),
            links: [...root.querySelectorAll('a')].map((a) => [a.protocol, a.host, a.rel, a.target]) };
        root.remove();
        return result;
    }""", text)
    allowed = {"p", "a", "span", "small", "div", "pre", "code", "button", "svg", "use", "table", "thead", "tbody", "tr", "th",
               "td", "br"}
    assert set(found["names"]) <= allowed
    assert set(found["attributes"]) <= {"class", "href", "target", "rel", "title", "tabindex"}
    assert all(link == ["https:", "example.com", "noopener noreferrer", "_blank"] for link in found["links"])
    assert "alert(1)" not in text or "alert(1)" in found["text"]   # shown, as text


@pytest.mark.parametrize("unit", [
    "*", "_", "~~", "**a ", "a* ", "*a _b ", "`", "`` ` ", "[", "[a](", "]", "[[a](x)](y) ", "![", "(", "<", "<http://", "\\",
    "> ", ">", "- ", "-", "- - ", "1. ", "  - a\n", "#", "# ", "|", "|-", "| a |\n|-|\n", "```\n", "~~~ `", "\n", " ", "\t",
    "a ", "https://", "https://a.b/!!!!", "https://a)))", "https://((((", "a\r", "> - ", "- a\n\n", "[ ] ", ":-:|", "é", "🙂",
    "_a", "a_", "$", "$a", "$$", "$$\n", "$a$ ", "$\\frac", "\\(", "\\(a\\) ", "\\[", "\\[\n", "\\[a\\]\n\n",
    "\\begin{align}\n", "```js\n/*\n```\n", "[a]: b\n", "&amp;", "<br>", "http://a.b ",
])
def test_no_text_keeps_the_page_busy(page, unit):
    milliseconds = page.evaluate("""async (unit) => {
        const { Markdown } = await import('/page/markdown.js');
        const root = document.createElement('div');
        const texts = [unit.repeat(Math.ceil(20000 / unit.length))];
        texts.push(texts[0] + 'x' + texts[0], texts[0] + '`x', `${texts[0]}](https://a.b)`, `| ${texts[0]} |\\n|-|`);
        const start = performance.now();
        for (const text of texts) new Markdown(root).update(text);
        document.body.append(root);
        root.getBoundingClientRect();
        const spent = performance.now() - start;
        root.remove();
        return spent;
    }""", unit)
    assert milliseconds < 10_000   # for five texts of 20 to 40 kB and their layout: quadratic work would take far longer


def test_a_text_that_grows_looks_like_one_that_came_at_once(page):
    parts = ["**b**", "*i ", "`c`", "\n", "\n\n", "- ", "1. ", "> ", "```", "| a |", "|-|", "# ", "  ", "    ", "x", "[a](", "http://a.b",
             ")", "~~", "_", "<br>", "---", "\t", "é", "$$", "$", "\\(", "\\)", "\\[\n", "\\]", "\\frac12",
             "```py\n", "if x:\n"]
    rng = random.Random(1)
    for _ in range(60):
        pieces = [rng.choice(parts) for _ in range(30)]
        steps = ["".join(pieces[:end]) for end in range(1, 31)]
        assert render(page, *steps) == render(page, steps[-1]), steps[-1]
