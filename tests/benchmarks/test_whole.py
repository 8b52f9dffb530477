"""The time of whole runs beside what was foreseen."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.whole import PARTS, markdown, measure, total

from tiny_run import chats, model_folder

RUN = {"command": "tunesmith train m a.jsonl", "by_formula": 130.0, "after_probe": 95.0, "measured": 100.0}


def test_the_table_tells_errors_and_keeps_what_failed():
    page = markdown([RUN, {**RUN, "by_formula": 90.0}, {"command": "tunesmith train m b.jsonl", "error": "a\nno disk"}])
    assert "| `tunesmith train m a.jsonl` | 100 | 130 | +30% | 95 | -5% |" in page
    assert "| failed: no disk |" in page
    assert "By formula, 2 runs: median error 20%, worst 30%." in page
    assert "After a probe, 2 runs: median error 5%, worst 5%." in page


def test_a_total_is_the_sum_of_the_parts_of_the_screen():
    assert total({**dict.fromkeys(PARTS, 2.0), "step": 100.0, "spread": 0.3}) == pytest.approx(10.0)


def test_two_commands_are_measured(tmp_path: Path):
    model, data = model_folder(tmp_path / "model"), chats(tmp_path / "rows.jsonl", 24)
    settings = ["evaluation.samples=0", "evaluation.general=false", "train.max_steps=2", "threads=1"]
    found = measure([str(model), str(data), *(word for one in settings for word in ("--set", one))])
    assert found.get("error") is None
    assert min(found["by_formula"], found["after_probe"], found["measured"]) > 0
    assert found["command"].startswith("tunesmith train")
