"""What a report says to try next: by what was measured, with a command that can be pasted."""

from pathlib import Path
from typing import Any

import pytest

from evaluation.fake_runs import fake_run
from tunesmith.evaluation.report import write_report
from tunesmith.evaluation.report.advice import MOST_TRIED, Advice, next_command, try_next
from tunesmith.recipe.load import validate


def report_of(**changes: Any) -> dict[str, Any]:
    known = {
        "metrics": {"before": None, "after": {"measures": {}}},
        "details": {"after": {}},
        "class_weights": "equal",
        "changes": {},
        "general": None,
        "kept": {},
        "steps": 90,
    }
    return known | changes


def recipe_of(**sections: Any) -> Any:
    return validate(
        {"model": "m", "data": {"train": ["a.jsonl"]}, "optim": {"lr": 3e-4}, "train": {"epochs": 3}} | sections
    )


def course_of(*losses: float, **measures: list[float]) -> list[tuple[int, dict[str, Any]]]:
    named = [{key: {"value": values[i]} for key, values in measures.items()} for i in range(len(losses))]
    return [(30 * i, {"loss": loss, "measures": named[i]}) for i, loss in enumerate(losses)]


def advices(report: dict[str, Any], recipe: Any = None, course: Any = ()) -> list[Advice]:
    recipe = recipe or recipe_of()
    has_eval = bool(recipe.data.eval)
    return try_next(report, list(course), optim=recipe.optim, train=recipe.train, has_eval=has_eval)


def settings(report: dict[str, Any], recipe: Any = None, course: Any = ()) -> list[str]:
    return [setting for advice in advices(report, recipe, course) for setting in advice.settings]


def test_a_good_run_gets_no_advice() -> None:
    assert settings(report_of(), course=course_of(3.0, 1.0, 0.999)) == []


def test_a_run_without_held_out_rows_is_to_hold_some_out() -> None:
    nothing = report_of(metrics={"before": None, "after": None})
    assert settings(nothing) == ["data.held_out=0.1"]
    with_rows = recipe_of(data={"train": ["a.jsonl"], "eval": ["b.jsonl"]})
    assert settings(nothing, with_rows) == []


def test_a_new_head_that_ends_worse_than_random_takes_smaller_steps() -> None:
    report = report_of(new_head=True)
    assert settings(report, course=course_of(1.11, 108.9, 27.0, 29.5)) == ["optim.lr=3e-05"]
    assert settings(report, course=course_of(1.11, 1.13)) == []  # two steps of a run that has hardly begun
    assert settings(report, course=course_of(1.11, 0.8, 1.3)) == []  # the best evaluation is what is kept


def test_a_rare_class_that_is_never_right_is_to_count_more() -> None:
    per_class = [
        {"label": name, "support": num, "recall": recall, "f1": recall}
        for name, num, recall in (("good", 90, 1.0), ("neutral", 6, 0.0), ("bad", 60, 0.8))
    ]
    report = report_of(details={"after": {"per_class": per_class, "labels": ["good", "neutral", "bad"]}})
    [advice] = advices(report)
    assert advice.settings == ("train.class_weights=balanced",)
    assert "neutral" in advice.why
    assert "never right" in advice.why
    assert advices({**report, "class_weights": "balanced"}) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"changes": {"loss": {"value": 0.3, "is_clear": True}}},
        {"general": {"past_bound": True}},
        {"changes": {"loss": {"value": 0.3, "is_clear": True}}, "general": {"past_bound": True}},
    ],
)
def test_a_model_that_got_worse_is_to_take_smaller_steps(changes: dict[str, Any]) -> None:
    assert settings(report_of(**changes)) == ["optim.lr=0.0001"]


def test_what_may_be_chance_is_no_reason() -> None:
    assert settings(report_of(changes={"loss": {"value": 0.3, "is_clear": False}})) == []


def test_a_loss_that_still_falls_at_the_end_is_to_fall_on() -> None:
    falling = course_of(3.0, 2.0, 1.5, 1.3)
    assert settings(report_of(), course=falling) == ["train.epochs=6"]
    assert settings(report_of(kept={"step": 60}), course=falling) == []
    assert settings(report_of(), recipe_of(train={"epochs": 3, "max_steps": 90}), falling) == []
    assert settings(report_of(), course=course_of(3.0, 1.3)) == []  # two points are no course


@pytest.mark.pages
def test_it_is_in_every_form_of_the_report(tmp_path: Path) -> None:
    run, facts, progress = fake_run(tmp_path / "run", "chat")
    recipe = run.recipe_path
    recipe.write_text(f"{recipe.read_text()}optim:\n  lr: 0.0003\ntrain:\n  epochs: 3.0\n")
    made = write_report(run, facts, progress)
    assert 0 < len(made["try_next"]) <= MOST_TRIED
    advice = made["try_next"][0]
    for page in ("report.md", "report.html"):
        text = (run.path / page).read_text("utf-8")
        assert "Try next" in text
        assert next_command(run.path, advice) in text


def test_the_command_repeats_the_run_but_for_its_settings(tmp_path: Path) -> None:
    command = next_command(tmp_path, {"settings": ["optim.lr=0.0001", "train.epochs=2"]})
    assert command.endswith(f"train --recipe {tmp_path / 'recipe.yaml'} --set optim.lr=0.0001 --set train.epochs=2")
