"""Text beside a column of few values: classes or plain text is the person's choice, and not made in silence."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from tunesmith.data.columns import names, near, paste, preferred_label, propose
from tunesmith.data.formats import find_shape
from tunesmith.data.opening import FileFacts
from tunesmith.data.read import read
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Problem, Shape

ROWS_LOOKED_AT = 1000
MOST_VALUES = 100
"""Different values that a column of classes has at most among those rows; and half as many as there are rows."""
MOST_CHARS = 60
ALONE = 50
"""Rows without any other field, after which none is expected: documents can be long."""
LISTED = 4
_OTHERS: tuple[Shape, ...] = ("prompt_completion", "document_summary", "tokens_tags", "text_label")


def refuse_unknown_columns(data: Data) -> None:
    """Raise `RecipeError` where data.columns names a field that no row of any file has.

    Files are read until every name was found: in nearly all data, their first row. Of a table the header tells.
    """
    missing = {theirs: ours for ours, theirs in data.columns.items()}
    seen: dict[str, None] = {}
    for file in (*data.train, *data.eval, *data.replay) if missing else ():
        facts: list[FileFacts] = []
        try:
            for _, record, _ in read([file], limits=data.limits, on_problem=_ignore, facts=facts):
                for name in record:
                    missing.pop(name, None)
                    if len(seen) < ROWS_LOOKED_AT:
                        seen[name] = None
                if not missing or facts[-1].columns is not None:
                    break
        except DataError:  # which is said when its rows are read
            return
        if not missing:
            return
    for theirs, ours in missing.items():
        hint = near(theirs, seen) or f"There are: {names(seen)}."
        raise RecipeError(f"data.columns.{ours}: no row has a field {theirs!r}. {hint}")


def ask_for_task(data: Data) -> str | None:
    """What to ask where rows of text have a column that looks like classes; None if they do not."""
    for file in data.train:
        try:
            found = class_columns(file, data)
        except DataError:  # which is said when its rows are read
            continue
        if found:
            return _question(file.path, found, data)
    return None


def class_columns(file: DataFile, data: Data, text: str | None = None) -> dict[str, list[str]]:
    """Columns beside the text whose values are few and come again, the likeliest first, with their values.

    `text`: the column that holds the text; None: that of the rows' own shape, where it is `text`. Raises `DataError`.
    """
    values: dict[str, dict[str, int]] = {}
    num_rows = 0
    for _, record, _ in islice(read([file], limits=data.limits, on_problem=_ignore), ROWS_LOOKED_AT):
        if text is None:
            renamed = {ours: record[theirs] for ours, theirs in data.columns.items() if theirs in record}
            shape = find_shape({**record, **renamed})
            if shape != "text":
                return {}
        num_rows += 1
        if num_rows == ALONE and not values:
            return {}
        for name, value in record.items():
            if name in (text or data.columns.get("text", "text"), "text_pair"):
                continue
            for label in value if isinstance(value, list) else [value]:
                if isinstance(label, str | int | float) and str(label).strip():
                    counts = values.setdefault(name, {})
                    if len(counts) <= MOST_VALUES:
                        counts[str(label)] = counts.get(str(label), 0) + 1
    most = min(MOST_VALUES, num_rows // 2)
    few = {
        name: sorted(counts)
        for name, counts in values.items()
        if 2 <= len(counts) <= most and max(map(len, counts)) <= MOST_CHARS
    }
    return {name: few[name] for name in sorted(few, key=lambda name: (preferred_label(name), len(few[name])))}


def describe(found: Mapping[str, list[str]]) -> str:
    """The columns with some of their values."""
    return "; ".join(
        f"{name!r} has {len(values)} values ({', '.join(values[:LISTED])}{', ...' if len(values) > LISTED else ''})"
        for name, values in islice(found.items(), LISTED)
    )


def hint_for_text(record: Mapping[str, Any], file: DataFile, data: Data) -> str:
    """What to say of a row that can only be text by another name, where a column of its file looks like classes."""
    columns = propose(record, ("text",))
    if not columns or propose(record, _OTHERS):
        return ""
    try:
        found = class_columns(file, data, text=columns["text"])
    except DataError:
        return ""
    if not found:
        return ""
    label = next(iter(found))
    return (
        f"{describe(found)}. Did you mean {paste({**columns, 'label': label}, task='classify')}, to learn the class, "
        f"or {paste(columns, task='text')}, to learn the text?"
    )


def _question(path: str, found: Mapping[str, list[str]], data: Data) -> str:
    label = next(iter(found))
    columns = {"text": data.columns.get("text", "text"), "label": label}
    several = next((value for value in found[label] if "|" in value), None)
    note = (
        f" Each different value is one class, {several!r} too: for several classes a row, write lists in JSON lines."
        if several
        else ""
    )
    return (
        f"{path}: the rows are text, and {describe(found)}. Is the text to be learnt, or its class? To learn the "
        f"class: {paste(columns, task='classify')}. To learn the text as it stands: --set task=text.{note}"
    )


def _ignore(problem: Problem) -> Any:
    return None
