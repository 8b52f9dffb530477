"""tunesmith show: what a run took, what came of it, and its answers beside the right ones."""

import json
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from evaluation.fake_runs import as_graded, fake_run
from tunesmith.cli.app import app
from tunesmith.cli.render import answers_table
from tunesmith.cli.runs import _measures, training_curve
from tunesmith.evaluation import report
from tunesmith.evaluation.series import RunSeries
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
    assert "held-out loss 2.2000 → 1.2998 at step 90, which was kept; 1.2683 at the end\n" in text
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created))
    assert f"{run.path.name}: done, made {made}" in text.replace("\n", "")


def test_a_run_of_rewards_says_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its loss says nothing, and its held-out "loss" is minus the reward."""
    run = as_graded(fake_run(tmp_path / "run", num_steps=4)[0])
    _measures(Console(width=200), RunSeries.of(run.events()), None)
    text = capsys.readouterr().out
    assert "training reward 0.3750 → 0.8750: means of the first and the last 2 of 4 steps\n" in text
    assert "held-out reward 0.1250 → " in text
    assert "loss" not in text


def test_a_run_at_work_says_how_far_it_is(tmp_path: Path) -> None:
    run, _, _ = fake_run(tmp_path / "run")
    with run.lock():
        run.note_progress("evaluate", 42, 100)
        result = CliRunner().invoke(app, ["show", str(run.path)])
    assert ": running (measuring held-out rows: 42 %), made " in result.stdout.replace("\n", "")


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


def shown_with(tmp_path: Path, events: list[Event]) -> str:
    run, _, _ = fake_run(tmp_path / "run", "chat")
    [plan, *_] = [event for event in run.events() if event.kind == "plan"]
    values = {
        "rows": {"train": 9, "held_out": 3},
        "tokens_per_epoch": 9.0,
        "method": "lora",
        "task": "chat",
        "steps": 40,
    }
    run.events_path.write_bytes(b"")
    for event in [Event("plan", 0, 0.0, {**plan.values, **values}, plan.timing), *events]:
        run.append(event)
    result = CliRunner().invoke(app, ["show", str(run.path)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_training_loss_is_a_mean_of_several_steps_at_both_ends(tmp_path: Path) -> None:
    steps = [Event("step", i, 0.0, {"loss": float(i % 2) + (i <= 20), "lr": 1e-3}) for i in range(1, 41)]
    text = shown_with(tmp_path, steps)
    assert "training loss 1.5000 → 0.5000: means of the first and the last 10 of 40 steps" in text


@pytest.mark.parametrize(
    ("values", "curve"),
    [
        ([2.0], "2.0000 in 1 step"),
        ([3.0, 1.0], "3.0000 → 1.0000: the first and the last of 2 steps"),
        ([3.0, 2.0, 1.0], "3.0000 → 1.0000: the first and the last of 3 steps"),
        ([4.0, 3.0, 9.0, 2.0, 1.0], "3.5000 → 1.5000: means of the first and the last 2 of 5 steps"),
    ],
)
def test_the_first_and_the_last_steps_share_none(values: list[float], curve: str) -> None:
    assert training_curve(values, len(values)) == curve


def test_run_that_was_killed_shows_what_was_measured_before_its_first_step(tmp_path: Path) -> None:
    values = {"name": "before", "loss": 2.5, "rows": 3, "targets": 9, "measures": {}}
    text = shown_with(tmp_path, [Event("start", 0, 0.0, {}), Event("evaluation", 0, 0.0, values)])
    assert "held-out loss of the untouched model 2.5000" in text
    assert "continue with: " in text
