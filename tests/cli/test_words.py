"""One way to write shares and times, help that breaks no word, and the last words of a run."""

import io
import re

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from evaluation.fake_runs import fake_run
from tunesmith.cli.app import app
from tunesmith.cli.display import RunDisplay, Silent, event_line
from tunesmith.cli.render import print_result
from tunesmith.evaluation.report import write_report
from tunesmith.evaluation.series import RunSeries
from tunesmith.phrases import about, between, percent
from tunesmith.tasks import TASKS
from tunesmith.types import Event

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


def test_shares_and_times_are_written_in_one_way() -> None:
    assert [percent(0.712), percent(0.0), percent(-0.0001, 0), percent(1, 0)] == ["71.2 %", "0.0 %", "0 %", "100 %"]
    assert [about(one) for one in (0.4, 40, 300, 5000, 9000)] == [
        "about 0.4 s", "about 40 s", "about 5 min", "about 83 min", "about 2.5 h",
    ]  # fmt: skip
    assert between(300, 120, 420) == "about 5 min (2–7)"
    assert between(42, 21, 62) == "about 42 s (21–62)"
    assert between(27, 14, 41) == "about 27 s (14–41)"
    assert between(9000, 8990, 9010) == "about 2.5 h"


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_at_80_columns_breaks_no_word(name: str) -> None:
    text = CliRunner().invoke(app, [*([name] if name else []), "--help"], env={"COLUMNS": "80"}).output
    assert "bool" not in text
    for param in get_command(app).commands[name].params if name else ():  # type: ignore[attr-defined]
        for word in (param.metavar or "", *(one for one in param.opts if one.startswith("-"))):
            assert word in text, f"{name}: {word} is broken"


@pytest.mark.pages
def test_the_report_and_serving_are_offered_and_a_sentence_is_not_repeated(tmp_path) -> None:
    run, facts, progress = fake_run(tmp_path / "run", "classes")
    report = write_report(run, facts, progress)
    screen = Console(file=io.StringIO(), width=200, no_color=True)
    series = RunSeries.of([Event("plan", 0, 0.0, {"task": "classify"})])
    shown = RunDisplay(Silent(series), screen, series, lambda: False, as_json=False, quiet=False, runs=[run])
    print_result(screen, report)
    shown.done(run)
    said = screen.file.getvalue()  # type: ignore[attr-defined]
    assert f"report: {run.path / 'report.html'}" in said.splitlines()
    assert re.search(r"tunesmith serve \S+/run$", said, re.M)
    assert len(re.findall(r"accuracy", said.split("held out:")[0])) >= 1
    assert not re.search(r"^accuracy\b", said.split("held out:")[1], re.M)


def test_every_task_whose_result_can_be_served_says_so() -> None:
    served = {name for name, task in TASKS.items() if ("serve",) in task.next_commands}
    assert {"chat", "generate", "classify", "embed", "rank"} <= served


def test_what_nobody_has_to_act_on_does_not_alarm() -> None:
    series = RunSeries()
    usual = Event("note", 1, 0.0, {"text": "2 trained weights never got a gradient", "detail": True})
    series.add(usual)
    assert event_line(usual, series) == ""
    assert (series.notes, series.details) == ([], ["2 trained weights never got a gradient"])
