"""Names of fields: what data.columns may give, proposals for unknown names, and columns that look like classes."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from tunesmith.data.detect_format import FileFacts
from tunesmith.data.formats import FIELDS, FORMATS, SHAPES, find_shape
from tunesmith.data.problems import names, near
from tunesmith.data.read import read
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Problem, Shape, TaskName

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
"""Other common names of our fields."""


_ASKED = ("prompt", "instruction")
_WELL_KNOWN: tuple[tuple[Mapping[str, str], set[str]], ...] = (
    ({"instruction": "instruction", "input": "context", "output": "response"}, set()),  # Dolly
    ({"prompt": "question", "completion": "answer"}, {"context", "passage", "choices", "options"}),
    ({"prompt": "user", "completion": "assistant"}, {"context"}),
)
"""Names that are read without data.columns: ours to theirs, and fields that rule this out, since answers need them."""
_PLAIN = re.compile(r"[A-Za-z_][\w .()/-]*")


def check_column_names(columns: Mapping[str, str]) -> None:
    """Raise `RecipeError` when data.columns names a field that no shape has, or one of the data's twice."""
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            near = difflib.get_close_matches(ours, FIELDS, n=1)
            swapped = f"did you mean {{{theirs}: {ours}}}?" if theirs in FIELDS else f"one of {', '.join(FIELDS)}."
            hint = f"did you mean {near[0]}?" if near else swapped
            raise RecipeError(f"data.columns.{ours}: no shape has such a field, {hint}")
    twice = sorted({theirs for theirs in columns.values() if list(columns.values()).count(theirs) > 1})
    if twice:
        raise RecipeError(f"data.columns: {twice[0]} is named for two fields; a column can be one.")


def explain(record: Mapping[str, Any], task: TaskName | None) -> tuple[str, str, str]:
    """Why a row has no shape that `task` learns from: code, message and way out."""
    shape = find_shape(record)
    if shape is not None and task is not None:
        tasks = " or ".join(name for name, shapes in SHAPES.items() if shape in shapes)
        message = f"its fields are those of task {tasks}, not of {task}: {names(record)}."
        columns = propose(record, SHAPES[task])
        ways = ([paste(columns)] if columns else []) + [f"--set task={tasks.split()[0]}"]
        return "other_task", message, f"Add {', or '.join(ways)}."
    columns = propose(record, SHAPES[task] if task else _PROPOSED)
    message = f"no shape {f'of task {task} ' if task else ''}has its fields: {names(record)}."
    if columns:
        return "unknown_shape", message, f"Did you mean {paste(columns)}?"
    if task:
        takes = ", or ".join(" and ".join(FORMATS[name].REQUIRED) for name in SHAPES[task])
        first = FORMATS[SHAPES[task][-1]].REQUIRED[0]
        return "unknown_shape", message, f"A row has {takes}; name yours by --set 'data.columns={{{first}: ...}}'."
    fix = (
        "A row has messages, or conversations, or instruction and output, or prompt and completion, or document and "
        "summary, or text and label, or tokens and tags, or text; "
        "name yours, such as --set 'data.columns={prompt: question, completion: answer}'."
    )
    return "unknown_shape", message, fix


def propose(record: Mapping[str, Any], shapes: Iterable[Shape]) -> dict[str, str]:
    """data.columns that would give a row one of some shapes; empty if none would."""
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
            return {ours: theirs for ours, theirs in found.items() if ours != theirs}
    return {}


def paste(columns: Mapping[str, str], *, task: str | None = None) -> str:
    """The options to add to a command, quoted for a shell."""
    listed = ", ".join(f"{ours}: {_quoted(theirs)}" for ours, theirs in columns.items())
    words = [f"--set task={task}"] if task else []
    return " ".join([*words, f"--set {shlex.quote(f'data.columns={{{listed}}}')}"])


def _quoted(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def preferred_label(name: str) -> int:
    """The place of a column's name among those that classes often have; behind them where it is none."""
    often = ("label", *_OFTEN["label"])
    return often.index(name.lower()) if name.lower() in often else len(often)


def read_as(record: Mapping[str, Any], task: TaskName | None, *, answered: bool) -> Mapping[str, str]:
    """Our names of the fields, to theirs, where a row has the ones of a well-known data set; else empty."""
    if task is not None and "prompt_completion" not in SHAPES[task]:
        return {}
    for columns, others in _WELL_KNOWN:
        needed = [theirs for ours, theirs in columns.items() if ours != "input" and (answered or ours in _ASKED)]
        if not answered and "input" in columns:
            needed.append(columns["input"])
        own = set(FIELDS) - set(columns.values())
        if all(name in record for name in needed) and not record.keys() & (own | others):
            return {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    return {}


ROWS_LOOKED_AT = 1000
MOST_VALUES = 100
"""Different values that a column of classes has at most among those rows; and half as many as there are rows."""
MOST_CHARS = 60
ALONE = 50
"""Rows without any other field, after which none is expected: documents can be long."""
LISTED = 4
_OTHERS: tuple[Shape, ...] = ("prompt_completion", "document_summary", "tokens_tags", "text_label")


def check_columns_exist(data: Data) -> None:
    """Raise `RecipeError` where data.columns names a field that no row of any file has.

    Files are read until every name is found: in nearly all data the first row, in a table the header.
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


def ask_text_or_classes(data: Data) -> str | None:
    """The question to the user if rows of text have a column that looks like classes; None if they do not."""
    for file in data.train:
        try:
            found = class_columns(file, data)
        except DataError:  # which is said when its rows are read
            continue
        if found:
            return _question(file.path, found, data)
    return None


def class_columns(file: DataFile, data: Data, text: str | None = None) -> dict[str, list[str]]:
    """Columns next to the text with few values that repeat, the likeliest first, with their values.

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
    """The hint for a row that can only be text under another name, if a column of its file looks like classes."""
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
        f"class: {paste(columns, task='classify')}. To learn the text itself: --set task=text.{note}"
    )


def _ignore(problem: Problem) -> Any:
    return None
