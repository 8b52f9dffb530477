"""The page at `/`: for browsers alone, with nothing from elsewhere, and answers on it are only text."""

from __future__ import annotations

import re
from typing import Any

import openai
import pytest

from serve.running import Running, running
from tunesmith.serve.middleware import AccessPolicy, ApiKeys

KEY = "k-0123456789abcdef-0123456789abcdef"
ACCEPT = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def test_the_page_holds_all_it_needs(server: Running) -> None:
    status, text, head = server.ask("GET", "/", headers=ACCEPT)
    assert status == 200
    assert "content-type: text/html; charset=utf-8" in head.lower()
    policy = next(line for line in head.splitlines() if line.lower().startswith("content-security-policy: "))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"(src|href)=.https?:", text)
    assert "<script nonce=" in server.ask("GET", "/")[1], "whatever is accepted"
    assert server.ask("HEAD", "/", headers=ACCEPT)[0] in (404, 405)
    assert server.ask("GET", "/v1/models", headers=ACCEPT)[1]["object"] == "list"


def test_a_page_of_this_server_may_ask_it_and_of_no_other(server: Running) -> None:
    own = f"http://127.0.0.1:{server.bound.port}"
    assert server.ask("GET", "/v1/models", headers={"Origin": own})[0] == 200
    for origin in (f"http://localhost:{server.bound.port}", f"{own}0", "http://127.0.0.1", f"{own}.evil.example"):
        assert server.ask("GET", "/v1/models", headers={"Origin": origin})[0] == 403, origin
    rebound = {"Host": "evil.example", "Origin": "http://evil.example"}
    assert server.ask("GET", "/v1/models", headers=rebound)[0] == 403


def test_the_page_is_all_that_is_given_without_a_key() -> None:
    with running(AccessPolicy(keys=ApiKeys.of([KEY]))) as server:
        assert server.ask("GET", "/", headers=ACCEPT)[0] == 200
        for method, path in (("GET", "/v1/models"), ("POST", "/"), ("GET", "//"), ("GET", "/index.html")):
            assert server.ask(method, path, headers=ACCEPT)[0] == 401, (method, path)


def test_the_page_has_a_key_field_if_needed_and_names_a_models_task(
    server: Running,
) -> None:
    """A rule for rows would show what `hidden` hides."""
    text = server.ask("GET", "/")[1]
    assert '<div class="row" id="keys" hidden>' in text
    assert "[hidden] { display: none !important; }" in text
    assert '"Tuned for the task " + model.task' in text


def test_the_responses_api_is_refused_with_the_way_out(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="POST /v1/chat/completions"):
        server.client().responses.create(model="support", input="hello")


def test_one_can_chat_on_the_page(browser: Any) -> None:
    with running(AccessPolicy(keys=ApiKeys.of([KEY]))) as server:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{server.bound.url}/")
        page.wait_for_selector("#key:visible")
        page.fill("#key", KEY)
        page.click("#enter")
        page.locator("#model option >> nth=1").wait_for(state="attached")
        hostile = "<img src=x onerror=alert(1)> <script>alert(2)</script>"
        page.fill("#text", hostile)
        page.press("#text", "Enter")
        page.locator("#send:not([disabled])").wait_for()
        assert page.locator("#talk p").all_inner_texts() == [hostile, hostile]
        assert page.locator("#talk img, #talk script").count() == 0
        page.fill("#text", "FULL")
        page.click("#send")
        page.locator("#said", has_text="The queue is full").wait_for()
        assert [one["content"] for one in server.engine.asks[-1].messages] == [hostile, hostile, "FULL"]
        assert server.engine.asks[-1].temperature == 0
        page.fill("#text", "SLOW " + "word " * 200)
        page.click("#send")
        page.locator("#talk p.assistant:last-child", has_text="SLOW word word").wait_for()
        assert page.locator("#talk p", has_text="FULL").count() == 0, "what failed goes with the next message"
        page.click("#stop")
        page.locator("#said", has_text="Stopped.").wait_for()
        server.wait_until_idle()
        page.evaluate("() => { const it = document.createElement('script'); it.textContent = 'window.planted = 1';"
                      "document.body.append(it); }")  # fmt: skip
        assert page.evaluate("window.planted") is None, "the policy of the page lets no other script run"
        assert not [one for one in said if not any(known in one for known in ("Content Security Policy", "401", "429"))]
        assert all(url.startswith((server.bound.url, "data:")) for url in asked)
        page.close()
