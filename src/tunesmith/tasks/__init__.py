"""Tasks. To add one: a file here, a row below, its name in `types.TASK_NAMES`, its
shapes in `data.formats.SHAPES`.

The rows import nothing heavy: torch and models come in when a loss is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.data.formats import SHAPES
from tunesmith.recipe.schema import Loss, Recipe, resolved
from tunesmith.tasks.distil import DISTIL
from tunesmith.tasks.embed import EMBED
from tunesmith.tasks.prefer import PREFER
from tunesmith.tasks.reinforce import REINFORCE
from tunesmith.tasks.scores import RANK, REWARD
from tunesmith.tasks.task import PLAIN_LOSS, BoundTask, Task, Terms
from tunesmith.tasks.texts import CHAT, CLASSIFY, GENERATE, SUMMARIZE, TAG, TEXT
from tunesmith.types import TASK_NAMES, Labels, TaskName

if TYPE_CHECKING:
    from tunesmith.models.fused_loss import OutputLayer

TASKS: dict[TaskName, Task] = {
    task.name: task
    for task in (CHAT, GENERATE, TEXT, SUMMARIZE, CLASSIFY, TAG, PREFER, REWARD, REINFORCE, DISTIL, EMBED, RANK)
}
"""By name. `bind` gives a task its losses before it is trained."""


def register(task: Task) -> None:
    """Add a task from outside of this package: recipes and data formats then know its name."""
    TASKS[task.name] = task
    SHAPES.setdefault(task.name, task.shapes)
    if task.name not in TASK_NAMES:
        TASK_NAMES.append(task.name)


def has_prepass(recipe: Recipe) -> bool:
    """Whether the rows of a step go through the model before they are learnt, see `task.Prepass`."""
    section = TASKS[resolved(recipe.task)].section
    return section is not None and section.has_prepass(getattr(recipe, section.name))


def partner_tokens(recipe: Recipe) -> int | None:
    """Most tokens of a prompt and another row's answer behind it, for rows that need such partners; None: they
    need none. The loss is decided by now."""
    if not TASKS[resolved(recipe.task)].compares or not has_prepass(recipe):
        return None
    return resolved(recipe.data.max_tokens)


def bind(
    name: TaskName,
    labels: Labels | None,
    loss: Loss = PLAIN_LOSS,
    output: OutputLayer | None = None,
    *,
    recipe: Recipe | None = None,
    vocabulary: int = 0,
) -> BoundTask:
    """The task as it is trained, see `Terms`. `recipe`: for the options of a task that has a
    section of its own; None: their defaults.

    Raises:
        RecipeError: what `loss` adds is not defined for such labels.
    """
    return BoundTask.of(TASKS[name], Terms(labels, loss, output, recipe or Recipe(), vocabulary))
