"""What can be learnt. To add a task: one file here and one row below."""

from __future__ import annotations

from tunesmith.tasks.chat import CHAT
from tunesmith.tasks.generate import GENERATE
from tunesmith.types import Task, TaskName

TASKS: dict[TaskName, Task] = {"chat": CHAT, "generate": GENERATE}
