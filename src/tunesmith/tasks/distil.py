"""The task that learns from a teacher: which token it would write next, and how
likely each other one is to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tunesmith.data.teacher_rows import columns
from tunesmith.errors import RecipeError
from tunesmith.recipe.distillation import SERVED_TOP, TOP, Distil
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
    _check_place(options)
    if recipe.loss != Loss():
        raise RecipeError("loss: label_smoothing and z_loss are for tokens, and a teacher says more. Leave them out.")
    if recipe.data.new_tokens:
        raise RecipeError("data.new_tokens: the teacher has no such tokens. Leave them out.")
    if not options.on_policy and options.max_new_tokens != Distil().max_new_tokens:
        raise RecipeError("distil.max_new_tokens: is for drawn answers. Set distil.on_policy, or leave it out.")
    choices: list[Choice] = []
    if options.top == "auto" and options.is_served:
        reason = "the most that vLLM gives unless it is started with --max-logprobs"
        choices = [Choice("distil.top", SERVED_TOP, reason)]
    elif options.top == "auto":
        choices = [Choice("distil.top", TOP, f"{4 * columns(TOP)} bytes a token")]
    if not options.on_policy:
        return choices
    if recipe.evaluation.surprising not in ("auto", 0):
        raise RecipeError("evaluation.surprising: answers are drawn anew at each step. Leave it out.")
    return [*choices, Choice("evaluation.surprising", 0, "answers are drawn anew at each step")]


def _check_place(options: Distil) -> None:
    """Raise RecipeError for options that the place of the teacher does not take."""
    if not options.is_served:
        given = {"distil.model": options.model, "distil.key_env": options.key_env}
        for key in (key for key, value in given.items() if value):
            rule = "is of a teacher at an address, which begins with http:// or https://"
            raise RecipeError(f"{key}: {given[key]}: {rule}. Leave it out, or write the address so.")
        return
    address = re.sub("//[^/]*@", "//…@", options.teacher or "")  # a password stays out of messages, too
    if not re.match(r"https?://[^/…\s]+", address):
        raise RecipeError(
            f"distil.teacher: {address}: is no address such as http://localhost:8000/v1, without a name and a "
            "password. Name a server that scores prompts (its key by distil.key_env), or a model on this machine."
        )
    if not options.model:
        raise RecipeError(
            "distil.model: is missing: the name of the teacher at its address, as GET ADDRESS/models lists it. Give "
            "--set distil.model=NAME."
        )
    if options.temperature != 1:
        raise RecipeError(
            f"distil.temperature: {options.temperature:g}: a server scores prompts at temperature 1. Leave it out, or "
            "name a model on this machine."
        )


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
