"""Rows as examples: fields renamed, a file's shape found on its first good row. See docs/guide/data.md."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from tunesmith.data.addresses import is_address
from tunesmith.data.columns import Meaning, explain, meanings, sample
from tunesmith.data.detect_format import FileFacts
from tunesmith.data.formats import CHATS, COMPARED, FIELDS, FORMATS, NAMED, SEARCHED, SHAPES, find_shape, matches
from tunesmith.data.formats.comparisons import differ_in_space_alone
from tunesmith.data.formats.row_images import IMAGE_FIELDS
from tunesmith.data.images import BadImage, look_at
from tunesmith.data.problems import RowProblems, names, refusal
from tunesmith.data.read import OnProblem, read, reread
from tunesmith.errors import DataError, InputError, RecipeError
from tunesmith.phrases import did_you_mean
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Example, JsonObject, Problem, Record, Shape, Source, TaskName


def warnings_of(example: Example) -> Iterator[Problem]:
    """Warnings: sides that differ in white space alone, and a text, not an answer, without any."""
    if len(example.branches) == 2 and example.shape in COMPARED and differ_in_space_alone(example):
        message = "chosen and rejected differ in white space alone."
        yield _warning(example, "space_only", message, "The model would learn to write white space.")
    parts = example.parts if example.shape != "tokens_tags" else ()
    has_text = [bool(part.text.strip() or part.images or part.role == "assistant") for part in parts]
    blank = has_text.index(False) if False in has_text else None
    if blank is not None:
        turn = f"message {blank + 1} ({parts[blank].role})" if example.shape in CHATS else parts[blank].role
        yield _warning(example, "empty_text", f"{turn} has no text.", "")


def _warning(example: Example, code: str, message: str, fix: str) -> Problem:
    return Problem(example.source, code, message, fix, severity="warning")


MOST_IGNORED = 1000
"""Ignored fields remembered of a file: a row's fields are the data's choice, they must not fill the memory."""


def examples(
    files: Sequence[DataFile],
    data: Data,
    on_problem: OnProblem,
    *,
    facts: list[FileFacts] | None = None,
    task: TaskName | None = None,
    answered: bool = True,
    keep: Sequence[str] | None = None,
) -> Iterator[tuple[int, Example]]:
    """Yield index of the file and example of every usable row; problems of other rows go to `on_problem`.

    `facts` is filled with what is known of each file, as by `read`. Only the shapes that `task` learns from are
    looked for. Not `answered`: what is to be predicted may be missing and is not read; an example then holds
    what it is predicted from, and in `kept` the fields `keep` and the row's own answer as `reference`; None:
    nothing.

    Raises:
        InputError: the first row lacks a field to keep.
        RecipeError: data.columns names a field that no shape has.
        DataError: a file cannot be read, see `read`; or the columns of a table fit no shape.
    """
    check_column_names(data.columns)
    known: list[FileFacts] = [] if facts is None else facts
    of_file: FileExamples | None = None
    index = -1
    for i, record, source in read(files, limits=data.limits, on_problem=on_problem, facts=known, how=data.reading):
        if of_file is None or i != index:
            if of_file is not None:
                of_file.finish()
            index, of_file = i, FileExamples(known[-1], data, on_problem, task, answered, keep)
        example = of_file.example(record, source)
        if example is not None:
            yield i, example
    if of_file is not None:
        of_file.finish()


@dataclass
class FileExamples:
    """The rows of one file on their way to examples."""

    facts: FileFacts
    data: Data
    on_problem: OnProblem
    task: TaskName | None
    answered: bool
    keep: Sequence[str] | None = None
    shape: Shape | None = None
    many: bool | None = None
    """Whether the labels of its rows are lists."""
    ignored: dict[str, Source] = field(default_factory=dict)
    """Fields that are not used, with the first place of each."""
    mapped: set[str] = field(default_factory=set)
    """Our names in data.columns whose fields rows have."""
    suggested: list[Meaning] | None = None
    """Guesses at the meaning of rows without a known shape; None until such a row was read."""

    def example(self, record: JsonObject, source: Source) -> Example | None:
        raw = record
        renamed = self._renamed(record, source) if self.data.columns else record
        if renamed is None:
            return None
        record = renamed
        shape = self.shape
        if shape is None or not matches(shape, record):
            shape = self._shape(record, source)
            if shape is None:
                return None
        form = FORMATS[shape]
        problems = self._too_many(record, source, form.fields) if shape in (*CHATS, *COMPARED, *NAMED) else []
        problems += _unplaced_images(record, source, shape)
        parsed = problems or form.parse(record, source, answered=self.answered)
        if isinstance(parsed, Example) and shape == "text_label" and self.answered:
            parsed = self._of_one_kind(parsed)
        if isinstance(parsed, Example) and parsed.images:
            parsed = self._looked_at(parsed)
        if not isinstance(parsed, Example):
            for problem in parsed:
                self.on_problem(problem)
            return None
        if shape not in NAMED and (unknown := [name for name in record if name not in form.fields]):
            self._ignore(unknown, source)
        if self.keep is not None:
            parsed = replace(parsed, kept=self._kept(self.keep, raw, record, source, shape))
        self.shape = shape
        for problem in warnings_of(parsed):
            self.on_problem(problem)
        return parsed

    def _kept(
        self, keep: Sequence[str], raw: JsonObject, record: JsonObject, source: Source, shape: Shape
    ) -> JsonObject:
        """Fields as the file has them, and the row's own answer."""
        if self.shape is None and (lacking := [name for name in keep if name not in raw]):
            words = f"the first row has no such field.{did_you_mean(lacking[0], raw)} There are: {names(raw)}."
            raise InputError(f"{source}: --keep {lacking[0]}: {words}")
        fields = {name: raw.get(name) for name in keep}
        reference = _reference(record, shape, source)
        return fields if reference is None else {**fields, "reference": reference}

    def _of_one_kind(self, example: Example) -> Example | list[Problem]:
        """The example, if its label is a list or not as those before it."""
        if self.many is None:
            self.many = example.many
        if self.many == example.many:
            return example
        words = ("one class", "a list") if self.many else ("a list", "one class")
        message = f"label is {words[0]}, but in the rows before it is {words[1]}."
        fix = "Write every label as a list, or none."
        return [Problem(example.source, "mixed_labels", message, fix)]

    def _looked_at(self, example: Example) -> Example | list[Problem]:
        """The example, with hash and size of each of its images."""
        limits, problems, parts = self.data.limits, RowProblems(example.source), []
        if len(example.images) > limits.images:
            message = f"it has {len(example.images)} images, more than data.limits.images, which is {limits.images}."
            problems.add("too_many_images", message, "Split the row, or raise the limit.")
            return problems.problems
        for part in example.parts:
            images = []
            for place, image in part.images:
                try:
                    images.append((place, look_at(image, self._image_folder, limits)))
                except BadImage as bad:
                    problems.add(bad.code, f"{image.path[:120] or 'an image'}: {bad.message}", bad.fix)
            parts.append(replace(part, images=tuple(images)))
        return problems.problems or replace(example, parts=tuple(parts))

    @cached_property
    def _image_folder(self) -> Path:
        """The folder where paths of images begin. Raises DataError for a file that is elsewhere."""
        if self.data.image_folder is not None:
            return Path(self.data.image_folder)
        if is_address(self.facts.path):
            raise DataError(
                f"{self.facts.path}: its rows name images by path, and paths at an address are not read. Download the "
                "images, and name their folder by data.image_folder; or use rows that hold the images themselves."
            )
        return Path(self.facts.path).parent

    def finish(self) -> None:
        """Say, once, what of the file was not used."""
        if self.ignored:
            fix = "Name a field by data.columns to use it."
            self._note(next(iter(self.ignored.values())), "ignored_fields", f"not used: {names(self.ignored)}.", fix)
        unused = [theirs for ours, theirs in self.data.columns.items() if ours not in self.mapped]
        if unused and self.facts.rows and (self.answered or not self.mapped):  # else answers may be missing
            by_names = "without" if self.mapped else "by its own names"
            message = f"no row of it has {names(unused)}, which data.columns names: it was read {by_names}."
            self._note(Source(self.facts.path, 0), "columns_unused", message, "")

    def _note(self, source: Source, code: str, message: str, fix: str) -> None:
        self.on_problem(Problem(source, code, message, fix, severity="warning"))

    def _renamed(self, record: JsonObject, source: Source) -> JsonObject | None:
        columns = self.data.columns
        renamed = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
        if not renamed:
            return record
        self.mapped |= renamed.keys()
        needed = {
            field
            for name in (SHAPES[self.task] if self.task else FORMATS)
            for field in (FORMATS[name].required if self.answered else FORMATS[name].inputs)
        }
        missing = [theirs for ours, theirs in columns.items() if ours not in renamed and ours in needed]
        if missing:
            message = f"it has no {', '.join(map(repr, missing))}, which data.columns names; it has {names(record)}."
            hint = did_you_mean(missing[0], record).strip()
            if self.facts.columns is not None:
                raise refusal(self.facts.path, 1, "missing_column", message, hint or "Correct data.columns.")
            self.on_problem(Problem(source, "missing_column", message, hint or "Correct the row, or data.columns."))
            return None
        taken = set(columns.values())
        for name, value in record.items():
            if name in renamed and name not in taken:
                self._ignore([f"{name} (data.columns takes another)"], source)
            elif name not in taken:
                renamed[name] = value
        return renamed

    def _shape(self, record: JsonObject, source: Source) -> Shape | None:
        """The shape of a row that is not of the file's shape, or of one before that is known."""
        shape = find_shape(record, task=self.task, answered=self.answered)
        if self.shape is not None and shape is None:
            shape = find_shape(record)  # of another task
        if self.shape is not None and (shape is None or set(FORMATS[shape].fields) <= set(FORMATS[self.shape].fields)):
            return self.shape  # which says what is missing
        if shape is None:
            suggested = self._suggested(record)
            hint = " ".join(map(str, suggested))
            code, message, fix = explain(record, self.task, hint, self.data.columns)
            ways = tuple(meaning.way for meaning in suggested) if hint and hint in fix else ()
            if code == "other_task" and len(self.data.train) > 1:
                fix += " Files of two tasks need two runs."
            if self.facts.columns is not None:
                if self.facts.kind == "CSV":
                    message += " If line 1 is a row, put the names of the columns above it."
                raise refusal(self.facts.path, 1, code, message, fix, ways=ways)
            self.on_problem(Problem(source, code, message, fix, ways=ways))
        elif self.shape is not None:
            message = f"the row has the shape {shape}, but those before it have {self.shape}."
            self.on_problem(
                Problem(source, "other_shape", message, "Put rows of another shape in a file of their own.")
            )
            return None
        return shape

    def _suggested(self, record: JsonObject) -> list[Meaning]:
        """Guesses at the meaning of the file's rows, or of this row alone if it is of a list, without a file."""
        if self.suggested is None:
            rows = sample(reread(self.facts, limits=self.data.limits, how=self.data.reading)) or [record]
            self.suggested = meanings(rows, self.task)
        return self.suggested

    def _too_many(self, record: JsonObject, source: Source, fields: Sequence[str]) -> list[Problem]:
        limit = self.data.limits.messages
        return [
            Problem(
                source,
                "too_many_messages",
                f"{name} has {len(record[name]):,} entries, more than data.limits.messages, which is {limit:,}.",
                "Split the row, or raise the limit.",
            )
            for name in fields
            if isinstance(record.get(name), list) and len(record[name]) > limit
        ]

    def _ignore(self, names: Iterable[str], source: Source) -> None:
        for name in names:
            if len(self.ignored) < MOST_IGNORED and name not in (self.keep or ()):
                self.ignored.setdefault(name, source)


def _unplaced_images(record: Record, source: Source, shape: Shape) -> list[Problem]:
    """The problem of a row that is not a chat and brings images: its answers are to them, and it would do without."""
    if shape not in (*COMPARED, *NAMED) or not (names := [name for name in IMAGE_FIELDS if record.get(name)]):
        return []
    message = f"it has images ({names[0]}), and rows of the shape {shape} have no place for them yet."
    fix = "Learn from chats with images (task chat), or take the field out."
    return [Problem(source, "no_images_here", message, fix)]


def _reference(record: JsonObject, shape: Shape, source: Source) -> Any:
    """The row's own answer, with which a prediction is compared; None: it has none."""
    if shape in _ANSWER:
        return record.get(_ANSWER[shape])
    parsed = FORMATS[shape].parse(record, source) if shape != "text" else ()
    if not isinstance(parsed, Example) or not parsed.first_line[-1].trained:
        return None
    last = parsed.first_line[-1]
    return {"content": last.text, **last.fields} if last.fields else last.text


_ANSWER: Mapping[Shape, str] = {"text_label": "label", "tokens_tags": "tags", "document_summary": "summary"}


def content_hash(example: Example) -> int:
    """64-bit hash of the content of an example: roles, texts, trained flags, fields, tools, labels, not place.

    The same on every machine and in every release.
    """
    content: list[Any] = [[[part.role, part.text, part.trained, part.fields] for part in example.parts], example.tools]
    if example.images:
        content.append([[(place, image.sha256) for place, image in part.images] for part in example.parts])
    if example.labels or example.many:
        content += [sorted(example.labels) if example.many else example.labels, example.many]
    if example.branches:
        content += [[[p.role, p.text, p.trained, p.fields] for p in branch] for branch in example.branches]
        content.append(example.values)
    return hash_of(content)


_WITH_INPUT = {*CHATS, *COMPARED, *SEARCHED, "text_label", "tokens_tags"}


def input_hash(example: Example) -> int:
    """64-bit hash of the input of an example: its prompt, document, text or words, without the answer.

    For conversations the turns before the first answer: the instructions and the first turn of the user. For
    plain text, which has no input, the `content_hash`. Of a row with images these alone, so that all
    questions about an image are on one side. The same on every machine and in every release: the held-out
    rows of a data set follow from it.
    """
    parts = example.parts
    if example.images:
        return hash_of([image.sha256 for image in example.images])
    if (example.shape in CHATS or example.branches) and not example.plain:
        parts = tuple(itertools.takewhile(lambda part: part.role not in ("assistant", "tool"), parts))
    read = [[part.role, part.text, part.fields] for part in parts if not part.trained]
    has_input = example.plain or example.shape in _WITH_INPUT
    return hash_of([read, example.tools]) if has_input and read else content_hash(example)


def hash_of(content: list[Any]) -> int:
    """64-bit hash of a value as JSON; what JSON has no form for, such as a date of Parquet, counts as text."""
    packed = orjson.dumps(content, default=str, option=orjson.OPT_SORT_KEYS)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "big")


def check_column_names(columns: Mapping[str, str]) -> None:
    """Raise `RecipeError` when data.columns names a field that no shape has, or one of the data's twice."""
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            swapped = f" Did you mean {{{theirs}: {ours}}}?" if theirs in FIELDS else f" One of {', '.join(FIELDS)}."
            raise RecipeError(
                f"data.columns.{ours}: no shape of rows has such a field.{did_you_mean(ours, FIELDS) or swapped}"
            )
    twice = sorted({theirs for theirs in columns.values() if list(columns.values()).count(theirs) > 1})
    if twice:
        raise RecipeError(f"data.columns: {twice[0]} is named for two fields; a column can be one.")
