"""Reports opened in a real browser: nothing is asked of the network, plots are there, hostile text is only text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.fake_runs import CHAPTERS, HOSTILE, fake_run
from often import often
from tunesmith.evaluation.report import write_report
from tunesmith.phrases import visible

pytestmark = pytest.mark.pages

MEASURE_PLOTS = """() => [...document.querySelectorAll('.plot svg')].map(svg => {
    const box = svg.getBoundingClientRect(), marks = [...svg.querySelectorAll('path, use, text')];
    return {width: box.width, height: box.height, marks: marks.length,
            colours: [...new Set(marks.map(mark => getComputedStyle(mark).stroke + getComputedStyle(mark).fill))]}
})"""
PAPER = "() => getComputedStyle(document.documentElement).backgroundColor"
CUT_OFF = """() => [...document.querySelectorAll('section, table, figure, article, pre, .card, h1, p')]
    .filter(box => !box.closest('.scroll, .plot') && box.getBoundingClientRect().right > innerWidth + 1)
    .map(box => box.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of classes with hostile names, and of chats about hostile texts."""
    root = tmp_path_factory.mktemp("runs")
    for kind in ("classes", "chat"):
        labels = [*HOSTILE, *CHAPTERS[:3]]
        run, facts, progress = fake_run(root / kind, kind, labels=labels, texts=HOSTILE, name=HOSTILE[0] + HOSTILE[1])
        write_report(run, facts | {"notes": list(HOSTILE)}, progress)
    return root


@pytest.fixture
def heard() -> list[str]:
    """What a page said, asked for or popped up: nothing, in the end."""
    return []


@pytest.fixture
def opened(browser, folder, heard) -> Iterator[Any]:
    """Opens a page of a width, by day or night."""
    contexts = []

    def open_page(kind: str, *, width: int = 1200, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        url = (folder / kind / "report.html").as_uri()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url != url and heard.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("kind", ["classes", "chat"])
def test_plots_are_drawn_by_day_and_by_night_without_asking_the_network(opened, heard, kind):
    seen = {scheme: opened(kind, scheme=scheme) for scheme in ("light", "dark")}
    plots = {scheme: page.evaluate(MEASURE_PLOTS) for scheme, page in seen.items()}
    assert len(plots["light"]) == len(plots["dark"]) >= 2
    for plot in (*plots["light"], *plots["dark"]):
        assert plot["width"] > 300
        assert plot["height"] > 80
        assert plot["marks"] > 20
    assert all(a["colours"] != b["colours"] for a, b in zip(plots["light"], plots["dark"], strict=True))
    assert seen["light"].evaluate(PAPER) != seen["dark"].evaluate(PAPER)
    assert heard == []


@pytest.mark.parametrize("width", often([400, 1200], 400))
@pytest.mark.parametrize("kind", ["classes", "chat"])
def test_no_text_is_wider_than_the_page(opened, kind, width):
    page = opened(kind, width=width)
    for fold in page.query_selector_all("details"):
        fold.evaluate("fold => { fold.open = true }")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == []


@pytest.mark.parametrize("width", often([390, 1200], 390))
def test_the_line_of_a_row_is_in_one_piece(browser, tmp_path, width):
    """Of a long path the folder may wrap; "473" with its last digit below is another line."""
    run, facts, progress = fake_run(tmp_path / "run", "classes")
    for name in ("after.jsonl", "surprising.json"):
        file = run.path / "evaluation" / name
        file.write_text(file.read_text().replace("held.jsonl:", "examples/data/comments.csv:40"))
    write_report(run, facts, progress)
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((run.path / "report.html").as_uri())
    lines = """() => [...document.querySelectorAll('td.source')].map(cell => {
        const text = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), range = document.createRange();
        let last = text.nextNode();
        for (let next = last; next; next = text.nextNode()) last = next;
        range.selectNodeContents(last);
        return [last.textContent, range.getClientRects().length];
    })"""
    places = page.evaluate(lines)
    page.close()
    assert len(places) > 4
    assert [place for place in places if place[1] != 1] == []


def test_hostile_rows_are_shown_as_the_text_they_are(opened, heard):
    page = opened("chat")
    shown = page.evaluate("() => [...document.querySelectorAll('bdi')].map(box => box.textContent)")
    for text in HOSTILE:
        assert visible(text) in shown
    assert page.evaluate("() => document.querySelectorAll('script, img, iframe').length") == 0
    assert page.title().startswith("<script>alert(1)</script>")
    assert heard == []


def test_a_long_text_is_folded_and_opens_without_a_script(opened):
    page = opened("chat")
    fold = page.locator("details", has_text="10,000 characters").first
    whole = fold.locator("> bdi")
    assert not whole.is_visible()
    fold.locator("summary").click()
    assert whole.is_visible()
    assert whole.inner_text() == "x" * 10_000


@pytest.mark.slow
def test_it_prints(opened):
    page = opened("chat")
    assert page.pdf(format="A4")[:5] == b"%PDF-"
    page.set_viewport_size({"width": 680, "height": 900})  # A4 between its margins
    page.emulate_media(media="print")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 680
    assert page.locator("nav").is_hidden()
