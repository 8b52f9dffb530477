"""Names of fields: what data.columns may give, proposals for unknown names, and fields that may be classes."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from tunesmith.data.formats import FIELDS, FORMATS, SHAPES, find_shape
from tunesmith.data.problems import names
from tunesmith.data.read import read
from tunesmith.errors import DataError, RecipeError
from tunesmith.phrases import did_you_mean
from tunesmith.recipe.schema import Data
from tunesmith.types import Shape, TaskName

_PROPOSED: tuple[Shape, ...] = (
    "prompt_completion", "document_summary", "tokens_tags", "text_label", "text", "text_pairs",
)  # fmt: skip
"""Shapes that a row of unknown names may have been meant for, in the order in which they are tried."""
_USUAL: tuple[Shape, ...] = ("messages", "sharegpt", "alpaca", *_PROPOSED, "preference")
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
    "anchor": ("query", "question", "prompt", "sentence1", "text", "premise", "title"),
    "positive": ("answer", "passage", "document", "sentence2", "text_pair", "hypothesis", "body"),
}  # fmt: skip
"""Other common names of our fields."""
_PLAIN = re.compile(r"[A-Za-z_][\w .()/-]*")


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
    fields = FORMATS[SHAPES[task][-1]].required if task else ("prompt", "completion")
    own = paste(dict(zip(fields, [*(name for name in record if len(name) < 40), "...", "..."], strict=False)))
    takes = ", or ".join(" and ".join(FORMATS[name].required) for name in (SHAPES[task] if task else _USUAL))
    return "unknown_shape", message, f"A row has {takes}; name yours, such as {own}."


def propose(record: Mapping[str, Any], shapes: Iterable[Shape]) -> dict[str, str]:
    """data.columns that would give a row one of some shapes; empty if none would."""
    for shape in _PROPOSED:
        if shape not in shapes:
            continue
        found: dict[str, str] = {}
        for ours in FORMATS[shape].required:
            near = difflib.get_close_matches(ours, record, 1, 0.8)
            theirs = next(
                (name for name in (ours, *_OFTEN[ours], *near) if name in record and name not in found.values()), None
            )
            if theirs is None or (shape == "tokens_tags" and not isinstance(record[theirs], list)):
                break
            found[ours] = theirs
        else:
            return {ours: theirs for ours, theirs in found.items() if ours != theirs}
    return {}


def paste(columns: Mapping[str, str], *, task: str | None = None) -> str:
    """The options to add to a command, quoted for a shell."""
    names = {
        theirs: theirs if _PLAIN.fullmatch(theirs) else json.dumps(theirs, ensure_ascii=False)
        for theirs in columns.values()
    }
    listed = ", ".join(f"{ours}: {names[theirs]}" for ours, theirs in columns.items())
    words = [f"--set task={task}"] if task else []
    return " ".join([*words, f"--set {shlex.quote(f'data.columns={{{listed}}}')}"])


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
