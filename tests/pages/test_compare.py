"""The page of a comparison shows what `tunesmith compare --json` prints, and leads to each row in Data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from starlette.testclient import TestClient

import fresh
from evaluation.fake_runs import HOSTILE
from pages.sites import OWN, Elements, answered, assert_no_foreign_element, entered, fork_children, put_done, site_in
from tunesmith.evaluation.metrics import info_of
from tunesmith.phrases import visible

THIRD = "<i>third-0003"
ODD_LABELS = ("<b>up</b>", "down & out", "</td>", "side")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    put_done(folder / "runs", "first-0001", "classes", 0.001, labels=ODD_LABELS, texts=HOSTILE)
    put_done(folder / "runs", "second-0002", "classes", 0.0005, range(40), labels=ODD_LABELS, texts=HOSTILE)
    put_done(folder / "runs", THIRD, "classes", 0.0001, range(10), labels=ODD_LABELS, texts=HOSTILE)
    put_done(folder / "runs", "chat-0004", "chat", 0.1)
    put_done(folder / "runs", "chat-0005", "chat", 0.2, range(5))
    (folder / "held.jsonl").write_text("{}\n")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    site = site_in(folder)
    with pytest.MonkeyPatch.context() as patch:
        fork_children(patch)
        yield entered(site)
    site.commands.close()


def printed(folder: Path, *names: str) -> Any:
    """What the command prints of these runs."""
    return json.loads(fresh.done("-m", "tunesmith", "compare", *(folder / "runs" / name for name in names), "--json"))


def assert_measures(text: str, measures: dict[str, Any]) -> None:
    """Each measure, its difference and its verdict are on the page, in the words of the terminal."""
    for key, measure in measures.items():
        info, change = info_of(key), {**measure["b_minus_a"], "is_clear": measure["is_clear"]}
        assert info.label in text
        for words in (info.text(measure["a"]), info.text(measure["b"]), info.worth(change)):
            assert words in text, key


def test_two_runs_differ_as_the_command_says(client: TestClient, folder: Path) -> None:
    page = answered(client, "/ui/compare?run=first-0001&run=second-0002")
    values = printed(folder, "first-0001", "second-0002")
    shown = client.get("/v1/comparisons?run=first-0001&run=second-0002").json()["values"]
    assert shown == values
    assert values["settings"] == {"optim.lr": [0.001, 0.0005]}, "only what differs"
    text = Elements(page).text
    assert_measures(text, values["measures"])
    assert any(measure["is_clear"] for measure in values["measures"].values())
    assert "▲" in text
    assert "better" in text
    assert (
        f"B is better on {len(values['won'])}, worse on {len(values['lost'])}, and as good on {values['ties']}" in text
    )
    for row in values["won"]:
        assert visible(row["words"]) in text
    for words in ("optim.lr", "0.001", "0.0005", *values["notes"]):
        assert words.replace("`", "") in text
    assert page.count('<polyline class="c c') == 2
    line = values["won"][0]["b"]["source"].rpartition(":")[2]
    assert f'href="/ui/data?file=held.jsonl&amp;from={max(1, int(line) - 2)}#row-{line}"' in page
    assert_no_foreign_element(page, "/ui/compare")


def test_the_terminal_names_the_options_that_differ(folder: Path) -> None:
    names = [folder / "runs" / name for name in ("first-0001", "second-0002", THIRD)]
    for chosen, line in ((names[:2], "optim.lr\t0.001\t0.0005"), (names, "optim.lr\t0.001\t0.0005\t0.0001")):
        lines = fresh.done("-m", "tunesmith", "compare", *chosen).splitlines()
        assert lines[-3:][0] == "options that differ"
        assert lines[-1] == line


def test_more_runs_are_each_compared_with_the_first(client: TestClient, folder: Path) -> None:
    names = ("first-0001", "second-0002", THIRD)
    page, values = answered(client, f"/ui/compare?{urlencode({'run': names}, doseq=True)}"), printed(folder, *names)
    text = Elements(page).text
    for run in values["runs"]:
        assert_measures(text, run["measures"])
    assert values["settings"] == {"optim.lr": [0.001, 0.0005, 0.0001]}
    assert page.count('<polyline class="c c') == 3
    assert THIRD in text
    assert_no_foreign_element(page, "/ui/compare")


def test_answers_of_both_are_side_by_side(client: TestClient, folder: Path) -> None:
    page, values = (
        answered(client, "/ui/compare?run=chat-0004&run=chat-0005"),
        printed(folder, "chat-0004", "chat-0005"),
    )
    text = Elements(page).text
    [both] = values["answers"]["texts"]
    assert (both["a"], both["b"]) == (f"{HOSTILE[3]} 0.1", f"{HOSTILE[3]} 0.2")
    for words in (both["a"], both["b"], both["prompt"]):
        assert words in text
    assert_measures(text, values["answers"]["measures"])
    assert_no_foreign_element(page, "/ui/compare")


def test_what_cannot_be_compared_is_refused_in_the_words_of_the_command(client: TestClient) -> None:
    text = Elements(answered(client, "/ui/compare?run=first-0001&run=chat-0004")).text
    assert "only one task can be compared" in text
    assert client.get("/ui/compare?run=first-0001&run=gone-0009").status_code == 404
    assert client.get("/v1/comparisons?run=first-0001").status_code == 400
    nine = "&".join(f"run=a-{number}" for number in range(9))
    assert client.get(f"/v1/comparisons?{nine}", headers=OWN).status_code == 400


def test_runs_are_chosen_from_the_list(client: TestClient) -> None:
    assert 'name="run" value="first-0001" form="compare"' in client.get("/ui/").text
    page = client.get("/ui/compare?run=first-0001").text
    assert "Which setting did it?" in page
    assert '<option value="second-0002">' in page
    assert '<option value="first-0001">' not in page


def test_a_run_that_is_left_out_leaves_all_others(client: TestClient) -> None:
    names = ["first-0001", "second-0002", THIRD]
    page = unescape(client.get(f"/ui/compare?{urlencode({'run': names}, doseq=True)}").text)
    for name in names:
        rest = [("run", other) for other in names if other != name]
        assert f'href="/ui/compare?{urlencode(rest, quote_via=quote)}" aria-label="Leave {name} out"' in page
