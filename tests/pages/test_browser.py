"""Pages in a real browser: from a file to a chat with what was made of it, and nothing said that should not be."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.fake_runs import fake_run
from often import slow
from pages.sites import fork_children, load_fake, put_done, put_states, run_of, serving
from serve.running import wait_for
from tiny_run import chats, model_folder
from tunesmith.pages import markup, run_list
from tunesmith.types import Event

pytestmark = pytest.mark.pages
PATIENCE_MS = 60_000
HURRY = """for (const name of ['setTimeout', 'setInterval']) {
    const slow = window[name];
    window[name] = (call, ms, ...more) => slow(call, ms / 12, ...more);
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


@pytest.mark.slow  # half a minute
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
            page.wait_for_timeout(800)  # the curve is loaded every two seconds, a twelfth of that here
            page.focus("#curve")
            page.keyboard.press("ArrowLeft")
            page.get_by_text("step 31 · training 0.4321").wait_for()
            run.append(Event("step", 32, time.time(), {"loss": 0.4311, "lr": 1e-4}, {"seconds": 1.0}))
            page.get_by_text("loss 0.4311").wait_for()
            page.wait_for_timeout(800)
            words = page.locator("#curve-said").inner_text()
            assert words == "step 31 · training 0.4321", "neither a refresh nor new points change what the keys chose"
            page.keyboard.press("ArrowRight")
            page.get_by_text("step 32 · training 0.4311").wait_for()
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


def test_what_a_person_chose_stays_when_the_page_is_refreshed(
    opened: Callable[..., Any], heard: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_list, "LOOK_S", 0.1)
    for name in ("a-1", "b-2"):
        put_done(tmp_path / "runs", name, "chat", 0.1)
    run, _, _ = fake_run(tmp_path / "runs" / "c-3", num_steps=4)
    with serving(tmp_path) as (site, url):
        page = opened(url, site.access.new_link())
        page.get_by_label("Choose a-1").check()
        page.get_by_label("Choose b-2").check()
        with run.lock():
            page.locator("#at-c-3").wait_for()  # a refresh brought it
            assert page.get_by_label("Choose a-1").is_checked()
        page.get_by_role("button", name="Compare the chosen runs").click()
        page.wait_for_url("**/ui/compare?run=*&run=*")
    assert [words for words in heard if not words.startswith("Failed to load resource: net::")] == []


def test_a_newer_build_and_an_ended_session_are_met(
    opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path) as (site, url):
        page = opened(url, site.access.new_link())
        contents = markup._static()[1]
        monkeypatch.setattr(markup, "_static", lambda: ("0123456789ab", contents))
        page.locator("link[href='/ui/static/0123456789ab/pages.css']").wait_for(state="attached")
        site.access.file.unlink()
        page.get_by_role("heading", name="Tunesmith").wait_for()
        assert "Open the link that" in page.inner_text("main")


def test_two_people_a_killed_server_and_a_killed_run(opened: Callable[..., Any], tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "runs" / "shared-0001", num_steps=30)
    lock = run.lock()
    with serving(tmp_path) as (site, url):
        tabs = [opened(url, site.access.new_link()) for _ in range(2)]
        with lock:
            for tab in tabs:
                tab.goto(f"{url}/ui/runs/shared-0001")
                tab.locator("#curve canvas").wait_for()
            tabs[0].get_by_role("button", name="Stop").click()
            tabs[1].get_by_text("Stops after its step").wait_for()
        for tab in tabs:
            tab.get_by_text("interrupted").wait_for()
            tab.get_by_role("button", name="Resume").wait_for()
        port = int(url.rpartition(":")[2])
    for tab in tabs:
        tab.get_by_text("No answer from the server").wait_for()
    run.append(Event("step", 31, time.time(), {"loss": 0.4321, "lr": 1e-4}, {"seconds": 1.0}))
    with serving(tmp_path, port):
        for tab in tabs:
            tab.get_by_text("loss 0.4321").wait_for()  # its session outlived the server
            assert tab.locator("#banner").is_hidden()
            assert tab.get_by_role("button", name="Resume").is_enabled()
            assert tab.locator("#as-table td", has_text="0.4321").count() == 1


def test_both_models_are_asked_the_same(opened: Callable[..., Any], heard: list[str], tmp_path: Path) -> None:
    put_done(tmp_path / "runs", "done-0001", "chat", 0.1)
    with serving(tmp_path) as (site, url):
        engine = load_fake(site, "support", "owner/base")
        page = opened(url, site.access.new_link())
        page.goto(f"{url}/ui/chat?run=done-0001")
        page.fill("#text", "<b>where</b> is it")
        page.keyboard.press("Enter")
        page.locator("#send:not([disabled])").wait_for()
        first, second = engine.asks
        assert (first.messages, first.seed, first.temperature) == (second.messages, second.seed, second.temperature)
        assert sorted(page.locator(".side h3 bdi").all_inner_texts()) == ["owner/base", "support"]
        assert page.locator(".side .text").all_inner_texts() == ["<b>where</b> is it"] * 2
        page.fill("#text", "SLOW " + "word " * 400)
        page.keyboard.press("Enter")
        page.locator(".side .text", has_text="SLOW").first.wait_for()
        page.focus("#text")
        page.keyboard.press("Escape")
        page.locator("#send:not([disabled])").wait_for()
        wait_for(lambda: engine.open == 0)
        assert page.locator(".side.failed .count").all_inner_texts() == ["stopped"] * 2
        page.fill("#text", "CRASH here")
        page.keyboard.press("Enter")
        page.get_by_text("The model crashed; it is started again.").first.wait_for()
    assert heard == []


def test_an_embedder_ranks_texts_for_a_query(opened: Callable[..., Any], heard: list[str], tmp_path: Path) -> None:
    put_done(tmp_path / "runs", "done-0001", "chat", 0.1)
    with serving(tmp_path) as (site, url):
        load_fake(site, "vectors")
        page = opened(url, site.access.new_link())
        page.goto(f"{url}/ui/chat?run=done-0001")
        page.fill("#texts", "<b>a very long text that is far from it</b>\n\nab\nabcd")
        page.fill("#text", "ab")
        page.keyboard.press("Enter")
        page.locator(".ranked").wait_for()
        ranked = page.locator(".ranked bdi").all_inner_texts()
        assert ranked == ["ab", "abcd", "<b>a very long text that is far from it</b>"], "as near as their vectors are"
        assert page.locator(".ranked .n").first.inner_text() == "1.000"
        assert "abcd" in page.locator("#heard[aria-live]").inner_text(), "whole answers are said, not tokens"
        assert page.locator("#talk[aria-live]").count() == 0
    assert heard == []


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), slow((1200, "light")), (2560, "light")])
def test_pages_fit_their_window_and_can_be_hit(
    opened: Callable[..., Any], heard: list[str], states: tuple[Any, str], width: int, scheme: str
) -> None:
    site, url = states
    page = opened(url, site.access.new_link(), viewport={"width": width, "height": 800}, color_scheme=scheme)
    paths = ("/ui/", "/ui/runs/failed-0002", "/ui/runs/done-0001/result", "/ui/data?file=rows.jsonl", "/ui/new")
    paths += ("/ui/compare?run=done-0001&run=killed-0003",)
    for path in paths[: 6 if width < 2000 else 2]:
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


COMPARED = "compare?run=done-0001&run=killed-0003"
AXE = """() => axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']})
    .then(result => result.violations.map(
        rule => rule.id + ': ' + rule.nodes.map(node => node.html.slice(0, 140)).join(' | ')))"""


@pytest.mark.parametrize(
    ("scheme", "paths"),
    [
        ("light", ("", "runs/failed-0002", "runs/done-0001/result", "data", "data?file=rows.jsonl", "new", "chat")),
        ("light", (COMPARED, "runs/done-0001")),
        ("dark", ("", COMPARED)),
        slow(("dark", ("runs/failed-0002", "runs/begun-0009"))),
    ],
    ids=["light", "compared", "dark", "dark runs"],
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
