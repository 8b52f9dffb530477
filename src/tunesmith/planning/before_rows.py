"""What is decided of a run from its model and its first row, before the rows can be encoded."""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.data.columns import ask_text_or_classes
from tunesmith.data.splits import first_example
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.models import machine
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.size import UNBOUNDED, ModelSize
from tunesmith.planning import advise
from tunesmith.planning.advise import with_choice
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import TASKS
from tunesmith.types import Choice, HeadName, ModelKind, TaskName


def decide_before_rows(
    recipe: Recipe, located: ModelRef, size: ModelSize, kind: ModelKind
) -> tuple[Recipe, list[Choice]]:
    """What has to be known before rows can be encoded: task, method, device, longest row."""
    limit = size.max_tokens
    if recipe.data.max_tokens != "auto" and recipe.data.max_tokens > limit:
        raise ModelError(
            f"{located.name}: data.max_tokens is {recipe.data.max_tokens:,}, but the model can attend to {limit:,} "
            "tokens. Lower it."
        )
    choices: list[Choice] = []

    def choose(key: str, rule: Callable[[], Choice]) -> None:
        nonlocal recipe
        section, _, name = key.rpartition(".")
        value = getattr(getattr(recipe, section) if section else recipe, name)
        if value == "auto" or getattr(value, "name", None) == "auto":
            choices.append(rule())
            recipe = with_choice(recipe, choices[-1])

    choose("task", lambda: _choose_task(recipe, kind))
    choose("method", lambda: advise.choose_method(size.num_params))
    choose("device", lambda: machine.choose_device("auto"))
    task: TaskName = resolved(recipe.task)
    choose("data.max_tokens", lambda: advise.choose_longest(task, kind, limit, unbounded=UNBOUNDED))
    choose("data.too_long", lambda: advise.choose_too_long(task))
    if recipe.data.prompt is not None and not TASKS[task].has_prompt:
        raise RecipeError(f"data.prompt: is for the task summarize; this is {task}. Leave it out.")
    if recipe.loss.neftune_alpha and kind == "encoder_decoder":
        raise RecipeError("loss.neftune_alpha: is for models that read one text; this one reads two. Leave it out.")
    if task == "text" and kind == "causal":
        choose("data.stride", lambda: advise.choose_stride(resolved(recipe.data.max_tokens)))
    return recipe, choices


_KINDS: dict[ModelKind, str] = {
    "causal": "a causal model",
    "encoder": "an encoder",
    "encoder_decoder": "an encoder–decoder",
}


def _choose_task(recipe: Recipe, kind: ModelKind) -> Choice:
    """The task of the first row. Raises DataError where only the person can tell."""
    choice = advise.choose_task(first_example(recipe.data), kind)
    if choice.value == "text" and (question := ask_text_or_classes(recipe.data)):
        raise DataError(question)
    return choice


def find_head(recipe: Recipe, located: ModelRef, kind: ModelKind) -> HeadName:
    """The head that the task needs on a model of this kind. Raises ModelError where it cannot learn the task."""
    heads = TASKS[resolved(recipe.task)].heads
    if kind not in heads:
        others = " or ".join(_KINDS[name] for name in heads)
        can = ", ".join(name for name, task in TASKS.items() if kind in task.heads)
        raise ModelError(
            f"{located.name}: {_KINDS[kind]} cannot learn the task {recipe.task}. "
            f"Use {others}, or one of the tasks that it can learn: {can}."
        )
    return heads[kind]
