"""Measuring takes at most about a third of a run, however short, and what was made less is said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tiny_run import chats, model_folder, tiny_recipe
from tunesmith.cli.app import app
from tunesmith.planning import defaults
from tunesmith.planning.defaults import FEW_HELD, GENERAL_TOKENS, TRAINED, WORD, Facts, decide_measuring, with_choice
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe
from tunesmith.training.resolve import resolve_run
from tunesmith.training.trainer import train
from tunesmith.types import Choice


def decided(steps: int, *, held: int = 60, params: int = 135_000_000, **evaluation: Any) -> tuple[Recipe, list[Choice]]:
    """Of a chat run with 16 rows of 100 tokens a step."""
    given = validate({"model": "m", "evaluation": evaluation})
    recipe = with_choice(given, Choice("evaluation.surprising", 200, "")) if "surprising" not in evaluation else given
    recipe = with_choice(recipe, Choice("evaluation.samples", 16, "")) if "samples" not in evaluation else recipe
    recipe = with_choice(recipe, Choice("train.rows_per_step", 16, ""))
    facts = Facts(params, "cpu", "causal", np.full(16, 100, np.int32), np.full(held, 100, np.int32))
    return decide_measuring(recipe, given, facts, steps=steps, held_tokens=100 * held, writes=True, speaks=True)


def share(recipe: Recipe, steps: int, *, held: int) -> float:
    """Of the run that measuring takes, in the same prices."""
    evaluation = recipe.evaluation
    held = min(held, evaluation.max_rows or held)
    measuring = 2.0 * 100 * held + 100 * evaluation.surprising
    measuring += 2 * WORD * -(-min(evaluation.samples, held) // 8) * evaluation.sample_tokens
    measuring += 2 * GENERAL_TOKENS * evaluation.general
    return measuring / (measuring + TRAINED * 1600 * steps)


@pytest.mark.parametrize("steps", [4, 10, 20, 30, 64, 200, 2000])
@pytest.mark.parametrize("held", [0, 8, 60, 1000])
def test_measuring_is_at_most_a_third_of_a_run(steps: int, held: int) -> None:
    recipe, choices = decided(steps, held=held)
    assert share(recipe, steps, held=held) <= 0.34 or recipe.evaluation.max_rows == FEW_HELD
    assert all("measuring takes at most about a third" in choice.reason for choice in choices)


def test_a_long_run_measures_all_and_says_nothing() -> None:
    recipe, choices = decided(400)
    evaluation = recipe.evaluation
    assert (evaluation.samples, evaluation.general, evaluation.surprising, evaluation.max_rows) == (16, True, 200, 1000)
    assert choices == []


def test_what_the_recipe_says_stays() -> None:
    given = {"samples": 16, "general": True, "surprising": 500, "max_rows": None}
    recipe, choices = decided(2, held=5000, **given)
    assert {key: getattr(recipe.evaluation, key) for key in given} == given
    assert choices == []


def test_what_takes_a_few_seconds_is_never_made_less() -> None:
    recipe, choices = decided(2, params=100_000)
    assert (recipe.evaluation.samples, recipe.evaluation.general, choices) == (16, True, [])


def test_fewer_held_out_rows_are_the_same_when_the_run_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "UNNOTICED_S", 0.0)
    monkeypatch.setattr(defaults, "FEW_HELD", 3)
    data = {"eval": [str(chats(tmp_path / "held.jsonl", 40, seed=1))]}
    recipe = tiny_recipe(tmp_path, data=data, evaluation={"samples": "auto", "surprising": 0}, train={"max_steps": 2})
    run = train(recipe, root=tmp_path / "runs")
    measured = [event.values["rows"] for event in run.events() if event.kind == "evaluation"]
    assert measured[0] < 40
    assert run.recipe().evaluation.max_rows == measured[0]
    plan = next(event.values for event in run.events() if event.kind == "plan")
    assert any(note.startswith(f"{measured[0]} of 40 held-out rows are measured") for note in plan["warnings"])
    again = train(run.recipe(), root=tmp_path / "runs")
    assert (again.evaluation_path / "after.jsonl").read_bytes() == (run.evaluation_path / "after.jsonl").read_bytes()


def test_the_plan_says_what_was_given(tmp_path: Path) -> None:
    model, data = model_folder(tmp_path / "model"), chats(tmp_path / "rows.jsonl", 20)
    words = ["plan", str(model), str(data), "--runs", str(tmp_path / "runs"), "--offline", "--no-probe", "--lr", "2e-4"]
    words += ["--rank", "4", "--fast"]
    assert (
        "given: method.name lora, method.rank 4, optim.lr 0.0002, evaluation.samples 0"
        in CliRunner().invoke(app, words).stdout
    )
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert told["given"]["evaluation.samples"] == 0
    assert "device" not in told["given"]
    assert resolve_run(tiny_recipe(tmp_path), root=tmp_path / "runs").given["train.rows_per_step"] == 3
