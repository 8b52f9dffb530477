"""Pages show what commands print, text of data is text, and a damaged folder hides nothing else."""

from __future__ import annotations

import errno
import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from starlette.testclient import TestClient

import fresh
from evaluation.fake_runs import HOSTILE, fake_run
from pages.sites import (
    NAMES,
    ODD,
    OWN,
    Elements,
    answered,
    assert_no_foreign_element,
    entered,
    fork_children,
    plan_values,
    put_states,
    run_of,
    site_in,
)
from tiny_run import chats, model_folder
from tunesmith.evaluation.series import RunSeries
from tunesmith.pages import pictures
from tunesmith.pages.live import FollowedLog
from tunesmith.pages.markup import environment
from tunesmith.pages.site import Site
from tunesmith.phrases import visible
from tunesmith.serve.commands import Reply
from tunesmith.summaries import checks, words
from tunesmith.summaries.live import curve_values
from tunesmith.summaries.runs import facts, phase, time_left
from tunesmith.types import Event

RUN_PAGES = [f"/ui/runs/{name}{part}" for name in NAMES for part in ("", "/result")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    put_states(folder / "runs")
    (folder / f"{HOSTILE[4].replace('/', '')}.jsonl").write_text("{}\n")
    return site_in(folder)


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        fork_children(patch)
        yield entered(site)
    site.commands.close()


# trap: S12
@pytest.mark.parametrize("path", ["/ui/", "/ui/runs/begun-0009", "/ui/data", "/ui/new", "/ui/chat", *RUN_PAGES])
def test_texts_of_data_are_text(client: TestClient, path: str) -> None:
    assert_no_foreign_element(answered(client, path), path)


def test_a_template_that_does_not_escape_is_noticed(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(environment().filters, "prose", Markup)
    environment().cache.clear()
    with pytest.raises(AssertionError):
        assert_no_foreign_element(client.get("/ui/runs/failed-0002").text, "/ui/runs/failed-0002")
    environment().cache.clear()


def test_hostile_texts_are_there_as_they_are(client: TestClient) -> None:
    page = Elements(answered(client, "/ui/runs/failed-0002")).text
    assert visible(HOSTILE[0] + HOSTILE[4]).replace("`", "") in page
    assert HOSTILE[3] in Elements(answered(client, "/ui/runs/done-0001/result")).text
    assert HOSTILE[0] in Elements(client.get("/ui/").text).text


def test_the_list_has_every_run_and_says_what_cannot_be_read(client: TestClient) -> None:
    page = Elements(client.get("/ui/").text).text
    for name in NAMES:
        assert name in page
    values = client.get("/v1/runs").json()
    states = {row["name"]: row["state"] for row in values["runs"]}
    assert states == {
        "done-0001": "done", "failed-0002": "failed", "killed-0003": "interrupted", "new-0004": "new",
        "recipe-0005": "unreadable", "log-0006": "unreadable", "lacking-0007": "unreadable", "made-0008": "unreadable",
        ODD: "new",
    }  # fmt: skip
    assert "log-0006/events.jsonl:2" in next(row["problem"] for row in values["runs"] if row["name"] == "log-0006")
    assert [(row["name"], row["state"]) for row in values["working"]] == [("begun-0009", "not started")]


def test_a_row_of_the_list_is_what_the_command_prints(site: Site, client: TestClient) -> None:
    lines = fresh.done("-m", "tunesmith", "runs", "--runs", site.root, "--json")
    printed = {row["name"]: row for row in json.loads(lines)}
    shown = {row["name"]: row for row in client.get("/v1/runs").json()["runs"]}
    for name in ("done-0001", "failed-0002", "killed-0003", "new-0004"):
        assert shown[name] == printed[name]
    assert printed["lacking-0007"]["problem"] == (
        f"{site.root}/lacking-0007: something in it is not as a run writes it (KeyError: 'lr')."
    ), "one damaged run hides no other"
    page = client.get("/ui/").text
    row = printed["killed-0003"]
    assert f"{words.loss(row['before'])} → {words.loss(row['after'])}" in page
    assert words.headline_metric(row["measures"]["before"], row["measures"]["after"]) in page


def test_the_curve_and_its_table_are_the_numbers_of_the_log(site: Site, client: TestClient) -> None:
    series = RunSeries.of(run_of(site, "killed-0003").events())
    page = client.get("/ui/runs/killed-0003").text
    for step in (1, max(series.steps)):
        assert f'<td class="n">{step}</td><td class="n">{words.loss(series.steps[step].loss)}</td>' in page
    for step, values in series.course():
        assert f'<td class="n">{step}</td><td class="n">{words.loss(values["loss"])}</td>' in page
    assert html.escape(words.step_line(series, is_at_work=False)) in page
    curve = client.get("/v1/runs/killed-0003/series?points=30").json()
    assert curve["width"] == 4
    first = [series.steps[step].loss for step in range(1, 5)]
    training = curve["training"]
    assert (training["low"][0], training["high"][0]) == (min(first), max(first))
    assert training["mean"][0] == pytest.approx(sum(first) / 4, abs=1e-15)  # one more sum
    part = client.get("/v1/runs/killed-0003/series?points=30&from=10&to=19").json()
    assert part["training"]["step"] == list(range(10, 20))


def test_a_damaged_log_shows_what_was_logged_before(client: TestClient) -> None:
    page = Elements(client.get("/ui/runs/log-0006").text).text
    assert "events.jsonl:2" in page
    assert "What is shown was logged before." in page
    assert "lacks something" in Elements(client.get("/ui/runs/lacking-0007").text).text


def test_a_run_that_did_not_start_says_why_and_can_be_taken_off(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".rows-0001.output").write_text('{"kind": "error", "message": "rows.jsonl: no such file"}\n')
    client = entered(site_in(tmp_path))
    assert "rows.jsonl: no such file" in client.get("/ui/runs/rows-0001").text
    assert client.post("/v1/runs/rows-0001/forget", json={}, headers=OWN).status_code == 200
    assert client.get("/ui/runs/rows-0001").status_code == 404


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    client = entered(site_in(tmp_path))
    assert "tunesmith train MODEL DATA" in client.get("/ui/").text
    assert "No rows here yet" in client.get("/ui/data").text
    assert "Nothing to chat with yet" in client.get("/ui/chat").text


def test_a_log_is_read_on_where_it_grows_and_taken_back_by_a_resume(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "a-1", num_steps=10)
    log = FollowedLog(run).read()
    assert len(log.series.steps) == 10
    run.append(Event("resume", 4, 0.0, {"from_step": 4}))
    run.append(Event("step", 5, 0.0, {"loss": 0.5, "lr": 1e-4}, {"seconds": 1.0}))
    curve = curve_values(log.read().series)
    assert curve["training"]["step"] == [1, 2, 3, 4, 5]
    assert curve["training"]["mean"][-1] == 0.5


def test_ten_thousand_runs_are_listed_by_pages(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for number in range(200):
        folder = root / f"run-{number:04}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(f'{{"format": 1, "created": {number}}}')
        (folder / "recipe.yaml").write_text("model: m\n")
    site = site_in(tmp_path)
    first = site.run_list.page()
    assert [row["name"] for row in first["runs"][:2]] == ["run-0199", "run-0198"]
    assert (first["total"], first["next"], len(first["runs"])) == (200, 50, 50)
    assert len(site.run_list._facts) == 50, "the others were not read"
    assert site.run_list.page("run-00", after=50)["matching"] == 100
    page = entered(site).get("/ui/?find=run-00").text
    assert "100 of 200 runs" in page
    assert "older →" in page


def test_the_phase_and_the_time_left_are_what_the_run_says(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "a-1", num_steps=10)
    assert phase(run, 0.0) == ""
    run.note_progress("evaluate", 42, 100)
    assert phase(run, 1.0) == "measuring held-out rows: 42 %"
    assert phase(run, 1e12) == "", "an event came since"
    (run.path / "progress.json").write_text('{"what": 1}')
    assert phase(run, 0.0) == ""
    series = RunSeries.of(run.events())
    work = {"measuring": {"seconds": 60.0}, "answering": {"seconds": 20.0}, "finishing": {"seconds": 5.0}}
    series.plan = {"steps": 20, "forecast": {"seconds": {"work": work}}}
    assert time_left(series) == "about 20 s of training, then about 45 s of measuring"
    assert facts(run, series)["steps"] == 20


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    model_folder(folder / "model")
    file = chats(folder / "chats.jsonl", 30)
    text = json.dumps({"messages": [{"role": "user", "content": HOSTILE[0]}, {"role": "assistant", "content": "ok"}]})
    file.write_text(file.read_text() + text + "\n" + '{"messages": [{"role": "user", "content": "x"}]}\n{"broken\n')
    return folder


def test_data_says_what_check_says_and_shows_rows_as_the_model_reads_them(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_children(monkeypatch)
    site = site_in(rows)
    client, model = entered(site), str(rows / "model")
    page = answered(client, f"/ui/data?file=chats.jsonl&model={model}&from=20")
    process = fresh.Process("-m", "tunesmith", "check", rows / "chats.jsonl", "--model", model, "--json", cwd=rows)
    printed = json.loads(process.communicate()[0])
    shown = client.get(f"/v1/checks?file=chats.jsonl&model={model}").json()["values"]
    assert shown == printed
    text = Elements(page).text
    for line in (*checks.file_lines(printed), *checks.token_lines(printed), *checks.problem_counts(printed)):
        assert line in text
    told = fresh.done("-m", "tunesmith", "check", rows / "chats.jsonl", "--model", model, "--rows", "20-39", "--json")
    read = json.loads(told)["rows"]
    assert [row["line"] for row in read] == list(range(20, 34))
    marked = re.findall(r"<mark><bdi>(.*?)</bdi></mark>", page, re.DOTALL)
    assert [html.unescape(piece) for piece in marked] == [
        visible(piece) for row in read for piece, learnt in row["spans"] if learnt
    ]
    assert f"{read[0]['tokens']} tokens, {read[0]['trained']} learnt" in text
    assert HOSTILE[0] in text
    assert "<script>alert" not in page
    site.commands.close()


def test_a_plan_on_the_page_is_that_of_the_command_and_its_errors_too(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_children(monkeypatch)
    site = site_in(rows)
    client, model = entered(site), str(rows / "model")
    chats(rows / "good.jsonl", 30)
    page = answered(client, f"/ui/new?file=good.jsonl&model={model}&set.train.epochs=2")
    words_given = ["plan", model, rows / "good.jsonl", "--no-probe", "--set", "train.epochs=2", "--runs", site.root]
    printed = json.loads(fresh.done("-m", "tunesmith", *words_given, "--offline", "--json"))
    text = Elements(page).text
    shown = client.get(f"/v1/plans?file=good.jsonl&model={model}&set.train.epochs=2").json()["values"]
    decided = [[(choice["key"], choice["value"]) for choice in values["choices"]] for values in (shown, printed)]
    assert decided[0] == decided[1], "reasons name the memory of the moment"
    by_name = dict(words.plan_facts(printed))
    for name in ("model", "task", "rows", "work", "given"):
        assert by_name[name] in text
    for choice in shown["choices"]:
        assert choice["reason"].replace("`", "") in text
    assert "--set train.epochs=2" in text
    assert ">Start</button>" in page
    wrong = answered(client, "/ui/new?file=good.jsonl&model=no/such/folder/")
    assert "no/such/folder" in Elements(wrong).text
    assert ">Start</button>" not in wrong
    refused = answered(client, f"/ui/new?file=good.jsonl&model={model}&set.optim.lr=fast")
    assert "optim.lr" in Elements(refused).text
    site.commands.close()


def test_a_plan_that_does_not_fit_cannot_be_started_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    warnings = ["it needs 3.0 GiB, and 1.0 GiB is free. qlora needs 0.9 GiB."]
    values = plan_values(needed=3 * 2**30, room=2**30, model=HOSTILE[0], warnings=warnings)
    site = site_in(tmp_path)
    monkeypatch.setattr(site, "plan", lambda wanted, measured: Reply([], values=values))
    page = entered(site).get("/ui/new?file=rows.jsonl&model=m").text
    text = Elements(page).text
    assert "It needs 3.0 GiB, and 1.0 GiB can be used." in text
    assert "qlora needs 0.9 GiB" in text
    assert "data-post" not in page
    assert '<button type="button" class="button" disabled>Start</button>' in page
    assert HOSTILE[0] in text


def test_what_no_address_can_name_hides_nothing_else(tmp_path: Path) -> None:
    fake_run(tmp_path / "runs" / "a-1")
    (tmp_path / "rows.jsonl").write_text("{}")
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text("{}")
        (tmp_path / "runs" / os.fsdecode(b"caf\xe9-1")).mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    (tmp_path / "runs" / os.fsdecode(b"caf\xe9-1") / "run.json").write_text('{"format": 1, "created": 1.0}')
    client = entered(site_in(tmp_path))
    assert "a-1" in client.get("/ui/").text
    assert "rows.jsonl" in client.get("/ui/data").text
    assert [file["name"] for file in client.get("/v1/local_files").json()["files"]] == ["rows.jsonl"]
    assert client.get(f"/v1/runs/{'a' * 300}").status_code == 404


def test_a_folder_that_may_not_be_looked_into_hides_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_run(tmp_path / "runs" / "a-1")
    (tmp_path / "runs" / "theirs").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    stat = os.stat

    def refusing(path: Any, *words: Any, **how: Any) -> os.stat_result:
        if "theirs/" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *words, **how)

    client = entered(site_in(tmp_path))
    monkeypatch.setattr(os, "stat", refusing)
    assert [row["name"] for row in client.get("/v1/runs").json()["runs"]] == ["a-1"]
    assert [file["name"] for file in client.get("/v1/local_files").json()["files"]] == ["rows.jsonl"]


def test_whoever_draws_a_curve_keeps_its_steps_while_the_log_is_read_on(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "a-1", num_steps=10)
    log = FollowedLog(run).read()
    drawn = iter(log.series.steps.items())
    run.append(Event("step", 11, 0.0, {"loss": 0.5, "lr": 1e-4}, {"seconds": 1.0}))
    log.read()
    assert len(list(drawn)) == 10
    assert len(log.series.steps) == 11


def test_a_removed_run_is_not_listed_as_one_that_did_not_start(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "runs" / "a-1")
    for what in ("output", "lock"):
        run.path.with_name(f".a-1.{what}").write_text("")
    fresh.done("-m", "tunesmith", "runs", "rm", "a-1", "--runs", run.path.parent, "--yes")
    assert site_in(tmp_path).run_list.page()["working"] == []


def test_marks_of_steps_are_whole() -> None:
    columns = {"step": [1, 2, 3], "mean": [3.0, 2.0, 1.0], "low": [3.0, 2.0, 1.0], "high": [3.0, 2.0, 1.0]}
    drawn = pictures.curve({"training": columns, "held_out": [], "steps": 3, "width": 1, "aim": "loss"})
    assert re.findall(r'text-anchor="middle">([^<]+)<', drawn) == ["0", "1", "2", "3"]


def test_every_held_out_loss_is_in_the_picture() -> None:
    steps = list(range(1, 401))
    losses = [1 + 1 / step for step in steps]
    columns = {"step": steps, "mean": losses, "low": losses, "high": losses}
    values = {
        "training": columns,
        "held_out": [[0, 9.0], [200, 1.5], [400, 1.2]],
        "steps": 400,
        "width": 1,
        "aim": "loss",
    }
    heights = [float(height) for height in re.findall(r'cy="([^"]+)"', pictures.curve(values))]
    assert len(heights) == 3
    assert all(0 < height < pictures.HEIGHT for height in heights)
