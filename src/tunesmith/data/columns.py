"""Names of fields: those that data.columns may give, and proposals for rows whose names no shape knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from tunesmith.data.formats import FIELDS, FORMATS, SHAPES, find_shape
from tunesmith.errors import RecipeError
from tunesmith.types import Shape, TaskName

MOST_NAMES = 20
"""Fields named in one line."""

_PROPOSED: tuple[Shape, ...] = ("prompt_completion", "document_summary", "tokens_tags", "text_label", "text")
"""Shapes that a row of unknown names may have been meant for, in the order in which they are tried."""
_OFTEN: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "input", "source", "context", "text", "user"),
    "completion": ("answer", "response", "output", "target", "reply", "assistant"),
    "document": ("article", "dialogue", "body", "report", "text", "source", "content", "input", "prompt"),
    "summary": ("highlights", "tldr", "abstract", "target", "output", "completion"),
    "tokens": ("words", "sentence", "text"),
    "tags": ("ner_tags", "pos_tags", "chunk_tags", "labels", "ner", "label"),
    "text": (
        "sentence", "review", "comment", "tweet", "content", "body", "message", "description", "utterance",
        "sentence1", "premise", "question1", "question", "document", "article", "title", "input", "prompt",
    ),
    "label": (
        "labels", "category", "class", "sentiment", "topic", "intent", "emotion", "score", "rating", "target",
        "completion", "output", "answer",
    ),
}  # fmt: skip
"""What else our fields are often called."""


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise `RecipeError` when data.columns names a field that no shape has, or one of the data's twice."""
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            near = difflib.get_close_matches(ours, FIELDS, n=1)
            swapped = f"did you mean {{{theirs}: {ours}}}?" if theirs in FIELDS else f"one of {', '.join(FIELDS)}."
            hint = f"did you mean {near[0]}?" if near else swapped
            raise RecipeError(f"data.columns.{ours}: no shape has such a field, {hint}")
    twice = sorted({theirs for theirs in columns.values() if list(columns.values()).count(theirs) > 1})
    if twice:
        raise RecipeError(f"data.columns: {twice[0]} stands for two fields; a column can be one.")


def explain(record: Mapping[str, Any], task: TaskName | None) -> tuple[str, str, str]:
    """Why a row has no shape that `task` learns from: code, message and way out."""
    shape = find_shape(record)
    if shape is not None and task is not None:
        tasks = " or ".join(name for name, shapes in SHAPES.items() if shape in shapes)
        message = f"its fields are those of task {tasks}, not of {task}: {names(record)}."
        columns = propose(record, SHAPES[task])
        return "other_task", message, (f"Set data.columns: {columns}, or " if columns else "Set ") + f"task: {tasks}."
    columns = propose(record, SHAPES[task] if task else _PROPOSED)
    message = f"no shape {f'of task {task} ' if task else ''}has its fields: {names(record)}."
    if columns:
        return "unknown_shape", message, f"Did you mean data.columns: {columns}?"
    if task:
        takes = ", or ".join(" and ".join(FORMATS[name].REQUIRED) for name in SHAPES[task])
        first = FORMATS[SHAPES[task][-1]].REQUIRED[0]
        return "unknown_shape", message, f"A row has {takes}; name yours by data.columns: {{{first}: ...}}."
    fix = (
        "A row has messages, or conversations, or instruction and output, or prompt and completion, or document and "
        "summary, or text and label, or tokens and tags, or text; "
        "name yours by data.columns, such as {prompt: question, completion: answer}."
    )
    return "unknown_shape", message, fix


def propose(record: Mapping[str, Any], shapes: Iterable[Shape]) -> str:
    """data.columns that would give a row one of some shapes, as it is written; "" if none would."""
    for shape in _PROPOSED:
        if shape not in shapes:
            continue
        found: dict[str, str] = {}
        for ours in FORMATS[shape].REQUIRED:
            theirs = next(
                (name for name in (ours, *_OFTEN[ours]) if name in record and name not in found.values()), None
            )
            if theirs is None or (shape == "tokens_tags" and not isinstance(record[theirs], list)):
                break
            found[ours] = theirs
        else:
            renamed = [f"{ours}: {theirs}" for ours, theirs in found.items() if ours != theirs]
            return f"{{{', '.join(renamed)}}}"
    return ""


def names(record: Iterable[str]) -> str:
    """The names of a row's fields, as many as fit on a line."""
    quoted = [repr(name[:60]) for name in record] or ["none"]
    more = f" and {len(quoted) - MOST_NAMES} more" if len(quoted) > MOST_NAMES else ""
    return ", ".join(quoted[:MOST_NAMES]) + more
