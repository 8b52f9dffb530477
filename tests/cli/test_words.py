"""One way to write shares and times, help that breaks no word, and the last words of a run."""

import io
import re
from collections.abc import Iterator
from typing import Any

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


def test_shares_and_times_are_written_in_one_way() -> None:
    assert [percent(0.712), percent(0.0), percent(-0.0001, 0), percent(1, 0)] == ["71.2 %", "0.0 %", "0 %", "100 %"]
    assert [about(one) for one in (0.4, 40, 300, 5000, 9000)] == [
        "about 0.4 s", "about 40 s", "about 5 min", "about 83 min", "about 2.5 h",
    ]  # fmt: skip
    assert between(300, 120, 420) == "about 5 min (2–7)"
    assert between(42, 21, 62) == "about 42 s (21–62)"
    assert between(27, 14, 41) == "about 27 s (14–41)"
    assert between(28, 14, 144) == "about 28 s (14–144)"  # beside other programs the range is wide: no 0.47 min
    assert between(9000, 8990, 9010) == "about 2.5 h"


def paths_of(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """The words of every command, those below others too."""
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from paths_of(below, *path, name)


@pytest.mark.parametrize("path", list(paths_of(get_command(app))), ids=" ".join)
def test_help_at_80_columns_breaks_no_word(path: tuple[str, ...]) -> None:
    """Every word of it is a word of a help that has room for all lines."""
    narrow, wide = (CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": size}).output for size in ("80", "400"))
    assert "bool" not in narrow
    assert set(re.split(r"[\s│╭╮╰╯─]+", narrow)) <= set(re.split(r"[\s│╭╮╰╯─]+", wide))
    assert max(map(len, narrow.splitlines())) <= 80


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


def test_the_last_of_three_commands_is_what_would_improve_the_result(tmp_path) -> None:
    run, _, _ = fake_run(tmp_path / "run", "classes")
    series = RunSeries.of([Event("plan", 0, 0.0, {"task": "embed"})])

    def last_commands(report: dict[str, Any]) -> list[str]:
        series.report = report
        screen = Console(file=io.StringIO(), width=400, no_color=True)
        RunDisplay(Silent(series), screen, series, lambda: False, as_json=False, quiet=False, runs=[run]).done(run)
        lines = screen.file.getvalue().split("Next:")[1].splitlines()  # type: ignore[attr-defined]
        return [line.strip() for line in lines if line.strip()]

    assert [line.split()[1] for line in last_commands({})] == ["eval", "serve", "show"]
    better = {"why": "The loss was still falling.", "settings": ["train.epochs=4"]}
    *first, command, why = last_commands({"try_next": [better, better]})
    assert [line.split()[1] for line in first] == ["eval", "serve"]
    assert command.endswith(f"train --recipe {run.path / 'recipe.yaml'} --set train.epochs=4")
    assert why == better["why"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_report_is_a_link_where_a_terminal_can_and_else_a_whole_path(tmp_path, monkeypatch, is_terminal) -> None:
    run, _, _ = fake_run(tmp_path / "run", "classes")
    (run.path / "report.html").touch()
    monkeypatch.chdir(tmp_path)
    near = type(run)(run.path.relative_to(tmp_path))
    screen = Console(
        file=io.StringIO(), width=200, force_terminal=is_terminal, color_system="256" if is_terminal else None
    )
    series = RunSeries()
    RunDisplay(Silent(series), screen, series, lambda: False, as_json=False, quiet=False, runs=[near]).done(near)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    page = tmp_path / "run" / "report.html"
    if is_terminal:
        assert re.search(rf"\x1b\]8;[^;]*;{re.escape(page.as_uri())}\x1b\\run/report.html", text)
    else:
        assert f"report: {page}\n" in text


def test_every_task_ends_in_three_commands() -> None:
    assert {name: len(task.next_commands) for name, task in TASKS.items()} == dict.fromkeys(TASKS, 3)


def test_the_baseline_is_a_column_of_the_table(tmp_path) -> None:
    run, facts, progress = fake_run(tmp_path / "run", "two")
    report = write_report(run, facts, progress)
    screen = Console(file=io.StringIO(), width=200, no_color=True)
    print_result(screen, report)
    heads = next(line for line in screen.file.getvalue().splitlines() if "after" in line and "\t" in line)  # type: ignore[attr-defined]
    assert heads.split("\t") == ["", "before", "after", "difference", report["baseline"]["name"]]
