import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tunesmith import errors
from tunesmith.cli import errors as cli_errors
from tunesmith.cli import signals
from tunesmith.cli.app import Commands
from tunesmith.parallel.world import OWN_AGENT
from tunesmith.types import Problem, Source

SOURCE = Path(__file__).resolve().parents[2] / "src"

MORE = "More: tunesmith explain rows"


def failing_app(error: BaseException) -> typer.Typer:
    app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @app.callback()
    def about() -> None: ...

    @app.command()
    def fail(ctx: typer.Context, as_json: bool = typer.Option(False, "--json")) -> None:
        ctx.find_root().meta["json"] = as_json
        raise error

    return app


def problems(number: int) -> list[Problem]:
    return [Problem(Source("a.jsonl", n), "bad_json", "not JSON.", "Mend it.") for n in range(1, number + 1)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.TunesmithError("no"), 1),
        (errors.NonFiniteError("no"), 1),
        (errors.CheckpointError("no"), 1),
        (errors.StorageError("no"), 1),
        (errors.InputError("no"), 2),
        (errors.RecipeError("no"), 2),
        (errors.DataError("no"), 2),
        (errors.ModelError("no"), 2),
        (errors.RunError("no"), 2),
        (errors.Stopped("no"), 3),
        (ValueError("no"), 1),
        (PermissionError(13, "Permission denied", "x.jsonl"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    result = CliRunner().invoke(failing_app(error), ["fail"])
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_first_twenty_problems_and_how_many_more() -> None:
    found = [replace(problem, code=f"code_{i}") for i, problem in enumerate(problems(25))]
    result = CliRunner().invoke(failing_app(errors.DataError("25 rows cannot be used", found)), ["fail"])
    lines = result.stderr.splitlines()
    assert lines[0] == "a.jsonl:1: code_0: not JSON. Mend it."
    assert lines[19].startswith("a.jsonl:20: ")
    assert lines[20:] == [
        "and 5 more (--json lists all)",
        "error: 25 rows cannot be used",
        MORE,
    ]


def test_what_rows_of_a_file_share_is_printed_once_with_three_lines() -> None:
    for num, lines, more in ((3, "1, 2, 3", []), (600, "1, 2, 3 and 597 more", ["--json lists every line"])):
        three = [f"a.jsonl:{lines}: bad_json: not JSON. Mend it."]
        result = CliRunner().invoke(failing_app(errors.DataError("they cannot be used", problems(num))), ["fail"])
        assert result.stderr.splitlines() == [
            *three,
            *more,
            "error: they cannot be used",
            MORE,
        ]


def test_of_one_kind_in_a_file_three_are_printed() -> None:
    found = [replace(problem, message=f"message {i}.") for i, problem in enumerate(problems(9))]
    result = CliRunner().invoke(failing_app(errors.DataError("they cannot be used", found)), ["fail"])
    three = [f"a.jsonl:{i + 1}: bad_json: message {i}. Mend it." for i in range(3)]
    assert result.stderr.splitlines() == [*three, "and 6 more (--json lists all)", "error: they cannot be used", MORE]


def test_what_is_said_of_a_file_is_said_once() -> None:
    (problem,) = problems(1)
    result = CliRunner().invoke(failing_app(errors.DataError(str(problem), [problem])), ["fail"])
    assert result.stderr.splitlines() == [str(problem), MORE]


def test_machines_are_told_every_problem() -> None:
    error = errors.DataError("25 rows cannot be used", problems(25))
    result = CliRunner().invoke(failing_app(error), ["fail", "--json"])
    told = json.loads(result.stdout)
    assert told["code"] == "DataError"
    assert len(told["problems"]) == 25
    assert told["problems"][0] == {
        "file": "a.jsonl",
        "line": 1,
        "code": "bad_json",
        "severity": "error",
        "message": "not JSON.",
        "fix": "Mend it.",
    }


def test_escapes_in_messages_are_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    cli_errors.report(errors.InputError("file \x1b[31m.jsonl"))
    assert capsys.readouterr().err == "error: file ␛[31m.jsonl\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_the_end_of_memory_names_the_way_out(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    cli_errors.report(error)
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: ")
    assert "train.tokens_per_pass" in said
    assert "fault in tunesmith" not in said


def test_faults_of_ours_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_errors.report(KeyError("weights")) == 1
    said = capsys.readouterr().err
    assert "KeyError: 'weights'" in said
    assert "TUNESMITH_DEBUG=1" in said
    assert "Traceback" not in said


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TUNESMITH_DEBUG", "1")
    try:
        raise errors.InputError("no")
    except errors.InputError as error:
        cli_errors.report(error)
    assert "Traceback" in capsys.readouterr().err


Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def stoppable() -> Start:
    """A process that works in steps of 50 ms under our signal handlers and says what it does."""

    def start(has_begun: str) -> subprocess.Popen[str]:
        code = f"""
import time
from tunesmith.cli.signals import stopping_on_signals
say = lambda text: print(text, flush=True)
with stopping_on_signals(has_begun=lambda: {has_begun}, say=say, at_once=lambda: say('at once')) as should_stop:
    say('ready')
    for _ in range(200):
        time.sleep(0.05)
        if should_stop() and {has_begun} != 'deaf':
            say('stopped')
            break
"""
        return subprocess.Popen([sys.executable, "-c", code], cwd=SOURCE, stdout=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize("number", [2, 15])
def test_first_signal_asks_to_stop(stoppable: Start, number: int) -> None:
    process = stoppable("True")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said, _ = process.communicate(timeout=20)
    assert said.splitlines()[0].startswith("stopping: a checkpoint is written")
    assert said.splitlines()[1] == "stopped"
    assert process.returncode == 0


def test_a_rank_that_its_agent_ends_was_asked_by_nobody(stoppable: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWN_AGENT, "folder")
    process = stoppable("True")
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    said, _ = process.communicate(timeout=20)
    assert said.splitlines() == ["stopping: a SIGTERM came, or another process of this run was lost.", "stopped"]


@pytest.mark.parametrize("number", [2, 15])
def test_second_signal_ends_at_once(stoppable: Start, number: int) -> None:
    process = stoppable("'deaf'")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline().startswith("stopping")
    process.send_signal(number)
    said, _ = process.communicate(timeout=20)
    assert said == "at once\n"
    assert process.returncode == -number


def test_signal_before_the_run_has_begun_interrupts(stoppable: Start) -> None:
    process = stoppable("False")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(2)
    process.communicate(timeout=20)
    assert process.returncode in (1, -2)  # an uncaught KeyboardInterrupt, as the interpreter ends with it


def test_a_signal_within_a_line_stops_the_run_and_is_printed_elsewhere(capfd: pytest.CaptureFixture[str]) -> None:
    def say(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name=1>")

    with signals.stopping_on_signals(has_begun=lambda: True, say=say) as should_stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
    assert capfd.readouterr().err.startswith("stopping: a checkpoint is written")
