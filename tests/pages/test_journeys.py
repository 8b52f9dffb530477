"""Long journeys in a browser, before a release: `pytest tests/pages/test_journeys.py -m slow`.

Those with a real model need models/SmolLM2-135M-Instruct.gguf, which `make demo` fetches, or TUNESMITH_SMOLLM2_GGUF.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import starlette

import fresh
from pages.sites import AXE, fork_children, run_of, serving
from serve.running import wait_for
from smollm2 import NEEDS_SMOLLM2, SMOLLM2
from tiny_run import chats, model_folder, tiny_recipe, values_of
from tunesmith.runs.folder import Run
from tunesmith.training.progress import Listener
from tunesmith.training.trainer import train
from tunesmith.types import Event

pytestmark = [pytest.mark.pages, pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
LONG_MS = 120_000
BAD = ['{"messages": [{"role": "user", "content": "and then?"}]}\n', '{"broken\n']
PROMPT = "<b>what is tallest</b>"
IS_AT = """words => {
    const at = document.activeElement;
    return [at.id, at.name, at.getAttribute('aria-label'), (at.innerText ?? '').trim()].includes(words);
}"""


def tab_to(page: Any, words: str) -> None:
    """Press Tab until what has the focus is named so, or has these words."""
    for _ in range(300):
        page.keyboard.press("Tab")
        if page.evaluate(IS_AT, words):
            return
    raise AssertionError(f"no key leads to {words!r} on {page.url}")


def press(page: Any, words: str) -> None:
    tab_to(page, words)
    page.keyboard.press("Enter")


def drop(page: Any, file: Path) -> None:
    """From the empty list of runs to rows whose two problems are said by line."""
    choosers: list[Any] = []
    # Before the key, else the browser opens a window of its own; Playwright takes no method of a list.
    page.on("filechooser", lambda chooser: choosers.append(chooser))  # noqa: PLW0108
    page.get_by_text("No runs yet").wait_for()
    page.keyboard.press("g")
    page.keyboard.press("d")
    page.wait_for_url("**/ui/data")
    tab_to(page, "file-to-send")
    page.keyboard.press("Enter")
    page.wait_for_timeout(1000)
    assert len(choosers) == 1
    choosers[0].set_files(file)
    page.get_by_text("refused").first.wait_for()
    places = page.locator(".group a").all_inner_texts()
    assert sorted(places) == ["line 3", "line 6"]
    press(page, "line 6")
    page.locator("#row-6 .problem").wait_for()


def tune(page: Any, model: Path, settings: dict[str, Any]) -> str:
    """From the rows to a run: plan, leave the bad rows out, start. Returns its name."""
    press(page, "Tune a model on it")
    page.wait_for_url("**/ui/new?*")
    tab_to(page, "model")
    page.keyboard.type(str(model))
    page.keyboard.press("Enter")
    press_when_there(page, "Leave such rows out")
    page.get_by_role("button", name="Start").wait_for()
    page.goto(f"{page.url}&{urlencode({f'set.{key}': value for key, value in settings.items()})}")  # as it is typed
    press_when_there(page, "Start")
    page.wait_for_url("**/ui/runs/*")
    return str(page.url.rpartition("/")[2])


def press_when_there(page: Any, words: str) -> None:
    page.get_by_text(words, exact=True).first.wait_for()
    press(page, words)


def chat(page: Any) -> None:
    """From the result to an answer of both models."""
    press_when_there(page, "Chat with both")
    press_when_there(page, "Load it with its base")
    page.locator("#text").wait_for()
    tab_to(page, "text")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Enter")
    page.locator("#send:not([disabled])").wait_for()
    assert page.locator(".ask-bubble").inner_text() == PROMPT
    assert all("tokens" in words for words in page.locator(".side .count").all_inner_texts())


def hand_on(page: Any, name: str) -> None:
    """From the list of runs to a proven export, and to a program that asks."""
    page.locator("#send").focus()  # keys go nowhere while something is typed
    page.keyboard.press("g")
    page.keyboard.press("r")
    page.wait_for_url("**/ui/")
    press(page, name)
    press_when_there(page, "Export, serve")
    page.wait_for_url("**#export")
    press_when_there(page, "Export")
    page.get_by_text("✓ agrees with the tuned model").wait_for()
    press(page, "Keep it loaded")
    page.get_by_text("until you unload it").wait_for()
    press(page, "Make a key")
    page.wait_for_function("() => !document.getElementById('curl').textContent.includes('YOUR-KEY')")
    page.locator("#keys li").wait_for()
    line = page.locator("#curl").inner_text()
    answer = subprocess.run(["sh", "-c", f"{line} -s"], capture_output=True, check=True, timeout=120).stdout
    assert json.loads(answer)["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize("kind", ["tiny", pytest.param("SmolLM2", marks=NEEDS_SMOLLM2)])
def test_from_a_file_to_a_program_by_keys_alone(
    opened: Callable[..., Any], heard: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """J1, and the keyboard's part of J15."""
    settings = {"method.name": "lora", "evaluation.surprising": 0, "evaluation.general": "false"}
    settings |= {"precision": "float32"}  # in bfloat16 the best two words can be as good as each other
    if kind == "tiny":
        fork_children(monkeypatch)
        model, lines = model_folder(tmp_path / "model"), chats(tmp_path / "good.jsonl", 24).read_text().splitlines(True)
        settings |= {"train.epochs": 2, "threads": 1, "evaluation.samples": 0}
    else:
        model, lines = SMOLLM2, (ROOT / "examples/data/chat.jsonl").read_text().splitlines(True)[:120]
        settings |= {"train.max_steps": 12, "evaluation.samples": 3}
    dropped = tmp_path / "dropped.jsonl"
    dropped.write_text("".join([*lines[:2], BAD[0], *lines[2:4], BAD[1], *lines[4:]]))
    folder = tmp_path / "data"
    folder.mkdir()
    with serving(folder) as (site, url):
        page = opened(url, site.access.new_link())
        page.set_default_timeout(LONG_MS)
        drop(page, dropped)
        assert (folder / "dropped.jsonl").read_bytes() == dropped.read_bytes()
        name = tune(page, model, settings)
        page.locator("#curve canvas").wait_for()
        tab_to(page, "Loss over the steps. Arrow keys walk the points, plus and minus zoom, zero shows all.")
        page.keyboard.press("ArrowRight")
        page.get_by_text("step 1 ").wait_for()
        press_when_there(page, "Result")
        page.get_by_text(run_of(site, name).report["headline"][0].split("`")[0]).first.wait_for()
        chat(page)
        names = page.locator(".side h3 bdi").all_inner_texts()
        assert sorted(names) == sorted(card.name for card in site.engine.served)
        assert name in names
        for side, option in ((".side:not(.tuned)", ["--base"]), (".side.tuned", [])):
            words = ["chat", site.root / name, *option, "--once", PROMPT, "--max-tokens", page.input_value("#most")]
            answer = json.loads(fresh.done("-m", "tunesmith", *words, "--offline", "--json"))["answer"]
            assert page.locator(f"{side} .text").inner_text().strip() == answer.strip()
        hand_on(page, name)
    assert heard == []


@NEEDS_SMOLLM2
def test_a_run_that_is_killed_goes_on(opened: Callable[..., Any], heard: list[str], tmp_path: Path) -> None:
    """J5."""
    lines = (ROOT / "examples/data/chat.jsonl").read_text().splitlines(True)[:300]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    settings = {"train.max_steps": 24, "checkpoint.every": 4, "method.name": "lora", "evaluation.general": "false"}
    settings |= {"evaluation.surprising": 0, "evaluation.samples": 0}
    with serving(tmp_path) as (site, url):
        page = opened(url, site.access.new_link())
        page.set_default_timeout(LONG_MS)
        named = {f"set.{key}": value for key, value in settings.items()}
        page.goto(f"{url}/ui/new?{urlencode({'file': 'rows.jsonl', 'model': SMOLLM2, **named})}")
        page.get_by_role("button", name="Start").click()
        page.wait_for_url("**/ui/runs/rows-*")
        name = page.url.rpartition("/")[2]
        wait_for(lambda: steps_of(site, name)[6:] != [], timeout_s=300)
        os.kill(json.loads((site.root / name / "lock.json").read_text())["pid"], signal.SIGKILL)
        killed = time.monotonic()
        page.get_by_text("interrupted").first.wait_for()
        print(f"\n'interrupted' {time.monotonic() - killed:.1f} s after the kill")
        assert time.monotonic() - killed <= 3
        page.get_by_role("button", name="Resume").click()
        wait_for(lambda: steps_of(site, name)[12:] != [], timeout_s=300)
        foretold, seen = site.log(name).series.seconds_left, time.monotonic()
        wait_for(lambda: steps_of(site, name)[23:] != [], timeout_s=300)
        took = time.monotonic() - seen
        print(f"after the resume {foretold:.1f} s of training were foretold, and it took {took:.1f} s")
        page.locator("a", has_text="Result").wait_for()
        assert steps_of(site, name) == list(range(1, 25)), "each step once, none of those that were taken back"
        assert page.locator("#as-table table:not(#held-out) tbody tr").count() == 24
        assert abs(took - foretold) <= 0.15 * took + 1
    assert heard == []


def steps_of(site: Any, name: str) -> list[int]:
    run = site.runs.find(name)
    return [] if run is None else list(site.log(name).series.steps)


TEXTS = """() => [...document.querySelectorAll('#main h1, #main p:not(#curve-said), #main dd, #main td, #main li')]
    .map(part => part.textContent.trim()).join('\\n')"""


def test_a_page_holds_nothing(opened: Callable[..., Any], heard: list[str], tmp_path: Path) -> None:
    """J3: closed, reloaded and opened in a second browser at eight moments, it says the same, and changes nothing."""
    recipe = tiny_recipe(tmp_path, evaluation={"samples": 2, "every": 3, "samples_on_the_way": 1, "surprising": 2})
    alone = train(recipe, root=tmp_path / "alone")
    moments: list[str] = []
    with serving(tmp_path) as (site, url):
        watching = opened(url, site.access.new_link())
        other = opened(url, site.access.new_link())

        def look(moment: str, name: str) -> None:
            moments.append(moment)
            address = f"{url}/ui/runs/{name}"
            again = watching.context.new_page()
            again.goto(address)
            text = again.evaluate(TEXTS)
            again.close()
            if watching.url != address:
                watching.goto(address)
            watching.wait_for_function(f"text => ({TEXTS})() === text", arg=text)  # it asks by itself
            for tab in (watching, other):
                tab.goto(address)
                assert tab.evaluate(TEXTS) == text, moment

        names: list[str] = []

        def on_run(run: Run) -> None:
            names.append(run.path.name)
            look("its folder is there", run.path.name)

        def on_event(event: Event) -> None:
            moment = {("step", 1): "first step", ("step", 5): "a step", ("checkpoint", 4): "checkpoint"}.get(
                (event.kind, event.step), {"plan": "plan", "sample": "answer", "evaluation": "measured"}.get(event.kind)
            )
            if names and moment and moment not in moments:
                look(moment, names[0])

        watched = train(recipe, root=tmp_path / "runs", listener=Listener(on_event=on_event, on_run=on_run))
        look("done", watched.path.name)
    assert len(moments) >= 8, moments
    assert values_of(watched.events()) == values_of(alone.events())
    assert heard == []


def test_ten_tabs_of_a_run_at_work(opened: Callable[..., Any], heard: list[str], tmp_path: Path) -> None:
    """J16: each tab sees each step; none keeps a connection that the others lack."""
    from evaluation.fake_runs import fake_run

    run, _, _ = fake_run(tmp_path / "runs" / "seen-0001", num_steps=30)
    with serving(tmp_path) as (site, url), run.lock():
        first = opened(url, site.access.new_link())
        tabs = [first, *(first.context.new_page() for _ in range(9))]
        for tab in tabs:
            tab.goto(f"{url}/ui/runs/seen-0001")
        run.append(Event("step", 31, time.time(), {"loss": 0.4321, "lr": 1e-4}, {"seconds": 1.0}))
        for tab in tabs:
            tab.get_by_text("loss 0.4321").wait_for(timeout=10_000)
    assert [words for words in heard if not words.startswith("Failed to load resource: net::")] == []


def test_pages_come_with_the_wheel(browser: Any, tmp_path: Path) -> None:
    """J16: in an environment with the dependencies alone, all that a browser asks for is in the wheel."""
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    venv.create(tmp_path / "env")
    [packages] = (tmp_path / "env").glob("lib/python*/site-packages")
    [wheel] = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "dependencies.pth").write_text(f"{Path(starlette.__file__).parents[1]}\n")
    python = tmp_path / "env" / "bin" / "python"
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    where = [str(python), "-c", "import tunesmith; print(tunesmith.__file__)"]
    assert str(packages) in subprocess.run(where, env=environment, capture_output=True, text=True, check=True).stdout
    line = [str(python), "-m", "tunesmith", "ui", "--port", "0", "--json", "--no-browser", "--offline"]
    server = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    asked: dict[str, int] = {}
    try:
        begun = json.loads(server.stdout.readline())
        page = browser.new_page()
        page.on("response", lambda answer: asked.update({answer.url: answer.status}))
        page.goto(begun["link"])
        page.get_by_text("No runs yet").wait_for()
        for path in ("data", "new", "chat", "compare"):
            page.goto(f"{begun['url']}/ui/{path}")
            page.locator("h1").wait_for()
    finally:
        server.terminate()
        server.wait(30)
    assert [url for url, status in asked.items() if status != 200 or not url.startswith(begun["url"])] == []
    assert any(url.endswith("page.js") for url in asked)


PAGES = (
    "", "runs/done-0001", "runs/done-0001/result", "runs/failed-0002", "runs/killed-0003", "runs/new-0004",
    "runs/log-0006", "runs/recipe-0005", "runs/begun-0009", "runs/gone-0010", "data", "data?file=rows.jsonl", "new",
    "new?file=rows.jsonl&model=none", "chat", "chat?run=done-0001", "compare?run=done-0001&run=killed-0003", "nothing",
)  # fmt: skip


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault_on_any_page(
    opened: Callable[..., Any], states: tuple[Any, str], scheme: str, width: int
) -> None:
    """J15."""
    library = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    script = (Path(library.__file__).parent / "axe.min.js").read_text("utf-8")
    site, url = states
    how = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}, "bypass_csp": True}
    page = opened(url, site.access.new_link(), **how)
    for path in PAGES:
        page.goto(f"{url}/ui/{path}")
        page.wait_for_function("() => !document.querySelector('.waiting')")
        page.evaluate(script)
        assert page.evaluate(AXE) == [], path
