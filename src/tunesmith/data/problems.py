"""Problems of one row, collected while it is parsed, so that all of them are reported at once."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tunesmith.errors import DataError, WayOut
from tunesmith.phrases import listed, nearest
from tunesmith.recipe.schema import Data
from tunesmith.types import JsonObject, Problem, Source

SKIP = "--set data.bad_rows=skip"
SKIPPING = WayOut({"data.bad_rows": "skip"}, "Leave such rows out")
MOST_NAMES = 20
"""Fields named in one line."""
MOST_OF_A_ROW = 50
"""Problems listed of one row: a row can have millions."""
_PLAIN = re.compile(r"[A-Za-z_][\w .()/-]*")
_OF_YAML = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
"""Words that are values of their own in a recipe."""


def refusal(
    path: str, line: int, code: str, message: str, fix: str = "", *, ways: tuple[WayOut, ...] = ()
) -> DataError:
    """The error for a file in which nothing, or nothing more, can be read. No option leaves it out."""
    problem = Problem(Source(path, line), code, message, fix, ways=ways)
    return DataError(str(problem), [problem])


def num_refused(data: Data, errors: Mapping[str, int]) -> int:
    """The problems, counted by code, for which data is refused: none where the recipe leaves it out."""
    if data.bad_rows != "error":
        return 0
    return sum(num for code, num in errors.items() if not (code == "too_long" and data.too_long == "drop"))


def refused(data: Data, problems: Iterable[Problem]) -> list[Problem]:
    """The problems among these that `num_refused` counts."""
    return [problem for problem in problems if problem.severity == "error" and num_refused(data, {problem.code: 1})]


def unusable(num: int) -> str:
    """So many problems, in words."""
    return "1 problem makes its row unusable" if num == 1 else f"{num:,} problems make rows unusable"


class RowProblems:
    """Problems of one row."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[Problem] = []

    def add(self, code: str, message: str, fix: str = "") -> None:
        if len(self.problems) < MOST_OF_A_ROW:
            self.problems.append(Problem(self.source, code, message, fix))
        elif len(self.problems) == MOST_OF_A_ROW:
            self.problems.append(Problem(self.source, "and_more", "more is wrong with this row."))

    def text(self, record: JsonObject, key: str) -> str:
        """The text of a required field; "" and a problem if it is not text."""
        value = record.get(key)
        if isinstance(value, str):
            return value
        if value is None:
            is_null, near = ("is null", None) if key in record else ("is missing", nearest(key, record, 0.8))
            named = f"name the field you have by --set 'data.columns={{{key}: ...}}'"
            fix = f"Give it, or {paste({key: near})}." if near else f"Give it, or {named}."
            self.add("missing_field", f"{key} {is_null}.", fix)
        else:
            self.wrong_type(key, value, "text")
        return ""

    def answer(self, record: JsonObject, key: str, code: str = "empty_answer") -> str:
        """The text of a field that is learnt from and so must not be empty; `code`: of the problem if it is."""
        text = self.text(record, key)
        if isinstance(record.get(key), str) and not text.strip():
            self.add(code, f"{key} is empty.", "Write it, or remove the row.")
        return text

    def answers(self, given: object, place: str, code: str = "empty_answer") -> list[str]:
        """The texts of a list, or one text, as `answer` takes each."""
        named = {f"{place}[{i}]": text for i, text in enumerate(given)} if isinstance(given, list) else {place: given}
        return [self.answer(named, name, code) for name in named]

    def optional_text(self, record: JsonObject, key: str) -> str:
        """The text of a field that may be missing or null: then ""."""
        return "" if record.get(key) is None else self.text(record, key)

    def numbers(self, values: Any, num: int, place: str) -> list[float]:
        """So many finite numbers, also as a table's texts; zeros and a problem if they are not."""
        listed, floats = values if isinstance(values, list) else [values], []
        with suppress(TypeError, ValueError, OverflowError):
            floats = [float(value) for value in listed]
        if len(floats) == num and all(map(math.isfinite, floats)):
            return floats
        what = "a number" if num == 1 else f"a list of {num} numbers"
        self.add("bad_numbers", f"{place}: {str(values)[:40]}.", f"Give {what}, or remove the row.")
        return [0.0] * num

    def label(self, value: object, place: str) -> str:
        """The name of one label: a text byte for byte, a number as JSON writes it, true or false."""
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        if isinstance(value, str):
            self.add("bad_label", f"{place} is empty.", "Write it, or remove the row.")
        elif isinstance(value, float):
            self.add("bad_label", f"{place} is {value}.", "Write a number, or remove the row.")
        elif value is None:
            self.add("bad_label", f"{place} is null.", "Write it, or remove it.")
        else:
            self.wrong_type(place, value, "text or a number")
        return ""

    def labels(self, values: Sequence[Any], place: str) -> tuple[str, ...]:
        """The names in a list of labels."""
        return tuple(self.label(value, f"{place}[{i}]") for i, value in enumerate(values))

    def wrong_type(self, place: str, value: object, expected: str) -> None:
        fix = "Put it in quotes." if expected == "text" and isinstance(value, int | float) else ""
        self.add("wrong_type", f"{place} is {describe_type(value)}, expected {expected}.", fix)


def describe_type(value: object) -> str:
    """The type of a value, in words."""
    names = {
        str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object",
        type(None): "null", bytes: "raw bytes",
    }  # fmt: skip
    return names.get(type(value), f"of type {type(value).__name__}")


def names(record: Iterable[str]) -> str:
    """The names of a row's fields, as many as fit on a line."""
    return listed((repr(name[:60]) for name in record), MOST_NAMES) or "none"


def _is_plain(name: str) -> bool:
    return bool(_PLAIN.fullmatch(name)) and name == name.strip() and name.lower() not in _OF_YAML


def paste(columns: Mapping[str, str], *, task: str | None = None) -> str:
    """The options to add to a command, quoted for a shell."""
    words = [f"--set task={task}"] if task else []
    return " ".join([*words, f"--set {shlex.quote(f'data.columns={as_yaml(columns)}')}"])


def as_yaml(columns: Mapping[str, str]) -> str:
    """The value of data.columns: {text: Review, label: Stars}."""
    names = {
        theirs: theirs if _is_plain(theirs) else json.dumps(theirs, ensure_ascii=False) for theirs in columns.values()
    }
    listed = ", ".join(f"{ours}: {names[theirs]}" for ours, theirs in columns.items())
    return f"{{{listed}}}"
