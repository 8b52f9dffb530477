"""`tunesmith jobs` against a server of jobs whose dispatcher is driven by the test."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

from jobs.places import FakeLauncher, FakeModels, dispatcher, put_file, put_job, rows  # noqa: E402
from jobs.served import Served, serving  # noqa: E402
from jobs.test_dispatcher import work  # noqa: E402
from tunesmith.cli.app import app  # noqa: E402
from tunesmith.cli.jobs import JobServerClient  # noqa: E402
from tunesmith.cli.serve import ServerOutput  # noqa: E402
from tunesmith.jobs.store import Store, event  # noqa: E402
from tunesmith.serve.middleware import RequestLog  # noqa: E402
from tunesmith.serve.responses import Usage  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served")) as it:
        put_file(it.store, rows(12))
        yield it


@pytest.fixture
def job(served: Served) -> str:
    return put_job(served.store, "file-a")


def run(served: Served, *words: str) -> Result:
    return CliRunner().invoke(app, ["jobs", *words, "--url", f"{served.running.bound.url}/v1"])


def test_a_job_is_followed_to_its_end(served: Served, job: str) -> None:
    work(served.store, FakeLauncher(), FakeModels())
    done = run(served, "follow", "last")
    assert done.exit_code == 0
    said = [line.partition(" ")[2] for line in done.output.splitlines()]
    assert said[0] == f"Created fine-tuning job: {job}"
    assert said[-1] == "The job has successfully completed"
    assert sum("Step" in line for line in said) == 6, "each once"
    shown = run(served, "show", job).output
    tuned = served.store.job(job)["tuned_name"]
    assert (
        f"{job}: succeeded\nsupervised on tiny: n_epochs 1, batch_size 2, learning_rate_multiplier 1.0, seed" in shown
    )
    assert f"step 6: {tuned}, loss {1 / 6}" in shown
    assert [one["step_number"] for one in json.loads(run(served, "show", job, "--json").stdout)["checkpoints"]] == [
        6,
        4,
    ]


def test_no_event_is_lost_where_many_come_at_once(served: Served, job: str) -> None:
    client = JobServerClient(f"{served.running.bound.url}/v1")
    path, seen = client.name(job), set[str]()
    first = client.new_events(path, seen)
    served.store.add_events([event(job, f"Step {i}") for i in range(250)])
    assert [one["message"] for one in client.new_events(path, seen)] == [f"Step {i}" for i in range(250)]
    assert len(first) == 2
    assert client.new_events(path, seen) == []


def test_jobs_are_listed_as_lines_for_a_pipe(served: Served, job: str) -> None:
    lines = run(served, "list", "--limit", "1").output.splitlines()
    assert lines[0].split("\t") == ["job", "status", "model", "method", "made", "fine-tuned model"]
    assert lines[1].split("\t")[:4] == [job, "validating_files", "tiny", "supervised"]
    assert len(lines) == 2


def test_a_job_is_paused_resumed_and_cancelled(served: Served, job: str) -> None:
    assert run(served, "pause", job).output == f"{job}: paused\n"
    followed = run(served, "follow", job)
    assert followed.exit_code == 3
    assert f"tunesmith jobs resume {job}" in followed.output
    assert run(served, "resume", job).output == f"{job}: queued\n"
    assert run(served, "cancel", job).output == f"{job}: cancelled\n"
    assert run(served, "follow", job).exit_code == 1
    again = run(served, "cancel", job)
    assert again.exit_code == 2
    assert "is already cancelled and cannot be cancelled" in again.output


def test_what_is_not_there_is_named(served: Served) -> None:
    found = run(served, "show", "ftjob-none")
    assert (found.exit_code, "No such FineTuningJob object: ftjob-none" in found.output) == (2, True)
    assert run(served, "show", "../../etc/passwd").exit_code == 2
    alone = CliRunner().invoke(app, ["jobs", "list", "--url", "http://127.0.0.1:9/v1"])
    assert (alone.exit_code, "tunesmith serve --jobs MODEL" in alone.output) == (2, True)
    other = CliRunner().invoke(app, ["jobs", "list", "--url", f"{served.running.bound.url}/v2"])
    assert other.exit_code == 2


def test_the_report_is_a_page_that_runs_nothing(served: Served, job: str) -> None:
    path = f"/v1/fine_tuning/jobs/{job}/report.html"
    assert served.running.ask("GET", path)[0] == 404
    folder: Path = served.store.runs_path / job
    folder.mkdir()
    (folder / "report.html").write_text("<p>report</p>")
    status, body, head = served.running.ask("GET", path)
    assert (status, body) == (200, "<p>report</p>")
    assert "content-security-policy: sandbox; default-src 'none'" in head.lower()


@pytest.mark.parametrize("as_json", [False, True])
def test_the_server_prints_a_line_for_each_state_of_a_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    store = Store(tmp_path)
    output = ServerOutput(screen := Console(file=io.StringIO(), width=80), quiet=False, as_json=as_json)
    store.on_job = partial(output.job, store.runs_path)
    good, bad = put_job(store, put_file(store, rows(12))), put_job(store, put_file(store, rows(9), "file-b"))
    working = dispatcher(store, FakeLauncher(), FakeModels())
    for _ in range(12):
        working.round()
    gone = put_job(store, "file-a")
    store.act(gone, "pause", "paused")
    store.act(gone, "cancel", "cancelled")
    run, tuned, error = store.runs_path / good, store.job(good)["tuned_name"], store.job(bad)["error"]
    if as_json:
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {line["kind"] for line in lines} == {"job"}
        assert [(line["run"], line["fine_tuned_model"]) for line in lines if line["status"] == "succeeded"] == [
            (str(run), tuned)
        ]
        assert [line["error"] for line in lines if line["id"] == bad] == [None, error]
    else:
        said = screen.file.getvalue().splitlines()
        assert [line for line in said if line.startswith(good)] == [
            f"{good} on tiny: validating_files",
            f"{good} on tiny: queued",
            f"{good} on tiny: running in {os.path.relpath(run)}",
            f"{good} on tiny: succeeded: {tuned}",
        ]
        failed = [line for line in said if line.startswith(bad)][1]
        assert failed.startswith(f"{bad} on tiny: failed: Training file has 9 example(s)"), said
        assert [line.rpartition(": ")[2] for line in said[-3:]] == ["validating_files", "paused", "cancelled"]
    store.close()


def test_a_client_that_polls_is_one_line() -> None:
    output = ServerOutput(screen := Console(file=io.StringIO(), width=80), quiet=False, as_json=False)
    polls, posts = [("GET", "/a", 200)] * 3, [("POST", "/a", 200)] * 2
    for method, path, status in [*polls, *posts, *polls, ("GET", "/a", 404)]:
        output.request(RequestLog("1", method, path, path, status, 0.001, Usage()))
    said = [line.rpartition(" 1 ms")[0] for line in screen.file.getvalue().splitlines()]
    assert said == ["GET /a 200", "POST /a 200", "POST /a 200", "GET /a 200", "GET /a 404"]
