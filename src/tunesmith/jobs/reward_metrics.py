"""Steps and evaluations of a reinforcement job by OpenAI's names: data of its events, and its results file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tunesmith.graders.openai_object import ERRORS
from tunesmith.types import REWARD_KEY, Event, JsonObject, Record

TRAINING_KEY, VALIDATION_KEY = "train_mean_reward", "full_valid_mean_reward"
"""OpenAI's names of the mean reward of a step and of the validation file."""
_USUAL = (
    "step", TRAINING_KEY, VALIDATION_KEY, "completion_tokens_mean", "reasoning_tokens_mean",
    "mean_unresponsive_rewards",
)  # fmt: skip


def of_step(run_event: Event) -> JsonObject:
    """Metrics of a step. Answers have no tokens of reasoning apart; what is not measured is left out."""
    values, timing = run_event.values, run_event.timing
    scores = [{"name": name, "train_reward_mean": mean} for name, mean in values.get("scores", {}).items()]
    names = {"sampling": "draw", "grading": "grade", "full_iteration": "seconds"}
    seconds = {theirs: timing[ours] for theirs, ours in names.items() if timing.get(ours) is not None}
    return {
        **_row(run_event),
        "scores": {"train_reward_mean": values[REWARD_KEY], "graders": scores},
        "errors": {f"train_{name}_count": num for name, num in _errors(values).items()},
        "timing": {"step": seconds},
    }


def of_evaluation(run_event: Event) -> JsonObject:
    """Metrics of the validation file."""
    reward = run_event.values["measures"][REWARD_KEY]["value"]
    return {VALIDATION_KEY: reward, "scores": {"valid_reward_mean": reward}}


def table(run_events: Iterable[Event]) -> tuple[Sequence[str], list[JsonObject]]:
    """Columns and lines of the results file: parts of a multi grader and errors have
    columns where there are any."""
    rows: dict[int, JsonObject] = {}
    more: dict[str, None] = {}
    for run_event in run_events:
        if run_event.kind == "step":
            parts = {
                f"scores/graders/{name}/train_reward_mean": mean
                for name, mean in run_event.values.get("scores", {}).items()
            }
            parts |= {f"errors/train_{name}_count": num for name, num in _errors(run_event.values).items()}
            more |= dict.fromkeys(parts)
            rows[run_event.step] = {**_row(run_event), **parts}
        elif run_event.kind == "evaluation" and run_event.step in rows:
            rows[run_event.step][VALIDATION_KEY] = run_event.values["measures"][REWARD_KEY]["value"]
    return (*_USUAL, *more), list(rows.values())


def _row(run_event: Event) -> JsonObject:
    values = run_event.values
    return {
        "step": run_event.step,
        TRAINING_KEY: values[REWARD_KEY],
        "completion_tokens_mean": values["answer_tokens"],
        "reasoning_tokens_mean": 0.0,
        "mean_unresponsive_rewards": sum(values.get("unscored", {}).values()) / values["answers"],
    }


def _errors(values: Record) -> dict[str, int]:
    """Answers of a step without a reward, and those without the JSON that is read, by OpenAI's name of the error."""
    errors: dict[str, int] = {}
    for kind, num in values.get("unscored", {}).items():
        errors[ERRORS[kind]] = errors.get(ERRORS[kind], 0) + num
    if unread := values.get("unread", 0):  # these have a reward, the lowest one
        errors[ERRORS["not_json"]] = unread
    return errors
