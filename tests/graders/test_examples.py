"""The tasks of examples/rewards: a right answer gets all, an empty one nothing, and held-out rows are others."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shape.tree import ROOT
from tunesmith.graders.grade import Answer

Row = dict[str, Any]
TASKS: dict[str, tuple[Callable[[Row], str], Callable[[Row], object]]] = {
    "sums": (lambda row: f"It is {row['reference']}", lambda row: tuple(sorted(re.findall(r"\d+", row["prompt"])))),
    "people": (lambda row: row["completion"], lambda row: row["name"]),
    "words": (lambda row: "word " * row["words"], lambda row: row["prompt"].partition(" in exactly")[0]),
}
"""Task → the right answer to a row, and what no two files share of it."""


def task_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "rewards" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reward(task: ModuleType, text: str, row: Row) -> float:
    grade = task.grade(Answer(text).as_sample(), row)
    return grade["reward"] if isinstance(grade, dict) else grade


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_win_and_held_out_rows_are_others(name: str, tmp_path: Path) -> None:
    task, (answer, shared) = task_of(name), TASKS[name]
    task.main(tmp_path)
    files = [(tmp_path / f"{side}.jsonl").read_text("utf-8").splitlines() for side in ("train", "held-out")]
    train, held_out = ([json.loads(line) for line in lines] for lines in files)
    assert not set(map(shared, train)) & set(map(shared, held_out))
    assert len({row["prompt"] for row in train}) == len(train)
    for row in train + held_out:
        assert reward(task, answer(row), row) == 1
        assert reward(task, "", row) == 0


def test_json_is_graded_in_parts() -> None:
    task = task_of("people")
    row = {"name": "Ada Baker", "age": 20, "city": "Berlin"}
    right = json.dumps(row)
    assert reward(task, f"```json\n{right}\n```", row) == 0.75
    assert reward(task, right.replace("Berlin", "Paris"), row) == 0.75
    assert reward(task, '{"name": "Ada Baker", "age": 2', row) == 0.25
    assert reward(task, "Ada Baker, 20, Berlin", row) == 0
