"""Hyperparameters of a reinforcement job: the options of its run, and the numbers that the job shows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from tunesmith.recipe.reinforcement import USUAL_PROMPTS, Reinforce, updates_of
from tunesmith.recipe.schema import EvaluationOptions
from tunesmith.types import JsonObject, Record

DEFAULTS = Reinforce()
LEAST_SAMPLES, MOST_SAMPLES = 2, 64
EVALUATIONS, EVALUATION_SHARE = 10, 0.25
"""Evaluations of a run by `eval_interval: auto`; fewer where they would draw more of its answers than a
share."""


def samples_of(compute_multiplier: float | str) -> int:
    """Answers drawn to each prompt of a step: the usual number times `compute_multiplier`,
    within what can be learnt from."""
    times = 1.0 if isinstance(compute_multiplier, str) else compute_multiplier
    return min(MOST_SAMPLES, max(LEAST_SAMPLES, round(DEFAULTS.samples * times)))


def decided(numbers: Record, *, num_rows: int, num_validation: int) -> JsonObject:
    """The numbers of a job with `n_epochs`, `eval_interval` and `eval_samples`
    decided where they are "auto"."""
    rows = min(num_rows, USUAL_PROMPTS if numbers["batch_size"] == "auto" else numbers["batch_size"])
    per_epoch, samples = -(-num_rows // rows), samples_of(numbers["compute_multiplier"])
    epochs, held_out, interval = (numbers[name] for name in ("n_epochs", "eval_samples", "eval_interval"))
    if epochs == "auto":
        epochs = max(1, round(updates_of(num_rows, rows) / per_epoch))
    if held_out == "auto":
        held_out = DEFAULTS.held_out_samples
    if interval == "auto":
        cost = num_validation * held_out / (rows * samples)  # of an evaluation, in steps
        interval = max(1, math.ceil(epochs * per_epoch / EVALUATIONS), math.ceil(cost / EVALUATION_SHARE))
    return {**numbers, "n_epochs": epochs, "eval_interval": interval, "eval_samples": held_out}


def sections_of(numbers: Record, grader: Path) -> JsonObject:
    """Sections of the recipe that follow from decided numbers and the file of the grader."""
    return {
        "reinforce": {
            "grader": str(grader.resolve()),
            "samples": samples_of(numbers["compute_multiplier"]),
            "held_out_samples": numbers["eval_samples"],
        },
        "evaluation": {"every": numbers["eval_interval"]},
    }


def numbers_of(options: Reinforce, evaluation: EvaluationOptions) -> JsonObject:
    """The numbers that only a reinforcement job has, as its run has them."""
    return {
        "compute_multiplier": options.samples / DEFAULTS.samples,
        "eval_interval": evaluation.every,
        "eval_samples": options.held_out_samples,
        "reasoning_effort": "default",
    }


def sentences_on(numbers: Record) -> Iterator[str]:
    """Sentences that say what the numbers mean here, for the events of the job."""
    times, usual = numbers["compute_multiplier"], DEFAULTS.samples
    samples = samples_of(times)
    yield f"compute_multiplier {times}: {samples} answers are drawn to each prompt of a step; {usual} are usual"
    if not isinstance(times, str) and not LEAST_SAMPLES <= round(usual * times) <= MOST_SAMPLES:
        yield f"compute_multiplier {times:g} is taken as {samples / usual:g}: {samples} answers are the bound"
    yield (
        f"Rewards of the validation file are measured each {numbers['eval_interval']:,} steps, with "
        f"{numbers['eval_samples']} answers to each prompt"
    )
