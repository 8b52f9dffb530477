"""What can be learnt. To add a task: one file here and one row below."""

from __future__ import annotations

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


def bind(name: TaskName, labels: Labels | None) -> Task:
    """The task as it is trained: with the classes that its data has."""
    if name not in _WITH_LABELS:
        return TASKS[name]
    if labels is None:
        raise AssertionError(f"{name} cannot be trained before its labels are decided")
    return _WITH_LABELS[name](labels)
