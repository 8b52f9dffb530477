"""Names of fields: what data.columns may give, ways out for unknown names, and fields that may be classes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from tunesmith.data.formats import FIELDS, FORMATS, SHAPES, find_shape
from tunesmith.data.problems import names, paste
from tunesmith.data.read import read
from tunesmith.errors import DataError, RecipeError
from tunesmith.phrases import did_you_mean
from tunesmith.recipe.schema import Data
from tunesmith.types import Shape, TaskName

_USUAL: tuple[Shape, ...] = (
    "messages", "sharegpt", "alpaca", "prompt_completion", "document_summary", "tokens_tags", "text_label", "text",
    "text_pairs", "preference",
)  # fmt: skip


def check_column_names(columns: Mapping[str, str]) -> None:
    """Raise `RecipeError` when data.columns names a field that no shape has, or one of the data's twice."""
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            swapped = f" Did you mean {{{theirs}: {ours}}}?" if theirs in FIELDS else f" One of {', '.join(FIELDS)}."
            raise RecipeError(f"data.columns.{ours}: no shape has such a field.{did_you_mean(ours, FIELDS) or swapped}")
    twice = sorted({theirs for theirs in columns.values() if list(columns.values()).count(theirs) > 1})
    if twice:
        raise RecipeError(f"data.columns: {twice[0]} is named for two fields; a column can be one.")


def explain(record: Mapping[str, Any], task: TaskName | None) -> tuple[str, str, str]:
    """Why a row has no shape that `task` learns from: code, message and way out."""
    shape, fields = find_shape(record), FORMATS[SHAPES[task][-1]].required if task else ("prompt", "completion")
    own = paste(dict(zip(fields, [*(name for name in record if len(name) < 40), "...", "..."], strict=False)))
    if shape is not None and task is not None:
        tasks = " or ".join(name for name, shapes in SHAPES.items() if shape in shapes)
        message = f"its fields are those of task {tasks}, not of {task}: {names(record)}."
        return "other_task", message, f"Add --set task={tasks.split()[0]}, or name your fields, such as {own}."
    takes = ", or ".join(" and ".join(FORMATS[name].required) for name in (SHAPES[task] if task else _USUAL))
    message = f"no shape {f'of task {task} ' if task else ''}has its fields: {names(record)}."
    return "unknown_shape", message, f"A row has {takes}; name yours, such as {own}."


_CLASSES = ("labels", "category", "class", "sentiment", "topic", "intent", "emotion", "rating")
"""Fields next to a text that nearly always hold its class."""


def ask_text_or_classes(data: Data) -> str | None:
    """The question to the user if the first row of a file is text, and has a field that is often a class; else None."""
    text = data.columns.get("text", "text")
    for file in data.train:
        with suppress(DataError):  # which is said when its rows are read
            for _, record, _ in islice(read([file], limits=data.limits, on_problem=lambda problem: None), 1):
                renamed = {ours: record[theirs] for ours, theirs in data.columns.items() if theirs in record}
                label = next((name for name in _CLASSES if name in record and name != text), None)
                if label is not None and find_shape({**record, **renamed}) == "text":
                    columns = paste({"text": text, "label": label}, task="classify")
                    return (
                        f"{file.path}: the rows are text, and have {label!r}. Is the text to be learnt, or its class? "
                        f"To learn the class: {columns}. To learn the text itself: --set task=text."
                    )
    return None
