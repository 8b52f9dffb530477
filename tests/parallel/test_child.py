"""A run in a process of its own, as a Python program hears it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import ExportError, GroupError
from tunesmith.parallel.child import run_words

STEP = {"kind": "step", "step": 1, "time": 0.0, "values": {}, "timing": {}}
RESULT = {"kind": "result", "run": "runs/a", "report": "runs/a/report.json"}
EXPORT = {"kind": "export", "target": "merged", "path": "out"}
PYTHON = sys.executable
ERROR = {"kind": "error", "code": "ExportError", "message": "not what was tuned"}


class Heard:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_event(self, event: Any) -> None:
        self.steps.append(event.step)

    def should_stop(self) -> bool:
        return False


def child_that_prints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: dict[str, Any] | str, code: int = 0
) -> None:
    script = folder / "python"
    said = "".join(f"print({(line if isinstance(line, str) else json.dumps(line))!r})\n" for line in lines)
    script.write_text(f"#!{PYTHON}\nimport sys\n{said}sys.exit({code})\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))


def test_a_run_with_exports_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child_that_prints(tmp_path, monkeypatch, STEP, RESULT, EXPORT)
    heard = Heard()
    assert run_words(["train"], offline=True, listener=heard).path == Path("runs/a")
    assert heard.steps == [1]


def test_notes_of_exports_and_of_trackers_are_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {"kind": "tracking", "sent": False, "text": "wandb: sent nothing yet"}
    child_that_prints(tmp_path, monkeypatch, STEP, lost, RESULT, EXPORT | {"notes": ["dtype: float16"]})
    notes: list[str] = []
    run_words(["train"], offline=True, listener=Heard(), on_note=notes.append)
    assert notes == ["wandb: sent nothing yet", "dtype: float16"]


def test_what_ends_without_a_result_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child_that_prints(tmp_path, monkeypatch, STEP)
    with pytest.raises(GroupError, match="ended with code 0"):
        run_words(["train"], offline=True, listener=Heard())
    child_that_prints(tmp_path, monkeypatch, STEP, RESULT, ERROR, code=1)
    with pytest.raises(ExportError, match="not what was tuned"):
        run_words(["train"], offline=True, listener=Heard())


def test_lines_of_libraries_and_a_line_cut_off_are_no_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child_that_prints(tmp_path, monkeypatch, "NCCL version 2.27.5+cuda12.9", STEP, "{'loss': 1.5}", RESULT)
    heard = Heard()
    assert run_words(["train"], offline=True, listener=heard).path == Path("runs/a")
    assert heard.steps == [1]
    child_that_prints(tmp_path, monkeypatch, STEP)
    script = tmp_path / "python"
    script.write_text(script.read_text().replace("sys.exit(0)", "print('{\"kind\": \"st', end=''); sys.exit(137)"))
    with pytest.raises(GroupError, match="ended with code 137"):
        run_words(["train"], offline=True, listener=Heard())
