"""Answers of commands: asked once, kept as long as their files are the same, and errors in their own words."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.serve.commands import CommandRunner

PRINTS = "import pathlib, sys; place = pathlib.Path(sys.argv[1]); place.open('a').write('x'); print({!r})"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Iterator[CommandRunner]:
    """Children run the program that stands for their module."""
    monkeypatch.setattr("tunesmith.serve.commands.python_words", lambda program: [sys.executable, "-IS", "-c", program])
    asked = CommandRunner()
    yield asked
    asked.close()


def test_an_answer_is_kept_until_its_files_change_or_it_is_old(commands: CommandRunner, tmp_path: Path) -> None:
    times, rows = tmp_path / "times", tmp_path / "rows"
    program = PRINTS.format('{"kind": "check", "ok": true}')
    rows.write_text("a")
    for _ in range(2):
        answer = commands.ask(program, [str(times)], [rows])
        assert answer.done.wait(20)
        assert answer.values == {"kind": "check", "ok": True}
    assert times.read_text() == "x"
    rows.write_text("ab")
    assert commands.ask(program, [str(times)], [rows]).done.wait(20)
    assert times.read_text() == "xx"
    time.sleep(0.01)
    assert commands.ask(program, [str(times)], [rows], age_s=0.001).done.wait(20)
    assert times.read_text() == "xxx"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("""print('{"kind": "error", "message": "no such file"}'); raise SystemExit(2)""", "no such file"),
        ("import sys; print('half a {'); sys.exit('Killed by nobody')", "Killed by nobody"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "the process ended with code -9, without a word."),
    ],
    ids=["error", "unreadable", "killed"],
)
def test_what_went_wrong_is_said_in_the_words_of_the_child(commands: CommandRunner, program: str, message: str) -> None:
    answer = commands.ask(program, [])
    assert answer.done.wait(20)
    assert answer.values is None
    assert answer.error is not None
    assert answer.error["message"] == message


def test_a_failure_is_tried_again_after_a_while(
    commands: CommandRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "model"
    program = "import pathlib, sys; print('{\"ok\": true}') if pathlib.Path(sys.argv[1]).exists() else sys.exit('none')"
    for _ in range(2):
        answer = commands.ask(program, [str(place)])
        assert answer.done.wait(20)
        assert answer.error is not None
        assert answer.error["message"] == "none"
        place.touch()
    monkeypatch.setattr("tunesmith.serve.commands.FAILED_AGE_S", 0.0)
    answer = commands.ask(program, [str(place)])
    assert answer.done.wait(20)
    assert answer.values == {"ok": True}


def test_children_end_with_their_server(commands: CommandRunner) -> None:
    answer = commands.ask("import time; print('{}', flush=True); time.sleep(60)", [])
    assert not answer.done.is_set()
    commands.close()
    assert answer.done.wait(20)
