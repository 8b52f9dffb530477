"""Commands that are printed can be pasted: the program as it was started, words quoted for a shell."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tunesmith.phrases import command


def started(monkeypatch: pytest.MonkeyPatch, script: Path | str, *, path: Path | str = "") -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "train"])
    monkeypatch.setenv("PATH", str(path))


def program(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "tunesmith"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    return script


def test_on_the_path_it_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = program(tmp_path / "bin")
    started(monkeypatch, script, path=script.parent)
    assert command("show", "runs/a") == "tunesmith show runs/a"


def test_elsewhere_it_is_the_script_as_seen_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / ".venv" / "bin")
    monkeypatch.chdir(tmp_path)
    started(monkeypatch, ".venv/bin/tunesmith")
    assert command("show", "runs/a") == f".venv{os.sep}bin{os.sep}tunesmith show runs/a"
    monkeypatch.chdir(tmp_path.parent)
    started(monkeypatch, tmp_path / ".venv" / "bin" / "tunesmith")
    assert shutil.which(shlex.split(command("show"))[0]) is not None


def test_another_tunesmith_on_the_path_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, script = program(tmp_path / "other"), program(tmp_path / ".venv")
    started(monkeypatch, script, path=other.parent)
    assert command("show").endswith(f".venv{os.sep}tunesmith show")


def test_started_as_a_module_it_is_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, os.path.join("src", "tunesmith", "__main__.py"))
    assert command("show").endswith(" -m tunesmith show")


@pytest.mark.parametrize("name", ["runs/my run", "runs/\u00fcn \u2713", "runs/it's", "runs/$HOME;ls", "runs/--x"])
def test_words_come_back_from_a_shell_as_they_were(name: str) -> None:
    assert shlex.split(command("chat", name, "--compare"))[-3:] == ["chat", name, "--compare"]
