"""The task that learns from a teacher: which token it would write next, and how
likely each other one is to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tunesmith.errors import RecipeError
from tunesmith.recipe.distillation import Distil
from tunesmith.recipe.schema import Loss
from tunesmith.tasks.distil_losses import losses_of
from tunesmith.tasks.task import OwnSection, Task
from tunesmith.tasks.texts import CHAT
from tunesmith.types import Choice, TaskName

if TYPE_CHECKING:
    from tunesmith.models.resolve_model import ModelRef
    from tunesmith.recipe.schema import Recipe


def task_by_teacher(task: TaskName | Literal["auto"], teacher: str | None) -> Choice | None:
    """The task where a teacher is given without one. Raises RecipeError for a teacher that another task has."""
    if teacher is None or task == DISTIL.name:
        return None
    if task != "auto":
        raise RecipeError(f"distil.teacher: {teacher}: task {task} has no teacher. Use --task distil, or leave it out.")
    return Choice("task", DISTIL.name, "a teacher is given")


def _check(recipe: Recipe, located: ModelRef) -> Sequence[Choice]:
    """Raise RecipeError for what the task needs, and for options that do nothing here."""
    options = recipe.distil
    if options.teacher is None:
        raise RecipeError(
            "distil.teacher: is missing: the model to learn from, with the same vocabulary. Give --teacher MODEL."
        )
    if "://" in options.teacher:
        raise RecipeError(
            f"distil.teacher: {options.teacher}: a teacher at an address gives no probabilities here. Name a model "
            "on this machine; or let it write answers, and train on these by task chat; or let it grade answers as a "
            "`score_model`, by task reinforce."
        )
    if recipe.devices not in ("auto", 1):
        raise RecipeError(f"devices: {recipe.devices}: task distil trains on one device. Use devices: 1.")
    if recipe.loss != Loss():
        raise RecipeError("loss: label_smoothing and z_loss are for tokens, and a teacher says more. Leave them out.")
    if recipe.data.new_tokens:
        raise RecipeError("data.new_tokens: the teacher has no such tokens. Leave them out.")
    if not options.on_policy and options.max_new_tokens != Distil().max_new_tokens:
        raise RecipeError("distil.max_new_tokens: is for drawn answers. Set distil.on_policy, or leave it out.")
    if not options.on_policy:
        return ()
    if recipe.evaluation.surprising not in ("auto", 0):
        raise RecipeError("evaluation.surprising: answers are drawn anew at each step. Leave it out.")
    return (Choice("evaluation.surprising", 0, "answers are drawn anew at each step"),)


DISTIL = Task(
    name="distil",
    doc="What a teacher finds likely at each token of an answer.",
    purpose="answer as its teacher does",
    shapes=CHAT.shapes,
    heads={"causal": "next_token"},
    losses=losses_of,
    encoder=CHAT.encoder,
    sees_rows=True,
    record=CHAT.record,
    is_chat=True,
    writes_answers=True,
    answer_key="answer",
    headline_metrics=("loss", "agreement"),
    next_commands=CHAT.next_commands,
    outcome="taught",
    section=OwnSection("distil", from_model=_check),
)
