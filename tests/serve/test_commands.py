"""Answers of commands: asked once, kept as long as their files are the same, and errors in their own words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.running import wait_for
from tunesmith.environment.children import for_child
from tunesmith.serve.commands import CommandRunner
from tunesmith.types import JsonObject

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


WAITS = """import json, sys
print("imported", file=sys.stderr, flush=True)
line = sys.stdin.readline()
if line:
    print(json.dumps({"is_spare": True, **json.loads(line)}))"""


@pytest.fixture
def spared(monkeypatch: pytest.MonkeyPatch) -> Iterator[CommandRunner]:
    """Children say whether they were there before they were asked for."""
    programs = {"tunesmith.serve.spare": WAITS, "shows": """print('{"is_spare": false}')"""}
    monkeypatch.setattr(
        "tunesmith.serve.commands.python_words", lambda module: [sys.executable, "-IS", "-c", programs[module]]
    )
    asked = CommandRunner(["json"])
    yield asked
    asked.close()


def answer_of(commands: CommandRunner, *words: str) -> JsonObject:
    answer = commands.ask("shows", words)
    assert answer.done.wait(20)
    assert answer.values is not None, answer.error
    return answer.values


def test_the_next_answer_has_its_process_already(spared: CommandRunner) -> None:
    assert answer_of(spared, "first") == {"is_spare": False}
    for word in ("second", "--third\n'"):
        wait_for(lambda: spared._spare is not None)
        assert answer_of(spared, word) == {"is_spare": True, "module": "shows", "words": [word]}
    wait_for(lambda: spared._spare is not None)
    spare = spared._spare
    assert spare is not None
    spare.process.kill()
    spare.process.wait()
    assert answer_of(spared, "fourth") == {"is_spare": False}, "one that has ended is not asked"


def test_a_spare_process_gives_its_memory_back(spared: CommandRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.serve.commands.SPARE_S", 0.05)
    answer_of(spared, "first")
    wait_for(lambda: spared._spare is None and spared._spare_ends.finished.is_set())
    answer_of(spared, "second")
    monkeypatch.setattr("tunesmith.serve.commands.SPARE_S", 60)
    answer_of(spared, "third")
    wait_for(lambda: spared._spare is not None)
    spare = spared._spare
    assert spare is not None
    spared.close()
    assert spare.process.poll() is not None, "it ends with its server"


def test_a_spare_process_is_the_command_that_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "shows.py").write_text("import sys\nprint(__name__, sys.argv[1:], sys.stdin.read() == '')\n")
    line = json.dumps({"module": "shows", "words": ["a b", "--json"]}) + "\n"
    environment = for_child(PYTHONPATH=os.pathsep.join([str(tmp_path), for_child()["PYTHONPATH"]]))
    for said, printed in ((line, "__main__ ['a b', '--json'] True\n"), ("", "")):
        words = [sys.executable, "-m", "tunesmith.serve.spare", "colorsys"]
        process = subprocess.run(words, input=said, env=environment, capture_output=True, text=True, check=True)
        assert process.stdout == printed
