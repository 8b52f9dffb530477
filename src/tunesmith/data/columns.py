"""Columns with other names than our fields: what they hold, which of them can be read as our fields at once,
and hints for the others. See docs/guide/data.md, "Other names"."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from tunesmith.data.addresses import is_address
from tunesmith.data.formats import FORMATS, PAIR_TASKS, SHAPES, WRITTEN, find_shape, learns_chats, task_of_rows
from tunesmith.data.formats.other_names import (
    ANSWER_NAMES,
    LABEL_NAMES,
    NAMES_ABOUT,
    QUESTION_NAMES,
    SPEAKER_NAMES,
    TEXT_NAMES,
)
from tunesmith.data.problems import as_yaml, names, paste
from tunesmith.data.read import read
from tunesmith.errors import DataError, WayOut
from tunesmith.phrases import did_you_mean, nearest, set_words
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import JsonObject, Problem, Record, Shape, Source, TaskName

SAMPLE_ROWS, SAMPLE_CHARS, SAMPLE_COLUMNS = 500, 4_000_000, 200
"""The part of a file that is looked at: rows, characters of all, fields of a row."""
COLUMN_SAMPLE = 1000
"""Characters of a value that are looked at."""
FEW_COLUMN_ROWS = 20
"""Rows below which values that differ may be classes all the same."""
LONGEST_NAME = 80
"""Characters of a column's name that a hint repeats."""
MOST_SUGGESTED = 2
MOST_COLUMNS = 1000
"""Names that a misspelt one is compared with."""

Values = Literal["text", "label", "number", "name", "other"]
"""Contents of a column. label: few values that repeat; name: short texts that differ; other: a counter, dates,
addresses, ids, one value, nothing, or what is neither text nor number."""

_OF_CLASSES, _OF_TEXTS, _OF_PAIRS = map(task_of_rows, ("text_label", "text", "prompt_completion"))
"""The tasks of rows with a class, of texts alone, and of texts with answers, where no task is named."""
_IS_ID = re.compile(r"(?i:(^|[\W_])(id|nr|no|uuid|guid))$|[a-z]I[dD]$")
_OTHER = re.compile(
    r"[a-z][a-z0-9+.-]*://\S+|www\.\S+|\S+@\S+\.\S+|[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}|[0-9a-f]{16,}"
    r"|\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T ]\d.*)?|\d{1,2}:\d\d(:\d\d)?",
    re.IGNORECASE,
)
"""Values of addresses, mail addresses, UUIDs, hashes, dates and times."""
_ID = re.compile(r"\w{0,6}[-_#]?\d{2,}")
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Meaning:
    """Columns, by our name for each, and what is learnt from them."""

    columns: dict[str, str]
    learns: str
    """After "To learn": Stimmung of Bewertung."""
    task: TaskName | None = None
    """None: the one that is detected."""
    by_number: bool = False

    def __str__(self) -> str:
        number_kind = " --set data.label_kind=number" if self.by_number else ""
        return f"To learn {self.learns}: {paste(self.columns, task=self.task)}{number_kind}."

    @property
    def way(self) -> WayOut:
        """Its options, for a button."""
        task = {"task": self.task} if self.task else {}
        kind = {"data.label_kind": "number"} if self.by_number else {}
        return WayOut({**task, "data.columns": as_yaml(self.columns), **kind}, f"Learn {self.learns}")

    @property
    def said(self) -> str:
        return ", ".join(f"{theirs!r} is read as {ours}" for ours, theirs in self.columns.items() if ours != theirs)


def sample(rows: Iterable[Record]) -> list[JsonObject]:
    """The first rows, until one that cannot be read. To bound memory, only the first fields of a row are taken,
    and the beginnings of texts."""
    shortened: list[JsonObject] = []
    num_chars = 0
    with suppress(DataError):  # which is said when its rows are read
        for row in itertools.islice(rows, SAMPLE_ROWS):
            fields = itertools.islice(row.items(), SAMPLE_COLUMNS)
            cut = {name: value[:COLUMN_SAMPLE] if isinstance(value, str) else value for name, value in fields}
            shortened.append(cut)
            num_chars += sum(len(value) if isinstance(value, str) else 100 for value in cut.values())
            if num_chars > SAMPLE_CHARS:
                break
    return shortened


def sample_of(file: DataFile, data: Data) -> list[JsonObject]:
    """The first rows of a file or folder; none where it cannot be read."""
    return sample(row for _, row, _ in read([file], limits=data.limits, on_problem=_ignore, how=data.reading))


def _ignore(problem: Problem) -> None:
    """Ignore a problem: it is reported when rows are read to be used."""


def values_of(rows: Sequence[Record]) -> dict[str, Values]:
    """The contents of each column of a sample, by its values. Columns whose names nobody would type are left
    out."""
    columns = dict.fromkeys(name for row in rows for name in row if len(name) <= LONGEST_NAME)
    return {name: "other" if _IS_ID.search(name) else _values([row.get(name) for row in rows]) for name in columns}


def _values(column: Sequence[Any]) -> Values:
    filled = [value for value in column if value not in (None, "", [])]
    of_lists = [entry for value in filled if isinstance(value, list) for entry in value]
    texts = [str(value).strip() for value in of_lists or filled]
    if not texts or not all(isinstance(value, (str, int, float)) for value in of_lists or filled):
        return "other"
    if len(set(texts)) == 1 < len(texts) or _share(_OTHER, texts) > 0.9:
        return "other"
    if _repeat(texts) or of_lists:  # of lists any number of classes hold
        return "label" if _repeat(texts) else "other"
    if _share(_NUMBER, texts) == 1:
        are_whole = not any(set(text) & set(".,") for text in texts)
        return "other" if are_whole and len(set(texts)) == len(texts) else "number"  # a counter, or numbers
    if _share(_OTHER, texts) + _share(_ID, texts) > 0.9 or len(set(texts)) * 2 < len(texts):
        return "other"
    num_words, num_chars = sum(len(text.split()) for text in texts), sum(map(len, texts))
    return "text" if num_words >= 4 * len(texts) or num_chars >= 25 * len(texts) else "name"


def _share(pattern: re.Pattern[str], texts: Sequence[str]) -> float:
    return sum(pattern.fullmatch(text) is not None for text in texts) / max(1, len(texts))


def _repeat(texts: Sequence[str]) -> bool:
    """Whether texts are few and short and repeat: each twice on average, numbers three times."""
    times = 3 if _share(_NUMBER, texts) == 1 else 2
    distinct = set(texts)
    return 2 <= len(distinct) <= 200 and len(distinct) * times <= len(texts) and max(map(len, distinct)) <= 60


def _length(rows: Sequence[Record], name: str) -> float:
    return sum(len(row[name]) for row in rows if isinstance(row.get(name), str)) / max(1, len(rows))


def meanings(rows: Sequence[Record], task: TaskName | None) -> list[Meaning]:
    """Guess what rows with unknown fields are for: at most two meanings, likeliest first; none if values do not
    say."""
    kinds = values_of(rows)
    by: dict[Values, list[str]] = {}
    for name, kind in kinds.items():
        by.setdefault(kind, []).append(name)
    texts, labels, names = by.get("text", []), by.get("label", []), by.get("name", [])
    if not texts and names:  # a phrase each
        texts = [max(names, key=lambda name: _length(rows, name))]
        names = [name for name in names if name not in texts]
    if not texts:
        return []
    longest = max(texts, key=lambda name: _length(rows, name))
    labels = sorted(labels, key=lambda name: _plain(name) not in LABEL_NAMES)
    short = [name for name in names if _plain(name) not in NAMES_ABOUT]
    maybe = short if len(rows) < FEW_COLUMN_ROWS else []
    classes = [_class_of(longest, name) for name in labels or maybe]
    numbers = [_class_of(longest, name, by_number=True) for name in by.get("number", [])]
    pair = [name for name in kinds if name in (texts if len(texts) > 1 else [*texts, *short])]
    if len(pair) > 2:
        pair = sorted(sorted(pair, key=lambda name: -_length(rows, name))[:2], key=list(kinds).index)
    both = [_pair(pair[0], pair[1], task), _pair(pair[1], pair[0], task)] if len(pair) == 2 else []
    named = {_plain(name): name for name in kinds}
    if (usual := _usual_pair(named, None)) and {"prompt", "completion"} == usual.columns.keys():
        first, second = usual.columns.values()
        rest = [name for name in texts if name not in (first, second)]
        both = [_pair(first, second, task), _pair(second, first, task)]
        if rest and learns_chats(task):
            columns = {"instruction": first, "input": rest[0], "output": second}
            both = [Meaning(columns, f"to write `{second}` from `{first}` and `{rest[0]}`"), *both]
    alone = [Meaning({"text": longest}, f"the text of `{longest}` itself", _OF_TEXTS)]
    if task == _OF_CLASSES:
        ordered = classes or numbers
    elif task == _OF_TEXTS:
        ordered = alone
    elif task is not None:
        ordered = both[:1] if task in PAIR_TASKS else []
    elif labels:
        ordered = [*classes[:1], *(both[:1] if len(texts) > 1 else classes[1:] or alone)]
    else:
        ordered = [*classes[:1], *both] if classes else [*both, *numbers, *alone]
    return ordered[:MOST_SUGGESTED]


def _pair(first: str, second: str, task: TaskName | None) -> Meaning:
    fields, learns = PAIR_TASKS.get(task or "", WRITTEN)
    return Meaning(dict(zip(fields, (first, second), strict=True)), learns.format(first, second))


def _class_of(text: str, label: str, *, by_number: bool = False) -> Meaning:
    what = "the number" if by_number else "the class"
    return Meaning({"text": text, "label": label}, f"{what} `{label}` of `{text}`", _OF_CLASSES, by_number)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def usual_meaning(rows: Sequence[Record], task: TaskName | None) -> Meaning | None:
    """Map fields with the usual names of other tools to ours; None where the values do not make it clear."""
    if not rows or _is_whole(rows[0], task):
        return None
    kinds, named = values_of(rows), dict[str, str]()
    for name in kinds:
        named.setdefault(_plain(name), name)
    if len(named) < len(kinds):  # two names that differ by a sign
        return None
    chat = _usual_pair(named, task)
    meaning = chat or _usual_classes(named, kinds, task)
    if meaning is None:
        return None
    used = set(meaning.columns.values())
    if any(not isinstance(row.get(name), str) for row in rows for name in used) and chat:
        return None
    # Another text may be what matters: the user decides.
    other_texts = [name for name in kinds if name not in used and kinds[name] == "text"]
    return meaning if all(_plain(name) in NAMES_ABOUT for name in other_texts) else None


def _is_whole(row: Record, task: TaskName | None) -> bool:
    """Whether a row has every field that a shape needs, by our names."""
    shape = find_shape(row, task=task)
    if shape in ("alpaca", "prompt_completion"):  # which are known by one of their fields
        return all(field in row for field in FORMATS[shape].required)
    return shape is not None or find_shape(row) not in (None, "text", "alpaca", "prompt_completion")


def _usual_pair(named: Mapping[str, str], task: TaskName | None) -> Meaning | None:
    if not learns_chats(task):
        return None
    pairs = [pair for pair in (*SPEAKER_NAMES, *QUESTION_NAMES) if all(name in named for name in pair)]
    answers = [name for name in ANSWER_NAMES if name in named] if "instruction" in named else []
    if len(pairs) + len(answers) != 1:
        return None
    rest = {"system": named["system"]} if "system" in named else {}
    if answers:
        extra = {"input": extra_name} if (extra_name := named.get("input", named.get("context"))) else {}
        columns = {"instruction": named["instruction"], **extra, "output": named[answers[0]], **rest}
    elif rest or pairs[0] in SPEAKER_NAMES:
        columns = {"instruction": named[pairs[0][0]], "output": named[pairs[0][1]], **rest}
    else:
        columns = dict(zip(("prompt", "completion"), map(named.__getitem__, pairs[0]), strict=True))
    return Meaning(columns, "the answers")


def _usual_classes(named: Mapping[str, str], kinds: Mapping[str, Values], task: TaskName | None) -> Meaning | None:
    texts = [named[name] for name in TEXT_NAMES if name in named and kinds[named[name]] in ("text", "name")]
    if task == _OF_TEXTS:
        return Meaning({"text": texts[0]}, "the text itself", _OF_TEXTS) if len(texts) == 1 else None
    labels = [named[name] for name in LABEL_NAMES if name in named and kinds[named[name]] == "label"]
    if task not in (None, _OF_CLASSES) or len(labels) != 1 or (task is None and "text" in named):
        return None
    title = named.get("title", "")
    fields = ("text", "text_pair") if len(texts) == 2 and title in texts else ("text",)
    if len(texts) != len(fields):
        return None
    texts.sort(key=lambda name: name != title)
    columns = {**dict(zip(fields, texts, strict=True)), "label": labels[0]}
    return Meaning(columns, f"the class `{labels[0]}`", _OF_CLASSES)


TURNS = ("messages", "conversations")
"""Fields that hold a conversation."""
_USUAL: tuple[Shape, ...] = (
    "messages", "sharegpt", "alpaca", "prompt_completion", "document_summary", "tokens_tags", "text_label", "text",
    "text_pairs", "preference",
)  # fmt: skip


def explain(record: Record, task: TaskName | None, suggested: str, columns: Mapping[str, str]) -> tuple[str, str, str]:
    """Why a row has no shape that `task` learns from: code, message and way out. `suggested`: the meanings of
    its file."""
    shape = find_shape(record)
    near = [did_you_mean(theirs, list(record)[:MOST_COLUMNS]) for theirs in columns.values() if theirs not in record]
    if any(near):
        suggested = f"data.columns has another name.{next(filter(None, near))}"
    if shape is not None and task is not None:
        tasks = " or ".join(name for name, shapes in SHAPES.items() if shape in shapes)
        message = f"its fields belong to task {tasks}, not to {task}: {names(record)}."
        return "other_task", message, f"Give --task {tasks.split()[0]}. {suggested}".strip()
    wanted = [FORMATS[name].required for name in (SHAPES[task] if task else _USUAL)]
    message = f"no shape of rows {f'of task {task} ' if task else ''}has these fields: {names(record)}."
    misspelt = _misspelt(tuple(record)[:MOST_COLUMNS], tuple(wanted))
    if misspelt and not any(ours in TURNS and _is_prose(record[theirs]) for ours, theirs in misspelt.items()):
        way = f"Correct the name, or add {paste(misspelt)}."
        return "unknown_shape", message, f"Did you mean {', '.join(misspelt)}? {way}"
    takes = ", or ".join(map(" and ".join, wanted))
    if not suggested and (nested := next((name for name, value in record.items() if isinstance(value, dict)), None)):
        suggested = f"{nested!r} is an object: write its texts as fields of the row."
    lists = {name: value for name, value in record.items() if isinstance(value, list) and len(value) > 1}
    of_objects = [name for name in lists if all(isinstance(entry, dict) for entry in lists[name][:MOST_COLUMNS])]
    if not suggested and of_objects:
        suggested = f"{of_objects[0]!r} is a list of objects: if they are the rows, give a file of that list alone."
    fields = ", ".join(f"{ours}: ..." for ours in (wanted[-1] if task else ("prompt", "completion")))
    takes = f"A row has {takes}; name yours by --set 'data.columns={{{fields}}}'."
    return "unknown_shape", message, suggested or takes


def _is_prose(value: Any) -> bool:
    """Whether a value is a text, and not a list in JSON, as a cell of a table may be."""
    return isinstance(value, str) and not value.lstrip().startswith("[")


@lru_cache(maxsize=1)  # rows of a file mostly have the same fields
def _misspelt(given: tuple[str, ...], wanted: tuple[tuple[str, ...], ...]) -> dict[str, str]:
    """The names of the first shape's fields that are likely misspelt, and how they are spelt."""
    for fields in wanted:
        near = {ours: theirs for ours in fields if (theirs := nearest(ours, given, 0.8)) is not None}
        if len(near) == len(fields):
            return {ours: theirs for ours, theirs in near.items() if ours != theirs}
    return {}


def ask_text_or_classes(data: Data) -> DataError | None:
    """The question to the user if the rows of a file are text, and have what may be its class; else None."""
    text = data.columns.get("text", "text")
    for file in data.train:
        rows = sample_of(file, data)
        if not rows:
            continue
        renamed = {ours: rows[0][theirs] for ours, theirs in data.columns.items() if theirs in rows[0]}
        if find_shape({**rows[0], **renamed}) != "text":
            continue
        kinds = {name: kind for name, kind in values_of(rows).items() if name != text}
        few = len(rows) < FEW_COLUMN_ROWS
        labels = [name for name, kind in kinds.items() if kind == "label"]
        labels = [name for name in labels if few or _plain(name) not in NAMES_ABOUT]
        labels.sort(key=lambda name: _plain(name) not in LABEL_NAMES)
        labels += [name for name in kinds if _plain(name) in LABEL_NAMES and name not in labels]
        texts = [name for name, kind in kinds.items() if few and kind in ("name", "text")]
        maybe = [name for name in texts if _plain(name) not in NAMES_ABOUT]
        if label := next(iter([*labels, *maybe]), None):
            of_class, of_text = _class_of(text, label), WayOut({"task": _OF_TEXTS}, "Learn the text itself")
            return DataError(
                f"{file.path}: the rows are text, and have {label!r}. Is the text to be learnt, or its class? "
                f"{of_class} To learn the text itself: {set_words(of_text.settings)}.",
                ways=[of_class.way, of_text],
            )
    return None


def usual_columns(data: Data, task: TaskName | None) -> tuple[dict[str, str], str] | None:
    """data.columns, and how each column is read, where none are given and files have the usual names of other
    tools.

    None: no column has to be renamed, or it is not clear which, or files differ. Without a task the first file
    decides for all.
    """
    if data.columns:
        return None
    columns: dict[str, str] = {}
    notes: list[str] = []
    for file in (*data.train, *data.replay, *data.eval):
        rows = sample_of(file, data)
        meaning = usual_meaning(rows, task)
        if task is None and rows:
            shape = find_shape(rows[0])
            task = meaning.task or _OF_PAIRS if meaning else task_of_rows(shape) if shape else None
        if meaning is None:
            continue
        if any(columns.get(ours, theirs) != theirs for ours, theirs in meaning.columns.items()):
            return None
        columns |= meaning.columns
        notes.append(f"{file.path}: {meaning.said}")
    return (columns, "; ".join(notes)) if columns else None


def absent_columns(data: Data) -> list[Problem]:
    """A problem for each name in data.columns that no row of any local file has, with the nearest one."""
    absent, seen = dict(data.columns), dict[str, None]()
    files = [file for file in (*data.train, *data.replay, *data.eval) if not is_address(file.at)]
    if not absent or len(files) < len(data.train) + len(data.replay) + len(data.eval):
        return []
    for file in files:
        with suppress(DataError):
            for _, row, _ in read([file], limits=data.limits, on_problem=_ignore, how=data.reading):
                absent = {ours: theirs for ours, theirs in absent.items() if theirs not in row}
                if not absent:
                    return []
                if len(seen) < MOST_COLUMNS and not row.keys() <= seen.keys():
                    seen.update(dict.fromkeys(itertools.islice(row, MOST_COLUMNS - len(seen))))
    where = Source(files[0].path, 0)
    return [
        Problem(
            where, "columns_unused", f"no row has {theirs!r}, which data.columns.{ours} names.", _near(theirs, seen)
        )
        for ours, theirs in absent.items()
        if seen
    ]


def _near(name: str, names: Iterable[str]) -> str:
    return did_you_mean(name, names).strip() or f"There are: {', '.join(map(repr, itertools.islice(names, 20)))}."
