"""Names of fields: those that data.columns may give, and proposals for rows whose names no shape knows."""

from __future__ import annotations

import difflib
import json
import re
import shlex
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


_ASKED = ("prompt", "instruction")
_WELL_KNOWN: tuple[tuple[Mapping[str, str], set[str]], ...] = (
    ({"instruction": "instruction", "input": "context", "output": "response"}, set()),  # Dolly
    ({"prompt": "question", "completion": "answer"}, {"context", "passage", "choices", "options"}),
    ({"prompt": "user", "completion": "assistant"}, {"context"}),
)
"""Names that are read without being asked for: ours to theirs, and fields beside which the answer would lack them."""
_PLAIN = re.compile(r"[A-Za-z_][\w .()/-]*")


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
    """What to add to a command, as a shell takes it."""
    listed = ", ".join(f"{ours}: {_quoted(theirs)}" for ours, theirs in columns.items())
    words = [f"--set task={task}"] if task else []
    return " ".join([*words, f"--set {shlex.quote(f'data.columns={{{listed}}}')}"])


def _quoted(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def near(name: str, others: Iterable[str]) -> str:
    """ "Did you mean ...?" for a name that is not there; "" where none is like it."""
    found = difflib.get_close_matches(name, list(others), n=1)
    return f"Did you mean {found[0]}?" if found else ""


def preferred_label(name: str) -> int:
    """The place of a column's name among those that classes often have; behind them where it is none."""
    often = ("label", *_OFTEN["label"])
    return often.index(name.lower()) if name.lower() in often else len(often)


def read_as(record: Mapping[str, Any], task: TaskName | None, *, answered: bool) -> Mapping[str, str]:
    """Our names of the fields, to theirs, where a row has the ones of a well-known data set; else empty."""
    if task not in (None, "chat", "generate"):
        return {}
    for columns, others in _WELL_KNOWN:
        needed = [theirs for ours, theirs in columns.items() if ours != "input" and (answered or ours in _ASKED)]
        if not answered and "input" in columns:
            needed.append(columns["input"])
        own = set(FIELDS) - set(columns.values())
        if all(name in record for name in needed) and not record.keys() & (own | others):
            return {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    return {}


def names(record: Iterable[str]) -> str:
    """The names of a row's fields, as many as fit on a line."""
    quoted = [repr(name[:60]) for name in record] or ["none"]
    more = f" and {len(quoted) - MOST_NAMES} more" if len(quoted) > MOST_NAMES else ""
    return ", ".join(quoted[:MOST_NAMES]) + more
