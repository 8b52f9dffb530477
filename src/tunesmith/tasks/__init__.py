"""Tasks. To add one: a file here, a row below, its name in `types.TASK_NAMES`, its shapes in `data.formats.SHAPES`.

The rows import nothing heavy: torch and models come in when a loss is computed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.data.formats import SHAPES
from tunesmith.errors import RecipeError
from tunesmith.recipe.schema import Loss, Recipe, resolved
from tunesmith.tasks.embed import EMBED
from tunesmith.tasks.losses import PLAIN, token_measure
from tunesmith.tasks.prefer import PREFER
from tunesmith.tasks.scores import RANK, REWARD
from tunesmith.tasks.texts import CHAT, CLASSIFY, GENERATE, SUMMARIZE, TAG, TEXT
from tunesmith.types import TASK_NAMES, Labels, Task, TaskName

if TYPE_CHECKING:
    from tunesmith.models.fused_loss import OutputLayer

TASKS: dict[TaskName, Task] = {
    task.name: task for task in (CHAT, GENERATE, TEXT, SUMMARIZE, CLASSIFY, TAG, PREFER, REWARD, EMBED, RANK)
}
"""By name. `bind` gives a task its classes and losses before it is trained."""


def register(task: Task) -> None:
    """Add a task from outside of this package: recipes and data formats then know its name."""
    TASKS[task.name] = task
    SHAPES.setdefault(task.name, task.shapes)
    if task.name not in TASK_NAMES:
        TASK_NAMES.append(task.name)


def has_look(recipe: Recipe) -> bool:
    """Whether the rows of a step are looked at before they are learnt, see `Task.look`."""
    task = TASKS[resolved(recipe.task)]
    return bool(task.section) and task.looks(getattr(recipe, task.section))


def bind(
    name: TaskName,
    labels: Labels | None,
    loss: Loss = PLAIN,
    output: OutputLayer | None = None,
    *,
    recipe: Recipe | None = None,
) -> Task:
    """The task as it is trained: with the classes of its data and the additions of `loss`; its `measure` keeps the
    plain loss. `output`: the output layer of a model that learns tokens, if losses can be computed in pieces.
    `recipe`: for the options of a task that has a section of its own; None: their defaults.

    Raises:
        RecipeError: what `loss` adds is not defined for such labels.
    """
    task = TASKS[name]
    if task.section:
        options = getattr(recipe or Recipe(), task.section)
        how = {"options": options, **({"output": output} if task.compares else {})}
        found: dict[str, Any] = {key: partial(getattr(task, key), **how) for key in ("loss_sum", "measure")}
        found["look"] = partial(task.look, **how) if task.look and task.looks(options) else None
        found["text_measure"] = partial(token_measure, output=output) if task.compares else None
        return replace(task, **found)
    if task.learns_classes:
        if labels is None:
            raise AssertionError(f"{name} cannot be trained before its labels are decided")
        for option in ("label_smoothing", "z_loss"):
            if labels.kind in ("many", "number") and getattr(loss, option):
                what = "numbers" if labels.kind == "number" else "classes of which several can hold"
                raise RecipeError(f"loss.{option}: is for one class of several; these labels are {what}. Leave it out.")
        task = replace(
            task, loss_sum=partial(task.loss_sum, labels=labels), measure=partial(task.measure, labels=labels)
        )
    added: dict[str, Any] = {} if output is None else {"output": output}
    if output is not None and task.measure is token_measure:
        task = replace(task, measure=partial(token_measure, output=output))
    if loss.label_smoothing or loss.z_loss:
        added["loss"] = loss
    return replace(task, loss_sum=partial(task.loss_sum, **added)) if added else task
