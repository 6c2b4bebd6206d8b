"""A real browser on a page of somebody else: it can neither read from the server nor make it do anything."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edgemistral.server import create_app
from tests.browser import TIMEOUT, Actor, running_browser
from tests.serving import HTTP, serving

HOSTILE = "evil.test"   # a name that leads to this computer, as in DNS rebinding

# Each gives what it could read, "sent" if it cannot know, or the refusal.
ATTACKS = """async (base) => {
    const body = JSON.stringify({messages: [{role: 'user', content: 'Hello'}], max_tokens: 2});
    const read = async (path, options) => {
        try {
            const response = await fetch(base + path, options);
            return [response.status, response.type, (await response.text()).slice(0, 300)];
        } catch (error) {
            return error.name;
        }
    };
    const results = {};
    for (const path of ['/', '/health', '/metrics', '/openapi.json', '/v1/models', '/page/chat.js']) {
        results['get ' + path] = await read(path);
        results['get with cookies ' + path] = await read(path, {credentials: 'include', mode: 'cors'});
        results['get opaque ' + path] = await read(path, {mode: 'no-cors'});
    }
    for (const path of ['/', '/score', '/v1/chat/completions', '/v1/completions', '/tokenize']) {
        for (const type of ['text/plain', 'application/json', 'application/x-www-form-urlencoded']) {
            const headers = {'content-type': type};
            results[`post ${type} ${path}`] = await read(path, {method: 'POST', body, headers});
            if (type !== 'application/json')
                results[`post opaque ${type} ${path}`] = await read(path, {method: 'POST', body, headers, mode: 'no-cors'});
        }
        navigator.sendBeacon(base + path, body);
        navigator.sendBeacon(base + path, new Blob([body], {type: 'application/json'}));
    }
    results['delete'] = await read('/v1/requests/1', {method: 'DELETE'});
    results['options'] = await read('/v1/models', {method: 'OPTIONS'});
    const load = (name, properties) => new Promise((resolve) => {
        const node = Object.assign(document.createElement(name), properties);
        node.onload = () => {
            const unreadable = name === 'iframe' && node.contentDocument === null;
            resolve(unreadable ? 'unreadable' : node.contentDocument?.body.innerText ?? 'loaded');
        };
        node.onerror = () => resolve('error');
        document.body.append(node);
    });
    results['script'] = await load('script', {src: base + '/page/theme.js'});
    results['image'] = await load('img', {src: base + '/page/icon.svg'});
    results['style'] = await load('link', {rel: 'stylesheet', href: base + '/page/style.css'});
    results['frame'] = await load('iframe', {src: base + '/'});
    results['socket'] = await new Promise((resolve) => {
        const socket = new WebSocket(base.replace('http', 'ws') + '/v1/chat/completions');
        socket.onopen = () => resolve('opened');
        socket.onerror = () => resolve('error');
    });
    results['events'] = await new Promise((resolve) => {
        const source = new EventSource(base + '/v1/models');
        source.onopen = () => resolve('opened');
        source.onerror = () => { source.close(); resolve('error'); };
    });
    return results;
}"""
FORM = """([action, type]) => {
    const name = '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "x": "';
    const form = Object.assign(document.createElement('form'), {action, method: 'POST', enctype: type});
    form.append(Object.assign(document.createElement('input'), {name, value: '"}'}));
    document.body.append(form);
    form.submit();
}"""


class Hostile(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>hostile</title><body>")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hostile_port():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    # What newer browsers do by themselves against such pages is off: the server has to be safe with any browser.
    with running_browser(f"--host-resolver-rules=MAP {HOSTILE} 127.0.0.1",
                         "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests") as browser:
        yield browser


@pytest.fixture
def actor():
    return Actor(lambda messages: "An answer.")


@pytest.fixture
def url(actor):
    with serving(create_app(actor)) as url:
        yield url


@pytest.fixture
def page(browser, url):   # closed before the server is
    context = browser.new_context()
    context.set_default_timeout(TIMEOUT)
    yield context.new_page()
    context.close()


def untouched(url, actor):
    """Nothing was computed, but the requests did arrive."""
    assert actor.asked == [] and actor.stage.calls == []
    lines = [line for line in HTTP.get(f"{url}/metrics").text.splitlines() if line.startswith("edgemistral_requests_total")]
    answered = [line for line in lines if 'method="POST"' in line and 'status="2' in line]
    assert answered == [], answered
    return sum('status="403"' in line for line in lines) > 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", HOSTILE])
def test_a_page_of_another_origin(page, url, actor, hostile_port, host):
    page.goto(f"http://{host}:{hostile_port}/")
    results = page.evaluate(ATTACKS, url)
    for name, result in results.items():
        assert result in ("TypeError", "error", "unreadable"), (name, result)
    assert untouched(url, actor)


@pytest.mark.parametrize("encoding", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_a_form_of_another_origin(page, url, actor, hostile_port, path, encoding):
    page.goto(f"http://127.0.0.1:{hostile_port}/")
    with page.expect_response(url + path) as response:
        page.evaluate(FORM, [url + path, encoding])
    assert response.value.status == 403
    assert untouched(url, actor)


def test_a_window_that_another_origin_opens_cannot_be_reached(page, url, hostile_port):
    page.goto(f"http://127.0.0.1:{hostile_port}/")
    with page.context.expect_page() as opened:
        page.evaluate("(url) => { window.other = open(url); }", url)
    opened.value.wait_for_selector("#draft")
    assert page.evaluate("window.other.closed")   # as far as the opener can see (Cross-Origin-Opener-Policy)
    assert opened.value.evaluate("window.opener") is None


def test_a_name_that_was_rebound_to_this_computer(page, url, actor):
    port = url.rpartition(":")[2]
    theirs = f"http://{HOSTILE}:{port}"
    page.route(f"{theirs}/", lambda route: route.fulfill(body="<!doctype html><body>", content_type="text/html"), times=1)
    page.goto(f"{theirs}/")             # from the attacker's own server, says the name service
    results = page.evaluate(ATTACKS, theirs)   # and now it says that the name is this computer's
    for name, result in results.items():
        if isinstance(result, list):
            assert result[0] == 403 and '"host_not_allowed"' in result[2], (name, result)
        else:
            assert result in ("error", "unreadable"), (name, result)
    assert untouched(url, actor)
