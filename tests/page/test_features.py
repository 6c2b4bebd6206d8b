"""What people do with their chats: versions, changes, files in and out, drafts, and calls of tools; end to end in a browser.

Over 400 lines: one browser and one scripted model serve all of it.
"""

from __future__ import annotations

import json
import re
import time

import pytest
from playwright.sync_api import expect

from edgemistral.server import create_app
from tests.browser import Actor, answer, opened, running_browser, script, send
from tests.serving import serving, wait_for

DAY = 86_400_000   # ms


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def actor():
    return Actor(lambda messages: f"{script(messages)} Take {len(takes)}.")


takes: list[int] = []


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
    takes.clear()
    with opened(browser, url) as page:
        yield page


def says(page, text):
    expect(answer(page).locator(".body")).to_have_text(text)


def converse(page, *texts):
    for text in texts:
        send(page, text)
        says(page, f"Answer to {text}. Take {len(takes)}.")


def button(scope, name):
    return scope.get_by_role("button", name=name, exact=True)


def toast_undo(page):
    page.locator("#toast").get_by_role("button", name="Undo").click()


# ---- versions, changes, deletions ------------------------------------------------------------------------------------

def test_versions_of_an_answer_keep_what_followed_each(page, actor):
    converse(page, "One", "Two")
    takes.append(1)
    first = page.locator("article.assistant").first
    first.hover()
    button(first, "Answer anew from here").click()
    says(page, "Answer to One. Take 1.")
    expect(page.locator("article")).to_have_count(2)
    assert actor.asked[-1] == [("user", "One")]
    expect(answer(page).locator(".versions")).to_contain_text("2/2")
    converse(page, "Three")
    button(page, "The version before").click()
    expect(page.locator("article.user").last).to_contain_text("Two")
    expect(page.locator("article.assistant").first).to_contain_text("Take 0.")
    expect(page.locator(".versions")).to_contain_text("1/2")
    page.reload()
    button(page, "The next version").click()
    expect(page.locator("article.user").last).to_contain_text("Three")
    expect(page.locator("article")).to_have_count(4)


def test_a_changed_question_is_a_version_too(page, actor):
    converse(page, "One", "Two")
    first = page.locator("article.user").first
    first.hover()
    button(first, "Edit").click()
    page.get_by_label("Your message").fill("Eins")
    page.keyboard.press("Enter")
    says(page, "Answer to Eins. Take 0.")
    expect(page.locator("article")).to_have_count(2)
    assert actor.asked[-1] == [("user", "Eins")]
    button(page, "The version before").click()
    expect(page.locator("article")).to_have_count(4)
    expect(page.locator("article.user").first).to_contain_text("One")


def test_a_version_without_an_answer_goes_away(page, actor, app):
    converse(page, "One")
    actor.stage.seconds = 20
    button(page, "Answer anew").click()
    expect(page.get_by_text("Thinking")).to_be_visible()
    page.keyboard.press("Escape")
    says(page, "Answer to One. Take 0.")
    expect(page.locator(".versions")).to_have_count(0)
    actor.stage.seconds = 0
    wait_for(lambda: not app.state.service.scheduler.running)


def test_any_message_can_be_corrected_without_a_new_answer(page, actor):
    converse(page, "One", "Two")
    for article, label, text in (("user", "Your message", "Eins"), ("assistant", "The model's answer", "**Antwort** eins")):
        message = page.locator(f"article.{article}").first
        message.hover()
        button(message, "Edit" if article == "user" else "Edit the answer").click()
        page.get_by_label(label).fill(text)
        button(page, "Save").click()
    expect(page.locator("article.assistant").first.locator("strong")).to_have_text("Antwort")
    assert len(actor.asked) == 2
    converse(page, "Three")
    assert actor.asked[-1][:2] == [("user", "Eins"), ("assistant", "**Antwort** eins")] and len(actor.asked[-1]) == 5


def test_deleting_messages_and_undoing(page, actor):
    converse(page, "One", "Two", "Three")
    message = page.locator("article.user").nth(1)
    message.hover()
    button(message, "Delete the message").click()
    expect(page.locator("article")).to_have_count(4)
    expect(page.locator("#toast")).to_contain_text("Deleted the message and its answer.")
    toast_undo(page)
    expect(page.locator("article")).to_have_count(6)
    expect(page.locator("article").nth(2)).to_contain_text("Two")
    message = page.locator("article.assistant").nth(1)
    message.hover()
    button(message, "Delete the message").click()
    expect(page.locator("article")).to_have_count(5)
    page.reload()
    expect(page.locator("article")).to_have_count(5)
    converse(page, "Four")
    assert [role for role, _ in actor.asked[-1]] == ["user", "assistant", "user", "user", "assistant", "user"]


# ---- the limit, drafts, files ----------------------------------------------------------------------------------------

def test_a_message_over_the_limit_is_not_sent(page, actor):
    converse(page, "One")
    words = "many words of a message " * 500
    draft = page.get_by_label("Message", exact=True)
    draft.fill(words)
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text(re.compile(
        r"too long for the model: [\d,]+ tokens, and it reads and writes at most 2,048. Shorten your message by [\d,]+ tokens"))
    assert len(actor.asked) == 1 and page.locator("article").count() == 2
    expect(draft).to_have_value(words)
    draft.fill("long " + "word " * 800)
    expect(page.locator("#notice")).to_be_hidden()
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text("word199")
    expect(answer(page).locator("footer")).to_contain_text("tokens/s")
    draft.fill("enough words " * 500)   # alone it fits
    page.keyboard.press("Enter")
    button(page, "New chat with this message").click()
    expect(draft).to_have_value("enough words " * 500)
    expect(page.locator("article")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text("Answer to enough words")
    assert len(actor.asked[-1]) == 1
    page.get_by_role("link", name="One").click()
    expect(draft).to_have_value("")


def test_a_change_over_the_limit_stays_in_its_field(page, actor):
    converse(page, "One")
    page.locator("article.user").hover()
    button(page, "Edit and send again").click()
    field, words = page.get_by_label("Your message"), "many words " * 1200
    field.fill(words)
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("too long for the model")
    expect(field).to_have_value(words)
    field.fill("Two")
    page.keyboard.press("Enter")
    says(page, "Answer to Two. Take 0.")
    expect(page.locator("#notice")).to_be_hidden()
    assert len(actor.asked) == 2


def test_drafts_are_kept_for_each_chat(page):
    draft = page.get_by_label("Message", exact=True)
    draft.fill("of a new chat")
    page.reload()
    expect(draft).to_have_value("of a new chat")
    converse(page, "One")
    expect(draft).to_have_value("")
    draft.fill("of the first")
    page.get_by_role("button", name="New chat").click()
    expect(draft).to_have_value("")
    draft.fill("of another")
    page.get_by_role("link", name="One").click()
    expect(draft).to_have_value("of the first")
    page.reload()
    expect(draft).to_have_value("of the first")
    page.get_by_role("button", name="New chat").click()
    expect(draft).to_have_value("of another")


DROP = """([selector, name, content, done]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(content)], name));
    const target = document.querySelector(selector);
    for (const type of done ? ['dragenter', 'dragover', 'drop'] : ['dragenter', 'dragover'])
        target.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


def drop(page, selector, name, content, done=True):
    page.evaluate(DROP, [selector, name, list(content), done])


def test_text_files_that_are_dropped_go_with_the_message(page, actor):
    drop(page, "#log", "notes.md", b"x", done=False)
    expect(page.get_by_text("Drop a text file to add it to the message")).to_be_visible()
    drop(page, "#log", "notes.md", "Größe\r\n```\ncode\n```\r\n".encode())
    expect(page.locator("#drop")).to_be_hidden()
    drop(page, "#log", "old.txt", "Größe".encode("cp1252"))
    drop(page, "#log", "wide.txt", "Größe".encode("utf-16"))
    expect(page.locator(".chip")).to_have_count(3)
    button(page, "Take out wide.txt").click()
    send(page, "say:Read.")
    expect(answer(page)).to_contain_text("Read.")
    text = "say:Read.\n\nnotes.md:\n````md\nGröße\n```\ncode\n```\n````\n\nold.txt:\n```txt\nGröße\n```"
    assert actor.asked == [[("user", text)]]
    expect(page.locator(".chip")).to_have_count(0)


@pytest.mark.parametrize(("name", "content", "problem"), [
    ("a.png", b"\x89PNG\r\n\x1a\n\0\0", "a.png is no text file."), ("a.pdf", b"%PDF-1.7\n", "a.pdf is no text file."),
    ("big.txt", b"a" * ((2 << 20) + 1), "big.txt is larger than 2 MiB"),
])
def test_files_that_are_no_text_are_refused(page, name, content, problem):
    page.locator("#pick").set_input_files([{"name": name, "mimeType": "", "buffer": content}])
    expect(page.locator("#toast")).to_contain_text(problem)
    expect(page.locator(".chip")).to_have_count(0)
    expect(page.get_by_role("button", name="Send (Enter)")).to_be_disabled()


def test_a_file_alone_can_be_sent(page, actor):
    page.locator("#pick").set_input_files([{"name": "a", "mimeType": "", "buffer": b"say:x"}])
    page.get_by_role("button", name="Send (Enter)").click()
    expect(answer(page)).to_contain_text("x")   # then the request has arrived
    assert actor.asked == [[("user", "a:\n```\nsay:x\n```")]]


def test_examples_fill_the_draft(page):
    example = page.locator("#examples button").first
    text = example.inner_text()
    example.click()
    expect(page.get_by_label("Message", exact=True)).to_have_value(text)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text(f"Answer to {text}")
    expect(page.locator("#examples")).to_be_hidden()


def test_on_a_phone_enter_begins_a_line(browser, url):
    with opened(browser, url, viewport={"width": 390, "height": 780}, is_mobile=True, has_touch=True) as page:
        draft = page.get_by_label("Message", exact=True)
        draft.tap()
        page.keyboard.type("One")
        page.keyboard.press("Enter")
        page.keyboard.type("Two")
        expect(draft).to_have_value("One\nTwo")
        page.get_by_role("button", name="Send (Enter)").tap()
        expect(answer(page)).to_contain_text("Answer to One")
        draft.fill("Three")
        page.keyboard.press("Control+Enter")   # of a keyboard that is plugged in
        expect(answer(page)).to_contain_text("Answer to Three")


# ---- search, dates, files in and out ---------------------------------------------------------------------------------

def put(page, **changes):
    messages = [{"role": "user", "content": "Hello"}]
    chat = {"title": "", "system": "", "updated": time.time() * 1000, "messages": messages, **changes}
    page.evaluate("(text) => localStorage.setItem(`edgemistral.chat.${localStorage.length}`, text)", json.dumps(chat))


def test_search_and_dates(page):
    now = time.time() * 1000
    put(page, title="Today's", updated=now)
    put(page, title="Of yesterday", updated=now - DAY)
    put(page, title="Of this week", updated=now - 4 * DAY, messages=[{"role": "user", "content": "About Größe and WEIGHT"}])
    put(page, title="Old", updated=1_600_000_000_000)
    page.reload()
    expect(page.locator("#chats li")).to_have_text(
        ["Today", "Today's", "Yesterday", "Of yesterday", "The last 7 days", "Of this week", "September 2020", "Old"])
    find = page.get_by_role("searchbox", name="Search in the chats")
    find.fill("weight größe")
    expect(page.locator("#chats a")).to_have_text(["Of this week"])
    find.fill("nothing like it")
    expect(page.locator("#chats li")).to_have_text(["Nothing found"])
    find.fill("")
    expect(page.locator("#chats a")).to_have_count(4)
    converse(page, "One")
    assert answer(page).locator("time").get_attribute("datetime").startswith(time.strftime("%Y-", time.gmtime()))


def test_damaged_messages_do_no_harm(page):
    for change in (
        {"at": "x"}, {"at": 1e300}, {"rate": "fast"}, {"tokens": None}, {"tool_calls": 1}, {"tool_calls": [{"id": 1}]},
        {"versions": 1}, {"versions": []}, {"versions": [{}], "version": 0}, {"versions": [None], "version": 5},
        {"versions": [None, {"content": "x"}], "version": 0},
        {"versions": [None, {"content": "x", "after": [1]}], "version": 0}, {"role": "robot"}, {"content": None},
    ):
        put(page, messages=[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi", **change}])
    assert page.evaluate("localStorage.length") == 14
    page.reload()
    expect(page.locator("#server")).to_have_text("actor-q4")
    expect(page.locator("#chats li")).to_have_count(0)


def test_all_chats_go_out_and_come_in(browser, url, page):
    converse(page, "One")
    takes.append(1)
    button(page, "Answer anew").click()
    says(page, "Answer to One. Take 1.")
    page.get_by_role("button", name="New chat").click()
    converse(page, "Two")
    with page.expect_download() as download:
        button(page, "Export all").click()
    assert re.fullmatch(r"edgemistral-chats-\d{4}-\d\d-\d\d\.json", download.value.suggested_filename)
    content = download.value.path().read_bytes()
    with opened(browser, url) as other:
        for _ in range(2):   # the second time changes nothing
            other.locator("#pick-chats").set_input_files([{"name": "all.json", "mimeType": "", "buffer": content}])
            expect(other.locator("#toast")).to_contain_text("Imported 2 chats.")
            expect(other.locator("#chats a")).to_have_text(["Two", "One"])
        other.get_by_role("link", name="One").click()
        expect(other.locator(".versions")).to_contain_text("2/2")
        converse(other, "Three")
        other.locator("#pick-chats").set_input_files([{"name": "all.json", "mimeType": "", "buffer": content}])
        expect(other.locator("#chats a")).to_have_count(3)   # the chat that went on is not written over


@pytest.mark.parametrize("content", [
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
     {"role": "assistant", "content": None}],
])
def test_conversations_of_other_programs_come_in(page, content):
    drop(page, "#side", "chat.json", json.dumps(content).encode())
    expect(page.locator("article.user")).to_have_text("Hi", use_inner_text=True)
    expect(page.get_by_text("System text: Be brief.")).to_be_visible()
    expect(page.get_by_text("This message has no answer yet.")).to_be_visible()


def test_files_without_chats_say_what_is_wrong(page):
    for content, problem in (
        (b"no", "is no JSON file"), (b"{}", "has no list of messages"), (b"7", "has no list of messages"),
        (b"null", "has no list"), (b'{"chats": []}', "has no chats in it"), (b'{"chats": [7]}', "has no list of messages"),
        (b"[]", "has no messages in it"),
        (b'{"messages": [7]}', "message 1 has no role that is known"), (b'[{"role": "robot"}]', "message 1 has no role"),
        (b'[{"role": "user", "content": 7}]', "message 1 has no text"),
        (b'[{"role": "user", "content": [{"image": 1}]}]', "more than text"),
        (b'[{"role": "assistant", "tool_calls": [{}]}]', "tool calls that cannot be read"),
        (b'{"chats": [{"title": "", "system": "", "updated": 1, "messages": [null]}]}', "no role that is known"),
    ):
        page.locator("#pick-chats").set_input_files([{"name": "a.json", "mimeType": "", "buffer": content}])
        expect(page.locator("#toast")).to_contain_text(problem)
        page.evaluate("document.getElementById('toast').replaceChildren()")
    expect(page.locator("#chats li")).to_have_count(0)


# ---- calls of tools --------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLS = [
    {"tool_calls": [{"index": 0, "id": "call00001", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
    {"tool_calls": [{"index": 1, "id": "call00002", "type": "function",
                     "function": {"name": "weather", "arguments": '{"city": "<b>Rome</b>"}'}}]},
]
USAGE = {"usage": {"completion_tokens": 9, "total_tokens": 20}, "timings": {"tokens_per_second": 5.0}, "choices": []}


def stream(deltas, finish):
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    events += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}, USAGE]
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def test_calls_of_tools_are_cards_that_take_results(page):
    bodies = []

    def reply(route):
        bodies.append(route.request.post_data_json)
        done = any(message["role"] == "tool" for message in bodies[-1]["messages"])
        text = stream([{"content": "It is 21 degrees."}], "stop") if done else stream(CALLS, "tool_calls")
        route.fulfill(body=text, content_type="text/event-stream")

    page.route("**/v1/chat/completions", reply)
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("Tools of this chat").click()
    tools = page.get_by_label("Tools, as JSON")
    tools.fill("[1]")
    expect(page.get_by_text("This cannot be used: number 1 must have a function with a name.")).to_be_visible()
    tools.fill(json.dumps(TOOLS))
    page.keyboard.press("Escape")
    send(page, "What is the weather?")
    cards = page.get_by_role("region", name="Call of weather")
    expect(cards).to_have_count(2)
    expect(cards.first.locator("pre")).to_have_text('{\n  "city": "Paris"\n}', use_inner_text=True)
    expect(cards.last).to_contain_text("<b>Rome</b>")
    assert bodies[0]["tools"] == TOOLS
    page.reload()
    cards.first.get_by_label("Result of the call").fill('{"degrees": 21}')
    page.keyboard.press("Enter")
    expect(cards.first).to_contain_text("answered")
    assert len(bodies) == 1   # the other call waits
    cards.last.get_by_label("Result of the call").fill("unknown")
    cards.last.get_by_role("button", name="Give the result").click()
    expect(answer(page)).to_contain_text("It is 21 degrees.")
    user, called, *results = bodies[1]["messages"]
    assert user["role"] == "user" and called["content"] == ""
    assert [call["function"]["arguments"] for call in called["tool_calls"]] == ['{"city": "Paris"}', '{"city": "<b>Rome</b>"}']
    assert results == [{"role": "tool", "content": '{"degrees": 21}', "tool_call_id": "call00001"},
                       {"role": "tool", "content": "unknown", "tool_call_id": "call00002"}]
    expect(page.locator("article")).to_have_count(3)   # results stand on the cards
