"""The shapes of rows, found by the names of its fields. To add one: a `Format`, a row in FORMATS."""

from __future__ import annotations

from tunesmith.data.formats.chats import ALPACA, MESSAGES, PROMPT_COMPLETION, SHAREGPT
from tunesmith.data.formats.comparisons import PREFERENCE, SCORED_ANSWERS, UNPAIRED
from tunesmith.data.formats.format import Format
from tunesmith.data.formats.prompts import PROMPTS
from tunesmith.data.formats.texts import (
    DOCUMENT_SUMMARY,
    RANKED_DOCUMENTS,
    TEXT,
    TEXT_LABEL,
    TEXT_PAIRS,
    TOKENS_TAGS,
)
from tunesmith.types import Record, Shape, TaskName

FORMATS: dict[Shape, Format] = {
    row_format.name: row_format
    for row_format in (
        SCORED_ANSWERS, PREFERENCE, UNPAIRED, TEXT_PAIRS, RANKED_DOCUMENTS, MESSAGES, SHAREGPT, ALPACA,
        PROMPT_COMPLETION, DOCUMENT_SUMMARY, TEXT_LABEL, TOKENS_TAGS, TEXT, PROMPTS,
    )
}  # fmt: skip
"""The first that matches a row counts."""
NAMED: tuple[Shape, ...] = ("prompts",)
"""Shapes that are only looked for where the task is named: other shapes have their fields too."""

COMPARED: tuple[Shape, ...] = ("preference", "unpaired", "scored_answers")
SEARCHED: tuple[Shape, ...] = ("text_pairs", "ranked_documents")
_KNOWN = sorted(FORMATS.values(), key=lambda row_format: row_format.name in (*COMPARED, *SEARCHED))
FIELDS = tuple(dict.fromkeys(field for row_format in _KNOWN for field in row_format.fields))
"""Every field that a shape knows: what data.columns may name."""

CHATS: tuple[Shape, ...] = ("messages", "sharegpt", "alpaca", "prompt_completion")
SHAPES: dict[TaskName, tuple[Shape, ...]] = {
    "chat": CHATS,
    "generate": CHATS,  # of which it takes those that are plain pairs, and says so row by row
    "text": ("text",),
    "summarize": ("document_summary",),
    "classify": ("text_label",),
    "tag": ("tokens_tags",),
    "prefer": ("preference", "unpaired", *CHATS),  # of which it takes preferences, and answers all
    "reward": ("scored_answers", "preference"),
    "reinforce": ("prompts",),
    "distil": CHATS,
    "embed": ("text_pairs",),
    "rank": ("ranked_documents",),
}
"""Shapes that a task learns from."""
TwoTexts = tuple[tuple[str, str], str]
"""Fields of two texts of a row, and what is learnt from them, in words."""
ANSWERED: TwoTexts = ("prompt", "completion"), "to answer `{0}` with `{1}`"
WRITTEN: TwoTexts = ("prompt", "completion"), "to write `{1}` from `{0}`"
PAIR_TASKS: dict[TaskName, TwoTexts] = {
    "chat": ANSWERED,
    "distil": ANSWERED,
    "generate": WRITTEN,
    "summarize": (("document", "summary"), "to sum up `{0}` as `{1}`"),
    "embed": (("anchor", "positive"), "that `{1}` belongs to `{0}`"),
}
"""Tasks that learn from two texts of a row."""


def task_of_rows(shape: Shape) -> TaskName:
    """The task that the first row decides where none is given; all other rows are read for it. chat covers
    generate too, which learns from the same shapes."""
    return next(task for task, shapes in SHAPES.items() if shape in shapes)


def learns_chats(task: TaskName | None) -> bool:
    """Whether a task learns from conversations and from answers to prompts; None: it may turn out to."""
    return task is None or SHAPES[task] == CHATS


def matches(shape: Shape, record: Record) -> bool:
    """Whether a row has the fields of a shape."""
    row_format = FORMATS[shape]
    if row_format.matches:
        return row_format.matches(record)
    return all(field in record for field in row_format.required)


def find_shape(record: Record, *, task: TaskName | None = None, answered: bool = True) -> Shape | None:
    """The shape whose fields a row has, among the shapes that `task` learns from; None if no shape fits.

    Without answers, the fields that are enough to predict decide.
    """
    for name in SHAPES[task] if task else (name for name in FORMATS if name not in NAMED):
        if matches(name, record) if answered else all(field in record for field in FORMATS[name].inputs):
            return name
    return None
