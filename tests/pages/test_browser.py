"""Pages in a real browser: from a file to a chat with what was made of it, and nothing said that should not be."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.fake_runs import fake_run
from often import slow
from pages.sites import AXE, load_fake, put_done, serving
from serve.running import wait_for
from tunesmith.pages import markup, run_list
from tunesmith.types import Event

pytestmark = pytest.mark.pages
WIDE = """() => [...document.querySelectorAll('main *, header *, footer *')]
    .filter(box => !box.closest('.scroll, .plot, pre, .text, svg, .skip') && box.getBoundingClientRect().width > 0
        && box.getBoundingClientRect().right > innerWidth + 1)
    .map(box => box.outerHTML.slice(0, 160))"""
SMALL = """() => [...document.querySelectorAll('button, input, select, summary, nav a, .button')]
    .map(box => [box.outerHTML.slice(0, 120), box.getBoundingClientRect()])
    .filter(([, box]) => box.width > 0 && (box.height < 23.5 || box.width < 20)).map(([words]) => words)"""


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
            page.wait_for_timeout(800)  # the curve is loaded again with the page, several times here
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


def test_a_line_is_gone_to_without_loading_the_page(
    opened: Callable[..., Any], heard: list[str], tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": f"question {number}", "completion": "answer"}) for number in range(60)]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows) + "\n")
    with serving(tmp_path) as (site, url):
        page = opened(url, site.access.new_link())
        page.goto(f"{url}/ui/data?file=chats.jsonl")
        page.locator("#row-1").wait_for()
        page.evaluate("window.isSame = true")
        page.fill("#from", "41")
        page.press("#from", "Enter")
        page.locator("#row-60").wait_for()
        assert page.evaluate("[window.isSame, document.activeElement.id]") == [True, "rows"], "keys walk on from there"
        assert page.url.endswith("from=41#rows")
        page.go_back()
        page.locator("#row-1").wait_for()
        assert page.locator("#row-41").count() == 0
    assert heard == []


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


@pytest.mark.parametrize(
    ("width", "scheme"), [(320, "dark"), slow((360, "dark")), slow((1200, "light")), (2560, "light")]
)
def test_pages_fit_their_window_and_can_be_hit(
    opened: Callable[..., Any], heard: list[str], states: tuple[Any, str], width: int, scheme: str
) -> None:
    site, url = states
    height = 256 if width == 320 else 800  # a window of 1,280 × 1,024 at 400 %
    page = opened(url, site.access.new_link(), viewport={"width": width, "height": height}, color_scheme=scheme)
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
    for path, shown in READ:
        page.goto(f"{url}/ui/{path}")
        page.locator(shown).first.wait_for()  # by the page's own refresh, where it waits for something
        does_nothing = page.locator("button:visible:not([form] *, form *):not([form]):not([disabled])")
        assert does_nothing.all_inner_texts() == [], path
    assert heard == []


def test_colours_of_the_system_less_motion_and_paper(opened: Callable[..., Any], states: tuple[Any, str]) -> None:
    site, url = states
    page = opened(url, site.access.new_link(), color_scheme="dark", reduced_motion="reduce")
    page.goto(f"{url}/ui/runs/killed-0003")
    page.locator("#curve canvas").wait_for()
    assert page.evaluate(SPINNING) == "none"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(SPINNING) == "turn"
    page.emulate_media(forced_colors="active")
    colours = {name: page.evaluate(COLOUR, name) for name in ("--ink", "--paper", "--accent", "--band")}
    assert colours == {"--ink": "CanvasText", "--paper": "Canvas", "--accent": "LinkText", "--band": "transparent"}
    page.emulate_media(forced_colors="none", media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)", "also of a page that is dark"
    assert page.locator("nav:visible, button:visible, .foot:visible").count() == 0


READ = (
    ("", "td.main"), ("runs/killed-0003", "svg.curve polyline"), ("runs/failed-0002", ".problem"),
    ("runs/done-0001", "#export .card"), ("runs/done-0001/result", ".report h2"), ("runs/begun-0009", ".problem"),
    ("compare?run=done-0001&run=killed-0003", "h1"), ("data", ".files li"), ("data?file=rows.jsonl", "#row-1"),
    ("new", "#plan"), ("chat?run=done-0001", "noscript, .note"),
)  # fmt: skip
"""Pages, and what is on each that somebody came for."""
SPINNING = """() => {
    const title = document.querySelector("h1"); // what is refreshed in between loses the class
    title.className = "spin";
    return getComputedStyle(title).animationName;
}"""
COLOUR = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
COMPARED = "compare?run=done-0001&run=killed-0003"


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
