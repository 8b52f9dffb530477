"""Every malformed file ends in a finding with its code and its line, and nothing else happens."""

import re
from pathlib import Path

import pytest

from data.malformed_corpus import CASES, Case
from data.rows_of import examples_in, json_lines, put
from tunesmith import data
from tunesmith.data.examples import examples
from tunesmith.data.read import read
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, DataFile, Limits
from tunesmith.types import Problem

IDS = [case.name for case in CASES]


def findings(path: Path) -> list[Problem]:
    """What reading says of a file that is wrong, in the order in which it says it."""
    found: list[Problem] = []
    files = (DataFile(path=str(path)),)
    try:
        for _ in examples(files, Data(train=files), found.append):
            pass
    except DataError as error:
        found += error.problems
    return [problem for problem in found if problem.severity == "error"]


def test_every_code_is_documented_and_every_documented_code_exists():
    page = (Path(__file__).parents[2] / "docs" / "guide" / "data.md").read_text("utf-8")
    documented = set(re.findall(r"^\| `(\w+)`(?: †)? \| (?:error|warning) ", page, re.MULTILINE))
    source = "".join(path.read_text("utf-8") for path in Path(data.__file__).parent.rglob("*.py"))
    assert {case.code for case in CASES} <= documented
    assert {code for code in documented if f'"{code}"' not in source} == set()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_malformed_input_is_named_with_its_line(case: Case, tmp_path: Path):
    path = tmp_path / case.filename
    path.write_bytes(case.payload)

    found = findings(path)

    assert (case.code, case.line) in [(problem.code, problem.source.line) for problem in found]
    assert found[0].source.line == case.line  # and nothing is said of the good rows before it
    assert all(problem.source.path == str(path) for problem in found)
    assert all(len(str(problem)) < 1000 for problem in found)
    assert [file.name for file in tmp_path.iterdir()] == [case.filename]


def test_labels_beyond_64_bits_never_become_one(tmp_path: Path):
    found = [{"text": f"t{i}", "label": 10_000_000_000_000_000_000_000_000 + i % 2} for i in range(4)]
    examples, problems = examples_in(put(tmp_path, "rows.jsonl", json_lines(found)))
    assert examples == []
    assert [problem.code for problem in problems] == ["number_too_large"] * 4


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_blank_lines_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A packed megabyte can hold a thousand million."""
    monkeypatch.setattr("tunesmith.data.read_json.MOST_BLANK", 100)
    row = '{"text": "a"}\n' if name == "rows.jsonl" else "text\na\n"
    file = tmp_path / name
    file.write_text(row + "\n" * 100 + row.splitlines()[-1] + "\n" + "\n" * 100)
    some = [DataFile(path=str(file))]
    assert len(list(read(some, limits=Limits(), on_problem=lambda problem: None))) == 2
    file.write_text(row + "\n" * 101)
    with pytest.raises(DataError, match="more than 100 lines before it are blank"):
        list(read(some, limits=Limits(), on_problem=lambda problem: None))
