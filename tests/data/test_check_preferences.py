"""What `check` finds in files of preferences."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.check import CheckReport, check
from tunesmith.data.formats import comparisons
from tunesmith.recipe.schema import Data


def report(folder: Path, rows: list[dict[str, Any]], **options: Any) -> CheckReport:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return check(Data(train=[str(path)], held_out=0, **options), task="prefer")


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


GOOD = [pair(f"q{i}", "a longer answer" if i % 2 else "no", "short" if i % 2 else "a longer one") for i in range(8)]


def test_good_pairs_are_fine(tmp_path):
    found = report(tmp_path, GOOD)
    assert found.ok
    assert not found.errors
    assert not found.warnings


# trap: P12
@pytest.mark.parametrize(
    ("row", "code"),
    [
        (pair("q9", "same", "same"), "identical_sides"),
        (pair("q9", "a", "b", score_chosen=5, score_rejected=5), "tie"),
        (pair("q9", "the answer", "the  answer"), "space_only"),
        (pair("q1", "a longer answer", "short"), "duplicate"),
    ],
)
def test_pairs_that_teach_nothing_are_found_by_line(tmp_path, row, code):
    found = report(tmp_path, [*GOOD, row])
    assert {**found.errors, **found.warnings} == {code: 1}
    (problem,) = found.problems
    assert (problem.code, problem.source.line) == (code, 9)


def test_a_reader_that_lets_identical_sides_pass_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(comparisons, "_check", lambda *args: None)
    with pytest.raises(AssertionError):
        test_pairs_that_teach_nothing_are_found_by_line(tmp_path, pair("q9", "same", "same"), "identical_sides")
