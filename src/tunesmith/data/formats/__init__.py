"""The shapes that a row can have, found by the names of its fields. To add one: a file, and a row in FORMATS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.formats import (
    alpaca,
    document_summary,
    messages,
    preference,
    prompt_completion,
    ranked_documents,
    scored_answers,
    sharegpt,
    text,
    text_label,
    text_pairs,
    tokens_tags,
    unpaired,
)
from tunesmith.types import Shape, TaskName

FORMATS: dict[Shape, Any] = {
    module.NAME: module
    for module in (
        scored_answers,
        preference,
        unpaired,
        text_pairs,
        ranked_documents,
        messages,
        sharegpt,
        alpaca,
        prompt_completion,
        document_summary,
        text_label,
        tokens_tags,
        text,
    )
}
"""Each has NAME, FIELDS it knows, those REQUIRED, INPUTS that are enough for an answer, and parse(record, source,
answered=); one that needs other fields than REQUIRED has matches(record). The first match counts."""

COMPARED: tuple[Shape, ...] = ("preference", "unpaired", "scored_answers")
SEARCHED: tuple[Shape, ...] = ("text_pairs", "ranked_documents")
_KNOWN = sorted(FORMATS.values(), key=lambda module: module.NAME in (*COMPARED, *SEARCHED))
FIELDS = tuple(dict.fromkeys(field for module in _KNOWN for field in module.FIELDS))
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
    "embed": ("text_pairs",),
    "rank": ("ranked_documents",),
}
"""Shapes that a task learns from."""


def matches(shape: Shape, record: Mapping[str, Any]) -> bool:
    """Whether a row has the fields of a shape."""
    own = getattr(FORMATS[shape], "matches", None)
    return bool(own(record)) if own else all(field in record for field in FORMATS[shape].REQUIRED)


def find_shape(record: Mapping[str, Any], *, task: TaskName | None = None, answered: bool = True) -> Shape | None:
    """The shape whose fields a row has, of those that `task` learns from; None if it has those of no shape.

    Without answers, the fields that are enough to predict decide.
    """
    for name in SHAPES[task] if task else FORMATS:
        if matches(name, record) if answered else all(field in record for field in FORMATS[name].INPUTS):
            return name
    return None
