"""Pages in a browser that is listened to, and a server with a run in every state."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PATIENCE_MS = 60_000
HURRY = """for (const name of ['setTimeout', 'setInterval']) {
    const slow = window[name];
    window[name] = (call, ms, ...more) => slow(call, ms / 12, ...more);
}"""
"""Timers of the pages run faster: a test waits for them all the time."""


@pytest.fixture
def heard() -> list[str]:
    """What a page said, popped up, asked elsewhere, or was forbidden by its policy: nothing, in the end."""
    return []


@pytest.fixture
def opened(browser: Any, heard: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Opens a page that is listened to."""
    monkeypatch.setattr("tunesmith.pages.live.LIVE_S", (2.0, 2.0))
    contexts = []

    def open_page(url: str, link: str, **how: Any) -> Any:
        settings = {"viewport": {"width": 1200, "height": 900}, "reduced_motion": "reduce", **how}
        context = browser.new_context(**settings)
        contexts.append(context)
        context.add_init_script(HURRY)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith((url, "data:")) or heard.append(request.url))
        page.goto(url + link)
        page.wait_for_url("**/ui/")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    from pages.sites import fork_children, put_states, serving  # not before quiet.py

    folder = tmp_path_factory.mktemp("states")
    put_states(folder / "runs")
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a " * 400, "completion": "<i>b</i>"}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        fork_children(patch)
        with serving(folder) as served:
            yield served
