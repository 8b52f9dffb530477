"""Pages in a real browser: from a file to a chat with what was made of it, and nothing said that should not be."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.fake_runs import fake_run
from pages.sites import fork_children, put_states, run_of, serving
from tiny_run import chats, model_folder
from tunesmith.types import Event

pytestmark = pytest.mark.pages
PATIENCE_MS = 60_000
HURRY = """for (const name of ['setTimeout', 'setInterval']) {
    const slow = window[name];
    window[name] = (call, ms, ...more) => slow(call, ms / 6, ...more);
}"""
"""Timers of the pages run faster: a test waits for them all the time."""
WIDE = """() => [...document.querySelectorAll('main *, header *, footer *')]
    .filter(box => !box.closest('.scroll, .plot, pre, .text, svg, .skip') && box.getBoundingClientRect().width > 0
        && box.getBoundingClientRect().right > innerWidth + 1)
    .map(box => box.outerHTML.slice(0, 160))"""
SMALL = """() => [...document.querySelectorAll('button, input, select, summary, nav a, .button')]
    .map(box => [box.outerHTML.slice(0, 120), box.getBoundingClientRect()])
    .filter(([, box]) => box.width > 0 && (box.height < 23.5 || box.width < 20)).map(([words]) => words)"""


@pytest.fixture
def heard() -> list[str]:
    """What a page said, popped up, asked elsewhere, or was forbidden by its policy: nothing, in the end."""
    return []


@pytest.fixture
def opened(browser: Any, heard: list[str]) -> Iterator[Callable[..., Any]]:
    """Opens a page that is listened to."""
    contexts = []

    def open_page(url: str, link: str, **how: Any) -> Any:
        settings = {"viewport": {"width": 1200, "height": 900}, **how}
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


@pytest.mark.slow  # twenty seconds; on a busy machine once in some runs the forked engine does not come up
def test_from_a_file_to_a_chat_with_both_models(
    opened: Callable[..., Any], heard: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_children(monkeypatch)
    model, rows = model_folder(tmp_path / "model"), chats(tmp_path / "elsewhere.jsonl", 24)
    dropped = tmp_path / "dropped.jsonl"
    rows.rename(dropped)
    folder = tmp_path / "data"
    folder.mkdir()
    with serving(folder) as (site, url):
        page = opened(url, site.access.new_link())
        page.get_by_text("No runs yet").wait_for()
        page.get_by_role("link", name="Data", exact=True).click()
        page.set_input_files("#file-to-send", dropped)
        page.get_by_text("can be trained on").wait_for()
        assert (folder / "dropped.jsonl").read_bytes() == dropped.read_bytes()
        page.fill("#model", str(model))
        page.get_by_role("button", name="Look").click()
        page.locator(".reading mark").first.wait_for()
        page.get_by_role("link", name="Tune a model on it").click()
        page.get_by_role("button", name="Start").wait_for()
        page.locator("summary", has_text="change").first.click()
        quick = {"train.epochs": 2, "threads": 1, "method.name": "lora"}
        quick |= {"evaluation.samples": 0, "evaluation.surprising": 0, "evaluation.general": "false"}
        page.goto(page.url + "".join(f"&set.{key}={value}" for key, value in quick.items()))
        page.get_by_role("button", name="Start").click()
        page.wait_for_url("**/ui/runs/dropped-*")
        name = page.url.rpartition("/")[2]
        page.locator("a", has_text="Result").wait_for()
        page.locator("#curve canvas").wait_for()
        report = run_of(site, name).report
        page.locator("a", has_text="Result").click()
        page.get_by_text(report["headline"][0].split("`")[0]).first.wait_for()
        page.get_by_role("link", name="Chat with both").click()
        page.get_by_role("button", name="Load it with its base").click()
        page.locator("#text").wait_for()
        page.fill("#text", "<b>what is tallest</b>")
        page.keyboard.press("Enter")
        page.locator("#send:not([disabled])").wait_for()
        assert page.locator(".ask-bubble").inner_text() == "<b>what is tallest</b>"
        names = page.locator(".side h3 bdi").all_inner_texts()
        assert sorted(names) == sorted(card.name for card in site.engine.served)
        assert name in names
        assert len(page.locator(".side .count").all_inner_texts()) == 2
        assert all("tokens" in words for words in page.locator(".side .count").all_inner_texts())
    assert heard == []


def test_a_run_of_the_command_line_is_seen_and_stopped(
    opened: Callable[..., Any], heard: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    with serving(tmp_path) as (site, url):
        page = opened(url, site.access.new_link())
        page.get_by_text("No runs yet").wait_for()
        run, _, _ = fake_run(root / "seen-0001", num_steps=30)
        with run.lock():
            page.locator("#at-seen-0001").wait_for()
            page.locator("#at-seen-0001 a").click()
            page.locator("#curve canvas").wait_for()
            page.locator("#as-table").evaluate("fold => { fold.open = true }")
            run.append(Event("step", 31, time.time(), {"loss": 0.4321, "lr": 1e-4}, {"seconds": 1.0}))
            page.get_by_text("loss 0.4321").wait_for()
            assert page.locator("#as-table").evaluate("fold => fold.open"), "what was unfolded stays"
            page.wait_for_timeout(2000)  # the curve is loaded every two seconds, a sixth of that here
            page.focus("#curve")
            page.keyboard.press("ArrowLeft")
            page.get_by_text("step 31 · training 0.4321").wait_for()
            run.append(Event("step", 32, time.time(), {"loss": 0.4311, "lr": 1e-4}, {"seconds": 1.0}))
            page.get_by_text("loss 0.4311").wait_for()
            assert page.locator("#curve-said").inner_text().startswith("step 3"), "a refresh took the words away"
            run.note_progress("evaluate", 42, 100)
            page.get_by_text("measuring held-out rows: 42 %").wait_for()
            page.get_by_role("button", name="Stop").click()
            page.get_by_text("Stops after its step").wait_for()
            assert run.stop_asked()
        run.append(Event("stopped", 32, time.time(), {"message": "stopped after step 32"}))
        page.get_by_role("button", name="Resume").wait_for()
    page.get_by_text("No answer from the server").wait_for()
    assert page.get_by_role("button", name="Resume").is_disabled()
    assert [words for words in heard if not words.startswith("Failed to load resource: net::")] == []


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    folder = tmp_path_factory.mktemp("states")
    put_states(folder / "runs")
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a " * 400, "completion": "<i>b</i>"}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        fork_children(patch)
        with serving(folder) as served:
            yield served


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1200, "light"), (2560, "light")])
def test_pages_fit_their_window_and_can_be_hit(
    opened: Callable[..., Any], heard: list[str], states: tuple[Any, str], width: int, scheme: str
) -> None:
    site, url = states
    page = opened(url, site.access.new_link(), viewport={"width": width, "height": 800}, color_scheme=scheme)
    paths = ("/ui/", "/ui/runs/failed-0002", "/ui/runs/done-0001/result", "/ui/data?file=rows.jsonl", "/ui/new")
    for path in paths[: 5 if width < 2000 else 2]:
        page.goto(url + path)
        page.wait_for_function("() => !document.querySelector('.waiting')")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, path
        assert page.evaluate(WIDE) == [], path
        assert page.evaluate(SMALL) == [], path
        assert page.locator("h1").count() == 1
    assert heard == []


def test_pages_read_without_scripts(opened: Callable[..., Any], heard: list[str], states: tuple[Any, str]) -> None:
    site, url = states
    page = opened(url, site.access.new_link(), java_script_enabled=False)
    page.goto(f"{url}/ui/runs/killed-0003")
    assert page.locator("svg.curve polyline").count() == 2
    assert page.locator("#held-out tr").count() > 2
    assert page.locator("button:visible").count() == 0, "no button that does nothing"
    page.goto(f"{url}/ui/data?file=rows.jsonl")
    page.locator("#row-1").wait_for()
    assert heard == []


AXE = """() => axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']})
    .then(result => result.violations.map(
        rule => rule.id + ': ' + rule.nodes.map(node => node.html.slice(0, 140)).join(' | ')))"""


@pytest.mark.parametrize(
    ("scheme", "paths"),
    [
        ("light", ("", "runs/failed-0002", "runs/done-0001/result", "data", "data?file=rows.jsonl", "new", "chat")),
        ("dark", ("", "runs/failed-0002", "runs/begun-0009")),
    ],
    ids=["light", "dark"],
)
def test_axe_finds_no_fault(
    opened: Callable[..., Any], states: tuple[Any, str], scheme: str, paths: tuple[str, ...]
) -> None:
    library = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    script = (Path(library.__file__).parent / "axe.min.js").read_text("utf-8")
    site, url = states
    page = opened(url, site.access.new_link(), color_scheme=scheme, bypass_csp=True)
    for path in paths:
        page.goto(f"{url}/ui/{path}")
        page.wait_for_function("() => !document.querySelector('.waiting')")
        page.evaluate(script)
        assert page.evaluate(AXE) == [], path
