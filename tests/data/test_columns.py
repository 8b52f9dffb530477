"""Columns that were named and are not there are said; text beside classes is asked about."""

from pathlib import Path
from typing import Any

import pytest

from data.rows_of import comma_separated, json_lines, put
from tunesmith.data.check import check
from tunesmith.data.columns import ask_text_or_classes
from tunesmith.data.splits import first_example
from tunesmith.errors import DataError
from tunesmith.recipe.load import load
from tunesmith.recipe.schema import Data, DataFile


def data_of(path: Path, **options: Any) -> Data:
    return Data(train=(DataFile(path=str(path)),), **options)


def texts(num: int = 40, **columns: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", **{name: value(i) for name, value in columns.items()}} for i in range(num)]


def test_a_named_column_that_no_row_has_is_said(tmp_path: Path):
    rows = texts(label=lambda i: "ab"[i % 2])
    for path in (put(tmp_path, "a.csv", comma_separated(rows)), put(tmp_path, "a.jsonl", json_lines(rows))):
        for how in ({}, {"bad_rows": "skip"}):
            report = check(data_of(path, columns={"label": "lable"}, **how), task="classify")
            (problem,) = report.problems
            assert (problem.code, problem.severity) == ("columns_unused", "error")
            assert "no row has 'lable', which data.columns.label names. Did you mean label?" in str(problem)
            assert report.refusals == ("data.columns names what no row has",)
        found = check(data_of(path, columns={"text": "text", "label": "lable"}), task="classify").problems
        assert ("missing_column", "Did you mean label?") in [(one.code, one.fix) for one in found]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sentiment", lambda i: ["good", "bad", "fair"][i % 3]),
        ("labels", lambda i: ["a|b", "b"][i % 2]),
        ("rating", lambda i: str(1 + i % 5)),
        ("topic", lambda i: [["x"], ["x", "y"]][i % 2]),
    ],
)
def test_text_beside_a_field_that_is_often_a_class_is_asked_about(name: str, value: Any, tmp_path: Path):
    path = put(tmp_path, "a.jsonl", json_lines(texts(id=str, **{name: value})))
    report = check(data_of(path))
    (question,) = report.refusals
    assert f"--set task=classify --set 'data.columns={{text: text, label: {name}}}'" in question
    assert "--set task=text" in question
    for task in ("text", "classify"):
        assert check(data_of(path, columns={"label": name} if task == "classify" else {}), task=task).ok


def test_the_ways_that_words_name_are_options_too(tmp_path: Path):
    rows = [{"Bewertung": f"Das Paket kam am {i}. Tag, gut verpackt", "Stimmung": "gs"[i % 2]} for i in range(40)]
    for path in (put(tmp_path, "a.csv", comma_separated(rows)), put(tmp_path, "a.jsonl", json_lines(rows))):
        with pytest.raises(DataError) as refused:
            first_example(data_of(path))
        way = refused.value.ways[0]
        assert way.settings == {"task": "classify", "data.columns": "{text: Bewertung, label: Stimmung}"}
        assert way.words == "Learn the class `Stimmung` of `Bewertung`"
        columns = load(None, [f"{key}={value}" for key, value in way.settings.items()]).data.columns
        assert check(data_of(path, columns=columns), task="classify").ok
    question = ask_text_or_classes(data_of(put(tmp_path, "b.csv", comma_separated(texts(mood=lambda i: "ab"[i % 2])))))
    assert question is not None
    assert [way.settings["task"] for way in question.ways] == ["classify", "text"]


def test_text_without_classes_is_plain_text(tmp_path: Path):
    rows = texts(id=str, url=lambda i: f"https://{i}", source=lambda i: "web", note=lambda i: "long " * (i % 3 + 20))
    path = put(tmp_path, "a.csv", comma_separated(rows))
    assert ask_text_or_classes(data_of(path)) is None
    assert check(data_of(path)).ok
