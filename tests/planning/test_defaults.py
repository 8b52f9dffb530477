"""What "auto" becomes, and why."""

import numpy as np
import pytest

from tunesmith.models import machine
from tunesmith.planning.decisions import Decisions
from tunesmith.planning.defaults import Facts, checkpoint_every, decide, rate_notes
from tunesmith.recipe.load import validate
from tunesmith.tasks import TASKS


def decided_by(recipe, facts):
    decisions = Decisions(recipe)
    decide(decisions, facts)
    return decisions.folded(), decisions.choices


def decided(rows: int, **recipe):
    facts = Facts(135_000_000, "cpu", "causal", np.full(rows, 50, np.int32))
    return decided_by(
        validate({"model": "m", "method": {"name": "lora"}, "task": "chat", "threads": 1, **recipe}), facts
    )


@pytest.mark.parametrize(
    ("rows", "recipe", "looked_at"),
    [
        (120, {}, 120),  # fewer than 200: all
        (500, {}, 341),  # two epochs of 32 steps of 16
        (5810, {"train": {"epochs": 1}}, 1941),  # 364 steps of 16
        (5810, {"train": {"epochs": 3}}, 5810),
        (5810, {"train": {"max_steps": 20}}, 200),  # 320 rows were seen
        (5810, {"train": {"max_steps": 3}}, 48),  # looking at more than was learnt from would take longer than learning
    ],
)
def test_looking_for_surprising_rows_stays_short_beside_training(rows, recipe, looked_at):
    recipe = {**recipe, "train": {"rows_per_step": 16, **recipe.get("train", {})}}
    assert decided(rows, task="prefer", **recipe)[0].evaluation.surprising == looked_at


@pytest.mark.parametrize("recipe", [{}, {"train": {"max_steps": 3}}])
def test_all_rows_whose_losses_training_sees_are_looked_at(recipe):
    assert decided(5810, **recipe)[0].evaluation.surprising == 5810


@pytest.mark.parametrize(
    ("task", "parameters", "rows", "held", "every"),
    [
        ("classify", 22_700_000, 600, 60, "epoch"),  # five epochs
        ("classify", 22_700_000, 600, 379, 3 * 38),  # all five would take a fifth of the training
        ("tag", 22_700_000, 600, 60, "epoch"),
        ("classify", 22_700_000, 600, 3000, None),  # once alone takes more than a tenth
        ("classify", 22_700_000, 600, 0, None),
        ("classify", 3_000_000_000, 600, 60, None),
        ("chat", 135_000_000, 200, 20, None),
    ],
)
def test_small_classifiers_are_measured_on_the_way_where_that_is_cheap(task, parameters, rows, held, every):
    facts = Facts(parameters, "cpu", "encoder", np.full(rows, 50, np.int32), held_tokens=50 * held)
    given = validate({"model": "m", "method": {"name": "full"}, "task": task, "threads": 1})
    evaluation = decided_by(given, facts)[0].evaluation
    assert (evaluation.every, evaluation.keep) == (every, "last" if every is None else "best")


@pytest.mark.parametrize(
    ("headline", "given", "metric", "reason"),
    [
        ("accuracy", {}, "accuracy", "the evaluation with the best accuracy is the result"),
        ("loss", {}, "loss", "the evaluation with the best loss is the result"),
        ("accuracy", {"metric": "loss"}, "loss", "the evaluation with the best loss is the result"),
    ],
)
def test_the_headline_says_which_evaluation_was_best_by_default(headline, given, metric, reason):
    facts = Facts(22_700_000, "cpu", "encoder", np.full(600, 50, np.int32), held_tokens=3000, headline=headline)
    recipe = {"model": "m", "method": {"name": "full"}, "task": "classify", "threads": 1, "evaluation": given}
    decided, choices = decided_by(validate(recipe), facts)
    assert decided.evaluation.metric == metric
    assert next(choice.reason for choice in choices if choice.key == "evaluation.keep") == reason


@pytest.mark.parametrize(
    ("steps", "step", "saving", "every"),
    [
        (76, 5.1, 0.5, 26),  # six and a half minutes: three times, not every ten steps
        (76, 0.2, 0.5, 76),
        (2000, 5.0, 0.5, 200),
        (100_000, 0.5, 0.5, 500),
        (200, 0.5, 40.0, 800),  # full tuning of a billion weights on a card: 40 s for 12 GB, in a run of 100 s
        (20_000, 0.5, 40.0, 800),
    ],
)
def test_saving_takes_at_most_a_tenth_of_a_run(steps, step, saving, every):
    assert checkpoint_every(steps, step_seconds=step, saving_seconds=saving)[0] == every
    on_the_way = (steps - 1) // every
    assert on_the_way * saving <= 0.1 * steps * step


@pytest.mark.parametrize(("rate", "note"), [("auto", ""), (0.01, ""), (5, "optim.lr: 5 is 10,000 times the usual")])
def test_a_learning_rate_far_above_the_usual_is_noted(rate, note):
    recipe, _ = decided(100, optim={"lr": rate})
    facts = Facts(135_000_000, "cpu", "causal", np.full(100, 50, np.int32))
    notes = rate_notes(recipe.method, recipe.optim, TASKS[recipe.task], facts)
    assert len(notes) == bool(note)
    assert all(one.startswith(note) for one in notes)


@pytest.mark.parametrize(
    ("task", "targets", "answered"),
    [
        ("chat", [3] * 100, 100),  # one word and its end: every row is right or wrong
        ("chat", [3] * 1000, 256),
        ("chat", [3] * 90 + [40] * 10, 100),
        ("chat", [3] * 80 + [40] * 20, 16),
        ("generate", [], 16),
        ("classify", [1] * 100, 0),
    ],
)
def test_answers_of_one_word_are_all_asked_for(task, targets, answered):
    facts = Facts(135_000_000, "cpu", "causal", np.full(500, 50, np.int32), np.array(targets, np.int32))
    recipe = validate({"model": "m", "method": {"name": "lora"}, "task": task, "threads": 1})
    assert decided_by(recipe, facts)[0].evaluation.samples == answered


@pytest.mark.parametrize(
    ("parameters", "length", "recipe", "precision"),
    [
        (22_700_000, 5, {}, "float32"),
        (22_700_000, 11, {}, "bfloat16"),  # 16 phrases a step: what a small encoder usually learns
        (22_700_000, 400, {}, "bfloat16"),
        (22_700_000, 400, {"train": {"tokens_per_pass": 64}}, "float32"),
        (22_700_000, 11, {"method": {"name": "lora"}}, "bfloat16"),
        (135_000_000, 50, {}, "bfloat16"),
        (22_700_000, 11, {"precision": "bfloat16"}, "bfloat16"),
    ],
)
def test_products_are_narrow_where_there_are_enough_of_them(monkeypatch, parameters, length, recipe, precision):
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"amx_bf16"})
    facts = Facts(parameters, "cpu", "encoder", np.full(500, length, np.int32))
    given = {"model": "m", "method": {"name": "full"}, "task": "classify", "threads": 1, "device": "cpu", **recipe}
    assert decided_by(validate(given), facts)[0].precision == precision


@pytest.mark.parametrize(
    ("parameters", "length", "rows", "every", "reason"),
    [
        (135_000_000, 57, 1825, 17, "a crash costs at most 17 of 115 steps"),
        (135_000_000, 57, 320, 20, "a run of 20 steps is saved before the first and after the last"),
        (22_700_000, 11, 1600, 100, "a run of 100 steps is saved before the first and after the last"),
        (22_700_000, 11, 320_000, 500, "a crash costs at most 500 of 20,000 steps"),
        (100_000, 11, 1600, 100, "a run of 100 steps is saved before the first and after the last"),
    ],
)
def test_checkpoints_are_as_far_apart_as_a_crash_may_cost(parameters, length, rows, every, reason):
    facts = Facts(parameters, "cpu", "encoder", np.full(rows, length, np.int32))
    given = {"model": "m", "method": {"name": "full"}, "task": "classify", "threads": 1, "device": "cpu"}
    recipe, choices = decided_by(validate({**given, "train": {"epochs": 1, "rows_per_step": 16}}), facts)
    assert recipe.checkpoint.every == every
    assert next(choice.reason for choice in choices if choice.key == "checkpoint.every") == reason


@pytest.mark.parametrize(
    ("rows", "recipe", "tokens"),
    [
        (5000, {"task": "embed"}, 128 * 50),  # a step in one pass needs no forward to look first
        (5000, {"task": "embed", "embed": {"loss": "cosine"}}, 2048),  # each row by itself
        (5000, {"task": "embed", "train": {"rows_per_step": 2000}}, 2048),
        (5000, {"task": "prefer", "prefer": {"loss": "kto"}, "train": {"rows_per_step": 64}}, 64 * 50),
        (5000, {"task": "prefer", "prefer": {"loss": "dpo"}, "train": {"rows_per_step": 64}}, 2048),
        (100, {"task": "embed"}, 2048),
    ],
)
def test_a_step_whose_rows_are_compared_is_one_pass_where_it_is_small(rows, recipe, tokens):
    assert decided(rows, **recipe)[0].train.tokens_per_pass == tokens
