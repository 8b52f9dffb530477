"""Measuring takes at most about a third of a run, however short, and what was made less is said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tiny_run import chats, model_folder, tiny_recipe
from tunesmith.cli.app import app
from tunesmith.planning.decisions import Decisions
from tunesmith.planning.defaults import GENERAL_TOKENS, TRAINED, WORD, Facts, decide_measuring
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe
from tunesmith.training.resolve import resolve_run
from tunesmith.types import Choice

TOGETHER = 8 * 2048 // (2 * 256)
"""Prompts of 100 tokens that are answered together, in the room of eight passes: each has at most two places of 256."""


def decided(steps: int, *, held: int = 60, params: int = 135_000_000, **evaluation: Any) -> tuple[Recipe, list[Choice]]:
    """Of a chat run with 16 rows of 100 tokens a step."""
    given = validate({"model": "m", "task": "prefer", "evaluation": evaluation})
    decisions = Decisions(given)
    usual = {"evaluation.surprising": 200, "evaluation.samples": 16, "train.rows_per_step": 16}
    for key, value in {**usual, "train.tokens_per_pass": 2048}.items():
        if key.removeprefix("evaluation.") not in evaluation:
            decisions.set(key, value)
    facts = Facts(params, "cpu", "causal", np.full(16, 100, np.int32), np.full(held, 100, np.int32))
    decide_measuring(decisions, facts, steps=steps, held_tokens=100 * held, writes=True, speaks=True)
    return decisions.folded(), decisions.choices


def share(recipe: Recipe, steps: int, *, held: int) -> float:
    """Of the run that measuring takes, in the same prices."""
    evaluation = recipe.evaluation
    held = min(held, evaluation.max_rows or held)
    measuring = 2.0 * 100 * held + 100 * evaluation.surprising
    for num in (min(asked, held) for asked in (evaluation.samples, evaluation.samples_before)):
        measuring += (WORD["cpu"] * -(-num // TOGETHER) + num) * evaluation.sample_tokens
    measuring += 2 * GENERAL_TOKENS * evaluation.general
    return measuring / (measuring + TRAINED * 1600 * steps)


@pytest.mark.parametrize("steps", [4, 10, 20, 30, 64, 200, 2000])
@pytest.mark.parametrize("held", [0, 8, 60, 1000])
def test_measuring_is_at_most_a_third_of_a_run(steps: int, held: int) -> None:
    recipe, choices = decided(steps, held=held)
    least = 200 * held / (200 * held + TRAINED * 1600 * steps)  # held-out rows are measured in every run
    assert share(recipe, steps, held=held) <= max(0.34, least)
    reasons = [choice.reason for choice in choices if choice.key != "evaluation.samples_before"]
    assert all("measuring takes at most about a third" in reason for reason in reasons)


def test_a_long_run_measures_all_and_says_nothing() -> None:
    recipe, choices = decided(400)
    evaluation = recipe.evaluation
    assert (evaluation.samples, evaluation.general, evaluation.surprising, evaluation.max_rows) == (16, True, 200, 1000)
    assert choices == []


@pytest.mark.parametrize(("steps", "before"), [(400, 256), (30, 64), (12, 8)])
def test_the_untouched_model_answers_within_a_tenth_of_the_training(steps: int, before: int) -> None:
    """256 long answers, as the person wants them: the tuned model writes all of them."""
    recipe, choices = decided(steps, held=300, samples=256)
    assert (recipe.evaluation.samples, recipe.evaluation.samples_before) == (256, before)
    named = [choice.reason for choice in choices if choice.key == "evaluation.samples_before"]
    assert named == (
        ["of 256 that the tuned one answers, so that this takes at most a tenth of the training"] * (before < 256)
    )


def test_what_the_recipe_says_stays() -> None:
    given = {"samples": 16, "samples_before": 16, "general": True, "surprising": 500, "max_rows": None}
    recipe, choices = decided(2, held=5000, **given)
    assert {key: getattr(recipe.evaluation, key) for key in given} == given
    assert choices == []


def test_what_takes_a_few_seconds_is_never_made_less() -> None:
    recipe, choices = decided(2, params=100_000)
    assert (recipe.evaluation.samples, recipe.evaluation.general, choices) == (16, True, [])


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
    assert resolve_run(tiny_recipe(tmp_path), root=tmp_path / "runs").user_options["train.rows_per_step"] == 3
