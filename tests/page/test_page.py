"""The chat page, end to end in a real browser: a real server, and a model that says what a test wants."""

from __future__ import annotations

import json
import mimetypes
import re

import pytest
from playwright.sync_api import expect

from edgemistral.server import create_app
from tests.browser import LONG, Actor, answer, opened, running_browser, script, send
from tests.serving import HTTP, serving, wait_for


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def actor():
    return Actor(script)


@pytest.fixture(scope="module")
def app(actor):
    return create_app(actor)


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as url:
        yield url


@pytest.fixture
def page(browser, url, actor):
    actor.stage.seconds = 0.0
    actor.asked.clear()
    actor.options.clear()
    with opened(browser, url) as page:
        yield page


def idle(app):
    wait_for(lambda: not app.state.service.scheduler.running and not app.state.service.scheduler.waiting)


def test_scripts_have_their_type_even_where_the_registry_has_another(monkeypatch):
    monkeypatch.setitem(mimetypes.types_map, ".js", "text/plain")
    with serving(create_app(Actor(script))) as url:
        assert HTTP.get(f"{url}/page/chat.js").headers["content-type"].startswith("text/javascript")


def test_the_description_for_programs(browser, url):
    with opened(browser, f"{url}/docs") as page:
        expect(page.get_by_role("heading", name="POST /v1/chat/completions")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_role("link", name="here").click()
        expect(page.get_by_label("Message", exact=True)).to_be_visible()


# ---- one chat --------------------------------------------------------------------------------------------------------

def test_an_answer_streams_and_tells_its_rate(page, actor):
    actor.stage.seconds = 0.05
    send(page, "long story")
    expect(answer(page)).to_contain_text("word5 ")
    assert "word199" not in answer(page).inner_text()   # it came piece by piece
    expect(page.locator("#rate")).to_contain_text("tokens/s")
    actor.stage.seconds = 0
    expect(answer(page).locator(".body")).to_have_text(LONG)
    expect(answer(page).locator("footer")).to_contain_text(re.compile(r"\d+ tokens · [\d.]+ tokens/s"))
    ids = actor.tokenizer.encode_chat([{"role": "user", "content": "long story"}, {"role": "assistant", "content": LONG}])
    expect(page.locator("#context")).to_have_text(f"{len(ids):,} of 2,048 tokens")
    expect(page.locator("#context")).to_have_attribute("aria-valuenow", str(len(ids)))


@pytest.mark.parametrize("by", ["key", "button"])
def test_stopping_stops_the_server_and_going_on_ends_the_answer(page, actor, app, by):
    actor.stage.seconds = 0.02
    send(page, "long")
    expect(answer(page)).to_contain_text("word3 ")
    if by == "key":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    expect(answer(page).locator("footer")).to_contain_text("Stopped")
    idle(app)
    text = answer(page).locator(".body").inner_text()
    assert LONG.startswith(text) and len(text) < len(LONG)
    actor.stage.seconds = 0
    page.get_by_role("button", name="Go on").click()
    expect(answer(page).locator(".body")).to_have_text(LONG)
    assert page.locator("article").count() == 2
    assert actor.asked[-1] == [("user", "long"), ("assistant", text)]


def test_stopping_before_the_first_word_leaves_the_question(page, actor, app):
    actor.stage.seconds = 20
    send(page, "Hello")
    expect(page.get_by_text("Thinking")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#notice")).to_contain_text("Stopped.")
    expect(page.locator("article.assistant")).to_have_count(0)
    actor.stage.seconds = 0
    page.get_by_role("button", name="Try again").click()
    expect(answer(page)).to_contain_text("Answer to Hello.")


def test_answering_anew(page, actor):
    send(page, "One")
    expect(answer(page)).to_contain_text("Answer to One.")
    page.get_by_role("button", name="Answer anew").click()
    wait_for(lambda: len(actor.asked) == 2)      # the old answer stands there until then
    expect(answer(page)).to_contain_text("Answer to One.")
    assert actor.asked == [[("user", "One")]] * 2
    assert page.locator("article").count() == 2


def test_the_old_answer_comes_back_if_there_is_no_new_one(page, actor, app):
    send(page, "One")
    expect(answer(page)).to_contain_text("Answer to One.")
    actor.stage.seconds = 20
    page.get_by_role("button", name="Answer anew").click()
    expect(page.get_by_text("Thinking")).to_be_visible()
    page.keyboard.press("Escape")
    expect(answer(page)).to_contain_text("Answer to One.")
    actor.stage.seconds = 0
    idle(app)


def test_editing_the_last_message(page, actor):
    send(page, "One")
    expect(answer(page)).to_contain_text("Answer to One.")
    send(page, "Two")
    expect(answer(page)).to_contain_text("Answer to Two.")
    expect(page.get_by_role("button", name="Edit and send again")).to_have_count(1)
    page.keyboard.press("ArrowUp")   # in the empty draft
    field = page.get_by_label("Your message")
    expect(field).to_have_value("Two")
    field.fill("Three")
    page.keyboard.press("Escape")
    expect(page.locator("article.user").last).to_contain_text("Two")
    page.get_by_role("button", name="Edit and send again").click()
    page.get_by_label("Your message").fill("Three")
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text("Answer to Three.")
    assert actor.asked[-1] == [("user", "One"), ("assistant", "Answer to One."), ("user", "Three")]
    assert page.locator("article").count() == 4


def test_a_long_prompt_shows_its_progress(page, actor):
    actor.stage.seconds = 1
    send(page, "say:Done. " + "many words of a prompt " * 40)
    expect(page.get_by_text(re.compile(r"Reading the conversation: [1-9]\d* %"))).to_be_visible()
    assert 0 < int(page.locator("article progress").get_attribute("value")) < 100
    actor.stage.seconds = 0
    expect(answer(page)).to_contain_text("Done.")
    expect(page.locator("article progress")).to_have_count(0)


def test_settings_and_the_system_text_reach_the_model(page, actor):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System text of this chat").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.2")
    page.get_by_label("Top-k").fill("40")
    page.get_by_label("Longest answer").fill("0")
    page.get_by_label("Seed").fill("7")
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    send(page, "long")
    expect(answer(page).locator("footer")).to_contain_text("Reached the longest answer · 32 tokens")
    assert actor.asked == [[("system", "Be brief."), ("user", "long")]]
    assert {name: actor.options[0][name] for name in ("temperature", "top_k", "top_p", "seed")} == {
        "temperature": 0.2, "top_k": 40, "top_p": 1.0, "seed": 7}
    page.reload()   # all of it is kept
    expect(page.get_by_text("System text: Be brief.")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature")).to_have_value("0.2")
    page.get_by_role("button", name="Reset all").click()
    expect(page.get_by_label("Temperature")).to_have_value("0.7")
    page.get_by_label("Guardrail").check()
    page.keyboard.press("Escape")
    send(page, "Hello")
    expect(answer(page)).to_contain_text("Answer to Hello.")
    assert actor.options[-1]["temperature"] == 0.7
    assert "care, respect, and truth" in actor.asked[-1][0][1]


# ---- several chats ---------------------------------------------------------------------------------------------------

def test_answers_of_two_chats_at_once_do_not_mix(page, actor):
    actor.stage.seconds = 0.05
    send(page, "long one")
    expect(answer(page)).to_contain_text("word3 ")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    send(page, "say:" + "Other words. " * 20)
    actor.stage.seconds = 0
    expect(answer(page).locator(".body")).to_have_text(("Other words. " * 20).strip())
    page.get_by_role("link", name="long one").click()
    expect(answer(page).locator(".body")).to_have_text(LONG)
    page.go_back()
    expect(answer(page)).to_contain_text("Other words.")
    assert [len(asked) for asked in actor.asked] == [1, 1]


def test_chats_outlive_a_reload_also_in_the_middle_of_an_answer(page, actor, app):
    send(page, "First chat")
    expect(answer(page)).to_contain_text("Answer to First chat.")
    page.get_by_role("button", name="New chat").click()
    actor.stage.seconds = 0.02
    send(page, "long")
    expect(answer(page)).to_contain_text("word3 ")
    page.reload()
    expect(answer(page)).to_contain_text("word3 ")
    expect(answer(page).locator("footer")).to_contain_text("Broke off")
    idle(app)
    actor.stage.seconds = 0
    page.get_by_role("button", name="Go on").click()
    expect(answer(page).locator(".body")).to_have_text(LONG)
    page.get_by_role("link", name="First chat").click()
    expect(answer(page)).to_contain_text("Answer to First chat.")
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("heading", name="New chat")).to_be_visible()
    page.go_back()
    expect(answer(page)).to_contain_text("Answer to First chat.")


def menu(page, chat, item):
    page.get_by_role("button", name=f"More on {chat}").click()
    page.get_by_role("button", name=item, exact=True).click()


def test_renaming_exporting_deleting_and_undoing(page):
    send(page, "Where is it?")
    expect(answer(page)).to_contain_text("Answer to Where is it?.")
    menu(page, "Where is it?", "Rename")
    page.get_by_role("textbox", name="Name of the chat").fill("Places")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Places")).to_be_visible()
    with page.expect_download() as download:
        menu(page, "Places", "Export as Markdown")
    assert download.value.suggested_filename == "Places.md"
    text = download.value.path().read_text(encoding="utf-8")
    assert text == "# Places\n\n## You\n\nWhere is it?\n\n## Model\n\nAnswer to Where is it?.\n"
    with page.expect_download() as download:
        menu(page, "Places", "Export as JSON")
    assert json.loads(download.value.path().read_text(encoding="utf-8"))["messages"][0] == {
        "role": "user", "content": "Where is it?"}
    menu(page, "Places", "Delete")
    expect(page.locator("#chats li")).to_have_count(0)
    expect(page.locator("article")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("heading", name="Places")).to_be_visible()
    expect(answer(page)).to_contain_text("Answer to Where is it?.")


def test_two_tabs_keep_each_others_chats(page):
    send(page, "From one")
    expect(answer(page)).to_contain_text("Answer to From one.")
    other = page.context.new_page()
    other.goto(page.url.partition("#")[0])
    send(other, "From the other")
    expect(answer(other)).to_contain_text("Answer to From the other.")
    expect(page.get_by_role("link", name="From the other")).to_be_visible()
    expect(other.get_by_role("link", name="From one")).to_be_visible()


def test_damaged_storage_does_no_harm(page):
    robot = {"title": "", "system": "", "updated": 1, "messages": [{"role": "robot", "content": "x"}]}
    damaged = {f"edgemistral.chat.{i}": text for i, text in enumerate(["{", "7", '{"title": 1}', json.dumps(robot)])}
    damaged["edgemistral.settings"] = json.dumps({"temperature": "hot", "top_p": 99, "seed": {}})
    page.evaluate("(entries) => Object.assign(localStorage, entries)", damaged)
    page.reload()
    expect(page.locator("#chats li")).to_have_count(0)
    send(page, "Hello")
    expect(answer(page)).to_contain_text("Answer to Hello.")


# ---- keyboard, narrow windows, colours -------------------------------------------------------------------------------

def test_enter_sends_and_with_shift_begins_a_line(page, actor):
    draft = page.get_by_label("Message", exact=True)
    expect(draft).to_be_focused()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    expect(page.get_by_role("button", name="Send (Enter)")).to_be_enabled()
    height = draft.bounding_box()["height"]
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text("Answer to One")
    assert actor.asked == [[("user", "One\nTwo")]]
    assert draft.bounding_box()["height"] < height   # it had grown
    expect(draft).to_be_focused()


def test_everything_can_be_reached_with_tab_and_has_a_name(page):
    send(page, "say:```python\nprint(1)\n```")
    expect(answer(page)).to_contain_text("print(1)")
    seen, names = set(), set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate("""() => {
            const node = document.activeElement, style = getComputedStyle(node);
            return [node.ariaLabel || node.labels?.[0]?.textContent || node.innerText,
                    style.outlineStyle !== 'none' || node === document.body || node.id === 'draft']}""")
        names.add(name.strip())
        seen.add(outlined)   # the box around the draft shows its focus
    assert seen == {True}
    assert {"New chat", "Settings", "Copy the code", "Copy the message", "Answer anew", "Edit and send again", "Message",
            "For programs"} <= names, names
    unnamed = page.evaluate("""() => [...document.querySelectorAll('button, input, textarea, a')].filter((node) =>
        !(node.ariaLabel || node.labels?.length || node.textContent.trim())).map((node) => node.outerHTML)""")
    assert unnamed == []


def test_a_narrow_window(browser, url):
    with opened(browser, url, viewport={"width": 360, "height": 640}) as page:
        table = "| a | b | c |\n|---|---|---|\n| " + "wide " * 9 + "|" + "long" * 30 + "| x |"
        send(page, f"say:{table}\n\n```\n{'x' * 300}\n```")
        expect(answer(page).locator("table")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("document.getElementById('scroll').scrollWidth <= document.getElementById('scroll').clientWidth")
        for name in ("Settings", "Chats", "Send (Enter)"):
            box = page.get_by_role("button", name=name, exact=True).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        expect(page.get_by_role("button", name="New chat")).to_be_hidden()
        page.get_by_role("button", name="Chats", exact=True).click()
        expect(page.get_by_role("button", name="New chat")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="New chat")).to_be_hidden()
        page.get_by_role("button", name="Settings").click()
        box = page.locator("#panel").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640


def test_light_and_dark(browser, url):
    def is_dark(page):
        red, *_ = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
        return red < 128

    with opened(browser, url, color_scheme="dark") as page:
        assert is_dark(page)
        page.get_by_role("button", name="Colours: as the system").click()
        assert not is_dark(page)
        page.reload()
        assert not is_dark(page)
        page.get_by_role("button", name="Colours: light").click()
        page.emulate_media(color_scheme="light")
        assert is_dark(page)
