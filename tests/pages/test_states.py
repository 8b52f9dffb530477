"""The states that a page can be in: each says what is the matter and what to do.

Those without a test here have theirs elsewhere in this folder: empty, unreadable, failed, interrupted, a damaged log
and nothing fits in test_pages.py; 401, 403 and 429 in test_access.py; no answer, a newer build, an ended session, two
people and a killed run in test_browser.py; an engine that starts or ended in test_handed_on.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import fresh
from evaluation.fake_runs import as_graded, fake_run
from pages.sites import (
    HTML,
    KEY,
    OWN,
    Elements,
    answered,
    entered,
    fork_children,
    plan_values,
    run_of,
    site_in,
    stranger,
)
from serve.running import wait_for
from tunesmith.cli.ui import door_to
from tunesmith.jobs.launcher import ChildProcess, start_child
from tunesmith.pages import launches, local_files, run_list
from tunesmith.pages.live import LiveRuns
from tunesmith.pages.local_files import LocalFiles, row_address
from tunesmith.pages.run_list import RunList
from tunesmith.pages.site import Site
from tunesmith.runs.atomic import to_json, write_atomic
from tunesmith.runs.folder import Run
from tunesmith.serve import commands
from tunesmith.serve.commands import CommandRunner, Reply
from tunesmith.serve.middleware import ApiKeys
from tunesmith.types import Event


def test_a_run_without_held_out_rows_or_answers_has_a_page(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "runs" / "bare-0001", "classes")
    kept = [line for line in run.events_path.read_text().splitlines() if '"kind":"evaluation"' not in line]
    run.events_path.write_text("".join(f"{line}\n" for line in kept))
    run.append(Event("end", 120, 0.0, {"report": {}}))
    text = Elements(entered(site_in(tmp_path)).get("/ui/runs/bare-0001").text).text
    assert "Held-out loss" not in text
    assert "Answers" not in text
    assert "Loss" in text


def test_a_run_of_rewards_shows_rewards_and_no_loss(tmp_path: Path) -> None:
    """Its loss says nothing, and its held-out "loss" is minus the reward."""
    run = as_graded(fake_run(tmp_path / "runs" / "graded-0001", num_steps=4)[0])
    client = entered(site_in(tmp_path))
    page = client.get("/ui/runs/graded-0001").text
    text = " ".join(Elements(page).text.split())
    assert "<dt>Measure</dt><dd>reward 0.1250 → 0.7500</dd>" in page
    assert "reward 0.1250 → 0.7500" in " ".join(Elements(client.get("/ui/").text).text.split())
    assert '<td class="n">4</td><td class="n">1.0000</td>' in page, "the curve is of rewards"
    assert not re.search(r"[-−]0\.\d", text), "no reward turned round"
    curve = client.get("/v1/runs/graded-0001/series").json()
    assert (curve["aim"], curve["training"]["mean"]) == ("reward", [0.25, 0.5, 0.75, 1.0])
    assert curve["held_out"][0] == [0, 0.125]
    [row] = json.loads(fresh.done("-m", "tunesmith", "runs", "--runs", run.path.parent, "--json"))
    assert (row["before"], row["after"]) == (None, None)


def test_a_stopped_run_says_so_and_can_go_on(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "runs" / "held-0001")
    run.append(Event("stopped", 120, 0.0, {"message": "stopped after step 120"}))
    page = entered(site_in(tmp_path)).get("/ui/runs/held-0001").text
    assert "stopped after step 120" in page
    assert ">Resume</button>" in page


def test_answers_before_and_now_are_shown_while_a_run_is_at_work(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "runs" / "asked-0001", num_steps=4)
    lines = [line for line in run.events_path.read_text().splitlines() if '"name":"after"' not in line]
    run.events_path.write_text("".join(f"{line}\n" for line in lines))
    for step, answer in ((2, "an early one"), (4, "a later <b>one</b>")):
        values = {"name": "step", "index": 0, "source": "held.jsonl:1", "prompt": "p", "reference": "r"}
        run.append(Event("sample", step, 0.0, {**values, "answer": answer, "stopped": True}))
    text = Elements(entered(site_in(tmp_path)).get("/ui/runs/asked-0001").text).text
    assert "Now, after step 4" in text
    assert "a later <b>one</b>" in text
    assert "an early one" not in text


def test_words_of_an_error_make_no_button(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "runs" / "words-0001")
    message = "a row says: Resume with --set memory=warn"
    run.append(Event("failed", 120, 0.0, {"code": "DataError", "message": message}))
    page = entered(site_in(tmp_path)).get("/ui/runs/words-0001").text
    assert message in page
    assert "Resume with memory" not in page


def test_a_run_without_memory_goes_on_by_a_button(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, _ = fake_run(tmp_path / "runs" / "full-0001")
    settings = {"train.tokens_per_pass": 1, "train.checkpointed_layers": 30}
    values = {"code": "OutOfMemoryError", "message": "step 7: out of memory.", "ways": [{"settings": settings}]}
    run.append(Event("failed", 120, 0.0, values))
    client, begun = entered(site_in(tmp_path)), list[Any]()
    page = client.get("/ui/runs/full-0001").text
    assert "Resume with train.tokens_per_pass=1 train.checkpointed_layers=30</button>" in page
    body = json.loads(unescape(re.findall(r'data-body="([^"]+)"', page)[0]))
    monkeypatch.setattr(launches, "start_child", lambda run, module, words, *more, **how: begun.append(words))
    assert client.post("/v1/runs/full-0001/resume", json=body, headers=OWN).status_code == 200
    words = ["--set", "train.checkpointed_layers=30", "--set", "train.tokens_per_pass=1"]
    assert begun == [["resume", str(run.path), *words, "--offline", "--json"]]
    refused = client.post("/v1/runs/full-0001/resume", json={"settings": {"--out": "x"}}, headers=OWN)
    assert (refused.status_code, len(begun)) == (400, 1)


def test_an_older_run_is_drawn_less_often(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "runs" / "seen-0001")
    client = entered(site_in(tmp_path))
    facts = run.read_json("run.json")
    with run.lock():
        for age_s, seconds in ((0, 2.0), (100, 5.0), (86_400, 10.0)):
            write_atomic(run.path / "run.json", to_json({**facts, "created": time.time() - age_s}))
            assert f'data-live="{seconds}"' in client.get("/ui/runs/seen-0001").text


def test_a_run_that_is_gone_is_not_found(tmp_path: Path) -> None:
    client = entered(site_in(tmp_path))
    assert "It may have been removed" in Elements(client.get("/ui/runs/gone-0001").text).text
    assert client.get("/v1/runs/gone-0001").json()["error"]["code"] == "not_found"


def test_two_people_at_once_are_told(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "runs" / "both-0001")
    client = entered(site_in(tmp_path))
    with run.lock():
        assert client.post("/v1/runs/both-0001/stop", json={}, headers=OWN).status_code == 200
        assert "Stops after its step" in client.get("/ui/runs/both-0001").text, "the other one sees it"
        refused = client.post("/v1/runs/both-0001/resume", json={}, headers=OWN)
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            409, "both-0001: it is running, so there is nothing to resume.",
        )  # fmt: skip
    assert client.post("/v1/runs/both-0001/stop", json={}, headers=OWN).status_code == 409


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    fake_run(tmp_path / "runs" / "a-1")
    client = entered(site_in(tmp_path))

    def full(*words: Any, **how: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(launches, "start_child", full)
    for path, body in (("/v1/runs", {"model": "m", "data": "rows.jsonl"}), ("/v1/runs/a-1/resume", {})):
        refused = client.post(path, json=body, headers=OWN)
        assert (refused.status_code, "No space left" in refused.text) == (507, True)
    monkeypatch.setattr(local_files, "free_bytes", lambda folder: 2**30 + 1)
    assert client.put("/v1/local_files/b.jsonl", content=b"ab", headers=OWN | {"X-Tunesmith": "1"}).status_code == 507


def test_what_is_too_large_is_refused(tmp_path: Path) -> None:
    client = stranger(site_in(tmp_path, keys=ApiKeys.of([KEY])))
    assert client.post("/ui/login", content="key=" + "x" * 5000).status_code == 413


def test_a_base_of_the_hub_is_not_asked_for_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_children(monkeypatch)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    site = site_in(tmp_path)
    text = Elements(answered(entered(site), "/ui/new?file=rows.jsonl&model=nobody/such-model")).text
    assert "nobody/such-model" in text
    assert "offline" in text
    site.commands.close()


def test_a_page_that_waits_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for name in ("a-1", "b-2"):
        run, _, _ = fake_run(tmp_path / "runs" / name)
        run.report_path.write_text("{}")
    site, waiting = site_in(tmp_path), Reply([])
    for name in ("check", "plan", "result", "compare"):
        monkeypatch.setattr(site, name, lambda *words, **how: waiting)
    monkeypatch.setattr(Reply, "progress", "<b>reading</b>: 40 %")
    client = entered(site)
    for path in ("data?file=rows.jsonl", "new?file=rows.jsonl&model=m", "runs/a-1/result", "compare?run=a-1&run=b-2"):
        page = client.get(f"/ui/{path}").text
        assert "<b>reading</b>: 40 %" in Elements(page).text, path
        assert 'data-live="0.5"' in page
        assert '<noscript><meta http-equiv="refresh"' in page


def test_a_run_that_is_starting_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tunesmith.jobs.launcher.python_words",
        lambda module: [sys.executable, "-IS", "-c", "import time; time.sleep(60)"],
    )
    (tmp_path / "runs").mkdir()
    start_child(tmp_path / "runs" / "new-0001", "tunesmith", [], {})
    client = entered(site_in(tmp_path))
    assert ">Stop</button>" in client.get("/ui/runs/new-0001").text
    assert client.post("/v1/runs/new-0001/stop", json={}, headers=OWN).status_code == 200
    assert not ChildProcess(tmp_path / "runs" / "new-0001").is_alive()
    assert client.get("/v1/runs").json()["working"] == []
    assert client.post("/v1/runs/new-0001/stop", json={}, headers=OWN).status_code == 404


def test_runs_at_once_are_said_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    site = site_in(tmp_path)
    at_work = ["a-1", "b-2", "c-3", "d-4"]
    monkeypatch.setattr(site.run_list, "at_work", lambda: at_work)
    monkeypatch.setattr(site, "plan", lambda wanted, measured: Reply([], values=plan_values()))
    client = entered(site)
    assert "4 runs at work: a-1, b-2, c-3, d-4." in Elements(client.get("/ui/new?file=rows.jsonl&model=m").text).text
    fake_run(site.root / "e-5")
    for path, body in (("/v1/runs", {"model": "m", "data": "rows.jsonl"}), ("/v1/runs/e-5/resume", {})):
        refused = client.post(path, json=body, headers=OWN)
        assert (refused.status_code, "4 runs are at work" in refused.text) == (409, True), path


def test_runs_that_begin_at_the_same_moment_keep_to_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.setattr(
        "tunesmith.jobs.launcher.python_words",
        lambda module: [sys.executable, "-IS", "-c", "import time; time.sleep(60)"],
    )
    site = site_in(tmp_path)
    client, statuses = entered(site), list[int]()
    body = {"model": "m", "data": "rows.jsonl"}

    def begin() -> None:
        statuses.append(client.post("/v1/runs", json=body, headers=OWN).status_code)

    people = [threading.Thread(target=begin) for _ in range(7)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    names = site.run_list.at_work()
    for name in names:
        ChildProcess(site.root / name).stop()
    assert (sorted(statuses), len(names)) == ([200] * 4 + [409] * 3, 4)


def test_an_error_that_passes_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, _ = fake_run(tmp_path / "runs" / "a-1", num_steps=4)
    site = site_in(tmp_path)

    def failing(*words: Any, **how: Any) -> Any:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr("tunesmith.runs.events.Tail.read", failing)
        [row] = site.run_list.page()["runs"]
        assert (row["state"], "cannot be read now" in row["problem"]) == ("unreadable", True)
    assert site.run_list.page()["runs"][0]["state"] == "interrupted"
    assert site.log(run.path.name).problem == ""


def test_a_damaged_evaluation_is_said_where_the_curve_is_asked_for(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "runs" / "a-1", num_steps=4)
    run.append(Event("evaluation", 4, 0.0, {"name": "step", "rows": 1}))
    client = entered(site_in(tmp_path))
    refused = client.get("/v1/runs/a-1/series")
    assert (refused.status_code, "cannot be drawn" in refused.text) == (422, True)
    assert client.get("/ui/runs/a-1").status_code == 200


def test_files_that_are_not_listed_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        (tmp_path / f"rows-{number:02}.jsonl").write_text("{}\n")
    client = entered(site_in(tmp_path))
    assert client.get("/v1/local_files").json()["more"] == ""
    monkeypatch.setattr(local_files, "MOST_LISTED", 5)
    assert "the newest 5 of 12 files of rows are listed" in client.get("/ui/data").text
    monkeypatch.setattr(local_files, "MOST_LOOKED_AT", 8)
    assert "only 8 files were looked at" in client.get("/ui/data").text


def test_a_row_is_looked_up_in_the_files_that_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b&c.jsonl").write_text("{}\n")
    places = LocalFiles(tmp_path, tmp_path / "runs").places()
    assert row_address(places, f"{tmp_path}/a b&c.jsonl:12") == "/ui/data?file=a+b%26c.jsonl&from=10#row-12"
    monkeypatch.chdir(tmp_path)
    assert row_address(places, "a b&c.jsonl:1 sample 2") == "/ui/data?file=a+b%26c.jsonl&from=1#row-1"
    for source in ("other.jsonl:3", "a b&c.jsonl", "owner/rows:3", ""):
        assert row_address(places, source) == ""


def test_memory_of_pages_is_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        fake_run(tmp_path / f"a-{number}", num_steps=10)
    runs = LiveRuns(tmp_path)
    monkeypatch.setattr("tunesmith.pages.live.MOST_BYTES", 1)
    for number in range(3):
        assert len(runs.log(Run(tmp_path / f"a-{number}")).series.steps) == 10
    assert len(runs._logs) == 1
    monkeypatch.setattr(run_list, "MOST_FACTS", 2)
    listed = RunList(LiveRuns(tmp_path))
    assert len(listed.page()["runs"]) == 3
    assert len(listed._facts) == 2
    monkeypatch.setattr(commands, "MOST_BYTES", 100)
    monkeypatch.setattr(commands, "python_words", lambda program: [sys.executable, "-IS", "-c", program])
    runner = CommandRunner()
    for number in range(3):
        assert runner.ask(f'print(\'{{"a": "{"x" * 90}{number}"}}\')', []).done.wait(20)
    assert len(runner._answers) <= 2
    runner.close()


def test_the_link_is_in_no_words_of_a_process(tmp_path: Path) -> None:
    door = tmp_path / "runs" / ".ui" / "open.html"
    address = door_to("http://127.0.0.1:8000/ui/open?code=secret", door)
    assert address == door.as_uri()
    assert door.stat().st_mode & 0o777 == 0o600
    assert 'content="0;url=http://127.0.0.1:8000/ui/open?code=secret"' in door.read_text()
    assert door_to("http://link", Path("/proc/none/open.html")) == "http://link"


@pytest.mark.parametrize(
    ("headers", "is_secure"),
    [({}, False), ({"X-Forwarded-Proto": "https"}, True), ({"Origin": "https://127.0.0.1:8000"}, True)],
    ids=["http", "proxy", "origin"],
)
def test_the_cookie_is_for_https_alone_behind_it(tmp_path: Path, headers: dict[str, str], is_secure: bool) -> None:
    site = site_in(tmp_path)
    client = TestClient(entered(site).app, base_url="http://127.0.0.1:8000", headers=HTML)
    assert ("Secure" in client.get(site.access.new_link(), headers=headers).headers["set-cookie"]) is is_secure


def test_numbers_of_a_run_and_its_result_are_those_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.evaluation.report import write_report
    from tunesmith.evaluation.report.values import metric_lines

    fork_children(monkeypatch)
    run, given, progress = fake_run(tmp_path / "runs" / "a-1", "classes", new_head=False)
    (tmp_path / "held.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    report = write_report(run, given, progress)
    run.append(Event("end", 120, 0.0, {"report": report}))
    printed = json.loads(fresh.done("-m", "tunesmith", "show", run.path, "--json"))
    client = entered(site_in(tmp_path))
    page = answered(client, "/ui/runs/a-1/result")
    text = Elements(page).text
    for line in metric_lines(report):
        for words in (line.label, line.after, line.other):
            assert words in text
    assert printed["report"] == report
    assert 'href="/ui/data?file=held.jsonl&amp;from=' in page, "rows that flipped lead to their line"
    flip = report["flips"]["lost"] or report["flips"]["gained"]
    number = flip[0]["source"].rpartition(":")[2]
    assert f"#row-{number}" in page


def test_a_plan_that_fits_is_one_click_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    values = plan_values(needed=3 * 2**30, room=2**30)
    change = {"method.name": "qlora", "precision": "bfloat16"}
    values["forecast"]["alternatives"] = [{"settings": change, "total": 2**29}]
    site = site_in(tmp_path)
    monkeypatch.setattr(site, "plan", lambda wanted, measured: Reply([], values=values))
    page = entered(site).get("/ui/new?file=rows.jsonl&model=m&set.seed=3").text
    address = "/ui/new?file=rows.jsonl&amp;model=m&amp;set.seed=3&amp;set.method.name=qlora&amp;set.precision=bfloat16"
    assert f'href="{address}"' in page
    assert page.count("/ui/new?file=") == 1


def test_rows_that_can_be_read_in_two_ways_go_on_by_a_click(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("{}\n")
    ways = [
        {"settings": {"task": "classify", "data.columns": "{text: Body, label: Kind}"}, "words": "Learn `Kind`"},
        {"settings": {"task": "text"}, "words": "Learn the text itself"},
    ]
    site = site_in(tmp_path)
    error = {"kind": "error", "message": "is it text?", "ways": ways}
    monkeypatch.setattr(site, "plan", lambda wanted, measured: Reply([], error=error))
    page = entered(site).get("/ui/new?file=rows.csv&model=m&set.seed=3").text
    columns = "%7Btext%3A+Body%2C+label%3A+Kind%7D"
    address = f"/ui/new?file=rows.csv&amp;model=m&amp;set.seed=3&amp;set.task=classify&amp;set.data.columns={columns}"
    assert f'<a class="button" href="{address}"><span>Learn <code>Kind</code></span></a>' in page
    assert ">Learn the text itself</span></a>" in page
    assert 'name="set.reinforce.grader"' in page, "an option can be set where no plan could be made"


def test_a_problem_of_the_rows_has_its_ways_on_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    way = {"settings": {"task": "chat", "data.columns": "{prompt: a}"}, "words": "Learn `b`"}
    problem = {"source": {"path": "rows.csv", "line": 1}, "code": "unknown_shape", "message": "no.", "fix": "So:"}
    values = {"ok": False, "problems": [{**problem, "severity": "error", "ways": [way]}], "errors": {}, "warnings": {}}
    values |= {"files": [], "mix": [], "tokens": {}, "labels": [], "notes": [], "refusals": ["no"], "held_out": 0}
    row = {"line": 2, "tokens": None, "trained": None, "spans": [["a: 1\n", False]], "problems": []}
    site = site_in(tmp_path)
    replies = {True: Reply([], values={"rows": [row]}), False: Reply([], values=values)}
    monkeypatch.setattr(site, "check", lambda path, model, lines=None: replies[lines is not None])
    page = entered(site).get("/ui/data?file=rows.csv").text
    address = "/ui/new?file=rows.csv&amp;model=&amp;set.task=chat&amp;set.data.columns=%7Bprompt%3A%20a%7D"
    assert f'<a href="{address}">Learn <code>b</code></a>' in page
    assert "a: 1" in page


def test_a_run_that_has_just_ended_does_not_get_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process lives for a moment after its last line."""
    run, _, _ = fake_run(tmp_path / "runs" / "over-0001")
    monkeypatch.setattr(ChildProcess, "is_alive", lambda self: True)
    assert launches.resuming(run) == (True, None)
    run.append(Event("end", 120, 0.0, {"report": {}}))
    assert launches.resuming(run) == (False, None)


def test_a_run_is_named_as_the_command_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "start_child", lambda *_, **__: None)
    wanted = launches.Wanted("m", str(tmp_path / "Kundenmeinungen März.csv"))
    name = launches.start(tmp_path / "runs", wanted, offline=True)["name"]
    assert name.rpartition("-")[0] == "kundenmeinungen-märz"


def test_a_problem_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("{}\n")
    site = site_in(tmp_path)
    for message, times in (("rows.csv:1: no_shape: unlike any row.", 1), ("2 problems. Correct them.", 1)):
        problem = {"file": "rows.csv", "line": 1, "code": "no_shape", "message": "unlike any row.", "fix": ""}
        error = {"kind": "error", "message": message, "problems": [problem]}
        monkeypatch.setattr(site, "plan", lambda wanted, measured, error=error: Reply([], error=error))
        page = entered(site).get("/ui/new?file=rows.csv&model=m").text
        assert page.count("unlike any row.") == times


def test_the_list_of_runs_sees_who_begins_and_who_ends(tmp_path: Path) -> None:
    site: Site = site_in(tmp_path)
    run, _, _ = fake_run(tmp_path / "runs" / "a-1", num_steps=4)
    with run.lock():
        assert site.run_list.at_work() == ["a-1"]
        other, _, _ = fake_run(tmp_path / "runs" / "b-2", num_steps=4)
        with other.lock():
            assert site.run_list.at_work() == ["a-1", "b-2"], "a new run is seen at once"
    assert site.run_list.at_work() == []
    wait_for(lambda: run_of(site, "a-1").state() == "interrupted")
