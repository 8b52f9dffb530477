"""tunesmith show: what a run took, what came of it, and its answers beside the right ones."""

import json
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from evaluation.fake_runs import fake_run
from tunesmith.cli.app import app
from tunesmith.cli.render import answers_table
from tunesmith.evaluation import report
from tunesmith.runs.folder import Run
from tunesmith.types import Event


@pytest.fixture
def shown(tmp_path: Path):
    """What is printed of a finished run, and the run."""

    def show(kind: str) -> tuple[str, Run]:
        run, facts, progress = fake_run(tmp_path / kind, kind)
        plan = {"task": facts["task"], "rows": facts["rows"], "steps": 120, "tokens_per_epoch": 9.0, "method": "lora"}
        forecast = {"forecast": {"seconds": {"train": 9999.0}}}
        events = list(run.events())
        run.events_path.write_bytes(b"")
        for event in events:
            values = {**event.values, **plan, "new_head": facts["new_head"]}
            run.append(Event("plan", 0, 0.0, values, forecast) if event.kind == "plan" else event)
        written = report.write_report(run, facts, progress)
        run.append(Event("end", 120, 0.0, {"report": written}))
        result = CliRunner().invoke(app, ["show", str(run.path)])
        assert result.exit_code == 0, result.output
        return result.stdout, run

    return show


def test_a_finished_run_says_what_it_took_and_not_what_was_predicted(shown) -> None:
    text, run = shown("chat")
    assert "took: 3 s to prepare, 4:00 min to train, 1:05 min to measure; at most 1.0 GiB of memory" in text
    assert "\ntime: " not in text
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created))
    assert f"{run.path.name}: done, made {made}" in text.replace("\n", "")


def test_a_classifier_is_shown_beside_the_majority_baseline(shown) -> None:
    text, run = shown("classes")
    flat = " ".join(text.split())
    headline = json.loads(run.report_path.read_text())["headline"]
    assert "for always answering `circulatory` (majority baseline)" in headline[0]
    assert headline[0] in flat
    assert "majority baseline" in flat.replace(headline[0], "")
    assert "before" not in flat


def test_answers_stand_beside_the_right_one_and_are_marked() -> None:
    console = Console(width=100, record=True)
    rows = [{"prompt": "How was it?", "reference": "positive", "before": "Great!", "after": "positive"}]
    rows.append({"prompt": "And now?", "reference": "negative", "before": "Well"})  # not answered yet
    console.print(answers_table(dict(enumerate(rows)), width=100, most=4))
    text = console.export_text()
    for words in ("prompt", "reference", "before", "after", "✗ Great!", "✓ positive", "✗ Well", "not yet"):
        assert words in text
    assert "nothing" not in text
    long = {"prompt": "Why?", "reference": "so", "before": "far " * 50, "before_stopped": False}
    console.print(answers_table({0: long, 1: long | {"before": "far"}}, width=100, most=4))
    text = console.export_text()
    assert "… …" not in " ".join(text.split())
    assert "far …" in text
