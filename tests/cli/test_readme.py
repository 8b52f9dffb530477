"""What README shows can be typed."""

import os
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny_run import chats, model_folder
from tunesmith.cli.app import app

README = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind != "python" for line in block.splitlines() if "tunesmith " in line]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


def test_there_is_something_to_type() -> None:
    assert len(COMMANDS) >= 2
    assert len(PYTHON) >= 2


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("tunesmith ")])
def test_commands_have_verbs_and_options_that_exist(command: str) -> None:
    _, verb, *words = shlex.split(command, comments=True)
    help_text = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert help_text.exit_code == 0
    for option in (word for word in words if word.startswith("--")):
        assert f"{option} " in help_text.output


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, with a small model in the place of the real one."""
    monkeypatch.chdir(tmp_path)
    # One thread: two that wait for each other beside other tests take ten times as long.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    model = model_folder(tmp_path / "model")
    chats(tmp_path / "support.jsonl", 24)
    names: dict[str, object] = {}
    for block in PYTHON:
        exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model)), names)
    assert len(list((tmp_path / "runs").glob("support-*/report.json"))) == 1
