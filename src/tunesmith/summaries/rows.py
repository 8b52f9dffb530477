"""Rows as the model reads them: text in stretches that are learnt or only read, with
the problems of those lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.types import JsonObject, Problem

if TYPE_CHECKING:
    from tunesmith.data.detect_format import FileFacts
    from tunesmith.data.renderer import Renderer
    from tunesmith.recipe.schema import Data
    from tunesmith.types import Example, TaskName

SHAPELESS = {"unknown_shape", "other_task", "missing_column"}
"""Codes of problems with rows whose fields have no known meaning."""


def rows_as_read(
    data: Data, task: TaskName | None, renderer: Renderer | None, first: int, last: int
) -> list[JsonObject]:
    """The lines `first` to `last` of the first training file: {line, tokens,
    trained, spans, problems} of each row.

    `spans`: (text, whether it is learnt). Without a renderer, and for labels, they are the texts before any
    template, and the numbers of tokens are None. A row that cannot be used has its fields as spans. Raises
    DataError if the file cannot be read.
    """
    from tunesmith.data.columns import usual_columns
    from tunesmith.data.examples import examples
    from tunesmith.errors import DataError

    problems = list[Problem]()
    if usual := usual_columns(data, task):
        data = data.model_copy(update={"columns": usual[0]})
    rows: dict[int, JsonObject] = {}
    facts: list[FileFacts] = []
    try:
        for _, example in examples(data.train[:1], data, problems.append, task=task, facts=facts):
            facts[-1].skip_to = first  # the shape of the file is found: its row a million is there at once
            if example.source.line > last:
                break
            if example.source.line >= first:
                rows[example.source.line] = _row(example, renderer, problems)
    except DataError as error:  # of a table whose columns mean nothing here
        if {problem.code for problem in error.problems} - SHAPELESS or not error.problems:
            raise
        return _rows_as_they_are(data, first, last)
    of_lines = [problem for problem in problems if first <= problem.source.line <= last]
    for problem in of_lines:
        empty: JsonObject = {"line": problem.source.line, "tokens": None, "trained": None, "spans": [], "problems": []}
        words = {"code": problem.code, "message": problem.message, "fix": problem.fix, "severity": problem.severity}
        rows.setdefault(problem.source.line, empty)["problems"].append(words)
    if not all(row["spans"] for row in rows.values()):  # a person who mends a row has to see it
        as_they_are = {row["line"]: row["spans"] for row in _rows_as_they_are(data, first, last)}
        for line, row in rows.items():
            row["spans"] = row["spans"] or as_they_are.get(line, [])
    return [rows[line] for line in sorted(rows)]


def _rows_as_they_are(data: Data, first: int, last: int) -> list[JsonObject]:
    """The lines `first` to `last` with their fields as spans: what a task would learn from them is unknown."""
    from tunesmith.data.read import read

    rows: list[JsonObject] = []
    facts: list[FileFacts] = []
    for _, record, source in read(
        data.train[:1], limits=data.limits, on_problem=lambda problem: None, facts=facts, how=data.reading
    ):
        facts[-1].skip_to = first
        if source.line > last:
            break
        if source.line >= first:
            spans = [(f"{name}: {value}\n", False) for name, value in record.items()]
            rows.append({"line": source.line, "tokens": None, "trained": None, "spans": spans, "problems": []})
    return rows


def _row(example: Example, renderer: Renderer | None, problems: list[Problem]) -> JsonObject:
    from tunesmith.data.branches import lines_of
    from tunesmith.data.check import spans_of, spans_of_texts
    from tunesmith.types import Row

    values: JsonObject = {"line": example.source.line, "tokens": None, "trained": None, "problems": []}
    if renderer is None:
        return {**values, "spans": spans_of_texts(example)}
    encoded = renderer.encode([example], on_warning=problems.append)[0]
    rows = [row for row in encoded if isinstance(row, Row)]
    problems += [problem for problem in encoded if isinstance(problem, Problem)]
    if not rows:
        return {**values, "spans": spans_of_texts(example)}
    values |= {"tokens": sum(len(row.ids) for row in rows), "trained": int(sum(row.trained.sum() for row in rows))}
    if example.labels:
        return {**values, "spans": spans_of_texts(example)}
    lines = [line for row in rows for line in lines_of(row)]
    spans: list[tuple[str, bool]] = []
    for line in lines:
        spans += [*([("\n\n", False)] if spans else []), *spans_of(line, renderer.tokenizer.decode)]
    return {**values, "spans": spans}
