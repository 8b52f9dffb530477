"""The task that learns from rewards of the model's own answers: what a reward is compared with, and
by what a step's loss is divided."""

# G answers of a group

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tunesmith.errors import RecipeError
from tunesmith.phrases import plural
from tunesmith.recipe.reinforcement import USUAL_PROMPTS, Reinforce, updates_of
from tunesmith.recipe.schema import EvaluationOptions
from tunesmith.tasks.policy_losses import losses_of
from tunesmith.tasks.task import OwnSection, Rates, Task
from tunesmith.types import REWARD_KEY, Choice, JsonObject, TaskName

if TYPE_CHECKING:
    from tunesmith.models.resolve_model import ModelRef
    from tunesmith.recipe.schema import Recipe

LEAST_DEVIATION = 1e-4
"""Added to a standard deviation by which is divided, as in GRPO."""


def advantages(groups: Sequence[Sequence[float]], options: Reinforce) -> list[list[float]]:
    """The advantage of every answer of a step, whose rewards come group by group;
    one without a reward is in none.

    r − mean, times G / (G − 1) with `leave_one_out` (Ahmadian et al. 2024, arXiv 2402.14740),
    over the deviation that `scale` names. A group of equal rewards has none: exactly 0,
    whatever rounding says of its deviation.
    """
    rewards = [reward for group in groups for reward in group]
    of_step = _deviation(rewards)
    of_groups: list[list[float]] = []
    for group in groups:
        if not has_spread(group):
            of_groups.append([0.0] * len(group))
            continue
        centre, times = math.fsum(group) / len(group), 1.0
        if options.baseline == "leave_one_out":
            times = len(group) / (len(group) - 1)
        if options.scale != "none":
            times /= (_deviation(group) if options.scale == "group" else of_step) + LEAST_DEVIATION
        of_groups.append([(reward - centre) * times for reward in group])
    return of_groups


def has_spread(group: Sequence[float]) -> bool:
    """Whether a group says which of its answers is better."""
    return len(group) > 1 and min(group) < max(group)


def _deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    centre = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def divisor(tokens: Sequence[int], options: Reinforce) -> float:
    """The divisor of a step's loss, from the tokens of all its answers, also where they teach nothing."""
    if options.normalize == "tokens":
        return float(sum(tokens))
    return float(len(tokens) * (options.max_new_tokens if options.normalize == "constant" else 1))


def epochs_of(wanted: int | Literal["auto"], prompts: int) -> tuple[float, str]:
    """The value of `train.epochs: auto`, of so many prompts in an epoch: as many as make `UPDATES` steps, or
    once over all of them if that is more."""
    per_step = min(REINFORCE.rows_per_step if wanted == "auto" else int(wanted), prompts)
    per_epoch = -(-prompts // per_step)
    steps = updates_of(prompts, per_step)
    return steps / per_epoch, f"{steps:,} updates of {plural(per_step, 'prompt')}"


def task_by_grader(task: TaskName | Literal["auto"], grader: str | None) -> Choice | None:
    """The task where a grader is given without one. Raises RecipeError for a grader that another task has."""
    if grader is None or task == REINFORCE.name:
        return None
    if task != "auto":
        raise RecipeError(
            f"reinforce.grader: {grader}: task {task} has no grader. Use --task reinforce, or leave it out."
        )
    return Choice("task", REINFORCE.name, "a grader is given")


def _check(recipe: Recipe, located: ModelRef) -> Sequence[Choice]:
    """Raise RecipeError for what the task needs, and for options that do nothing here."""
    options = recipe.reinforce
    if options.grader is None:
        raise RecipeError(
            "reinforce.grader: is missing: it says what a good answer is. Give --grader file.py, and try it "
            "first: tunesmith grade DATA --grader file.py --model MODEL"
        )
    if recipe.data.columns:
        raise RecipeError(
            "data.columns: rows of task reinforce are read as they are, since the grader reads them too. Name "
            "the field prompt or messages in the file."
        )
    if recipe.data.replay:
        raise RecipeError("data.replay: prompts have no answers that could be replayed. Leave it out.")
    if recipe.evaluation.surprising not in ("auto", 0):
        raise RecipeError("evaluation.surprising: a prompt without an answer has no loss. Leave it out.")
    if recipe.evaluation.sample_tokens != EvaluationOptions().sample_tokens:
        raise RecipeError(
            f"evaluation.sample_tokens: {recipe.evaluation.sample_tokens}: held-out answers are drawn like "
            "those that are learnt. Set reinforce.max_new_tokens, or leave it out."
        )
    if recipe.shard is True:
        raise RecipeError(
            "shard: true: answers cannot be drawn while layers are split over devices: each token would have "
            "to gather all of them. Use method qlora, or a smaller base."
        )
    if options.kl and recipe.method.name == "full":
        raise RecipeError(
            f"reinforce.kl: {options.kl:g}: needs the untouched model, and full tuning keeps no copy of it. Use "
            "method lora, or leave it out and lower optim.lr."
        )
    return ()


def _record(text: str, answer: str | None = None) -> JsonObject:
    return {"messages": [{"role": "user", "content": text}], **({} if answer is None else {"reference": answer})}


REINFORCE = Task(
    name="reinforce",
    doc="What a grader rewards in the model's own answers.",
    purpose="win rewards",
    shapes=("prompts",),
    heads={"causal": "next_token"},
    losses=losses_of,
    encoder="tunesmith.data.prompts:PromptEncoder",
    record=_record,
    is_chat=True,
    writes_answers=True,
    answer_key="answer",
    on_overlong=("error", "an answer needs its whole prompt"),
    headline_metrics=(REWARD_KEY, "pass_1"),
    next_commands=(("chat", "--compare"), ("serve",), ("show",)),
    samples=True,
    outcome="graded",
    rows_per_step=USUAL_PROMPTS,
    rates=Rates(adapter=(2e-4, 2e-5), full=(1e-5, 1e-6)),
    section=OwnSection("reinforce", from_model=_check),
)
