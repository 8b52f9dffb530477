"""What can be learnt. To add a task: one file here and one row below."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.models.output import Output
from tunesmith.recipe.knobs import Loss
from tunesmith.tasks._losses import PLAIN
from tunesmith.tasks.chat import CHAT
from tunesmith.tasks.classify import classify
from tunesmith.tasks.generate import GENERATE
from tunesmith.tasks.summarize import SUMMARIZE
from tunesmith.tasks.tag import tag
from tunesmith.tasks.text import TEXT
from tunesmith.types import Labels, Task, TaskName

_WITH_LABELS = {"classify": classify, "tag": tag}

TASKS: dict[TaskName, Task] = {
    "chat": CHAT,
    "generate": GENERATE,
    "text": TEXT,
    "summarize": SUMMARIZE,
    "classify": classify(Labels("one")),
    "tag": tag(Labels("tags")),
}
"""Those with classes are bound to them by `bind` before they are used."""


def bind(name: TaskName, labels: Labels | None, loss: Loss = PLAIN, output: Output | None = None) -> Task:
    """The task as it is trained: with the classes that its data has, and with what `loss` adds in training; what is
    measured stays the plain loss. `output`: that of a model that learns tokens, if it is known.

    Raises:
        RecipeError: what `loss` adds is not defined for such labels.
    """
    if name not in _WITH_LABELS:
        task = TASKS[name]
    elif labels is None:
        raise AssertionError(f"{name} cannot be trained before its labels are decided")
    else:
        task = _WITH_LABELS[name](labels)
        for knob in ("label_smoothing", "z_loss"):
            if labels.kind in ("many", "number") and getattr(loss, knob):
                what = "numbers" if labels.kind == "number" else "classes of which several can hold"
                raise RecipeError(f"loss.{knob}: is for one class of several; these labels are {what}. Leave it out.")
    added: dict[str, Any] = {} if output is None else {"output": output}
    if loss.label_smoothing or loss.z_loss:
        added["loss"] = loss
    return replace(task, loss_sum=partial(task.loss_sum, **added)) if added else task
