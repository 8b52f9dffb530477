"""Thousands of files changed at random are read, or refused in words, each within seconds.

`TUNESMITH_FUZZ_SEED=7 pytest -m slow tests/data/test_fuzz.py -s` tries others and prints the counts.
"""

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from data.mutations import at_most, data_seeds, mutants, recipe_seeds
from tunesmith.data.examples import examples
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import load
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Problem

SEED = int(os.environ.get("TUNESMITH_FUZZ_SEED", "0"))
EACH_S = 20
"""Most seconds a file may take; the slowest takes a hundredth of it."""


def outcome_of_file(path: Path) -> str:
    files = (DataFile(path=str(path)),)
    found: list[Problem] = []
    num = 0
    try:
        for _ in examples(files, Data(train=files), found.append):
            num += 1
    except DataError as error:
        found += error.problems
        num = -1
    assert all(problem.source.line >= 0 and len(str(problem)) < 2000 for problem in found)
    if num < 0:
        return "refused"
    assert num or found  # no file is empty without a word
    return f"{'read' if num else 'no row'}, {'rows named' if found else 'all good'}"


def outcome_of_recipe(path: Path) -> str:
    lines: list[str] = []
    try:
        load.load(str(path))
    except RecipeError as error:
        lines = str(error).splitlines() or ["without a word"]
    assert len(lines) <= 45  # twenty of the text or of the options, and what one of them lists
    assert "without a word" not in lines
    return "refused" if lines else "accepted"


def tried(num: int, *, recipes: bool, folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    slowest = 0.0
    seeds, outcome = (recipe_seeds(), outcome_of_recipe) if recipes else (data_seeds(), outcome_of_file)
    for number, (name, content) in enumerate(mutants(seeds, num, SEED)):
        path = folder / name
        path.write_bytes(content)
        begun = time.monotonic()
        try:
            with at_most(EACH_S):
                counts[outcome(path)] += 1
        except BaseException as error:
            kept = folder / f"fault-{SEED}-{number}-{name}"
            path.rename(kept)
            raise AssertionError(f"seed {SEED}, file {number}: {kept}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.monotonic() - begun)
        path.unlink()
    print(f"{'recipes' if recipes else 'files'}, seed {SEED}: {num:,} tried, slowest {slowest:.2f} s: {dict(counts)}")
    return counts


@pytest.mark.parametrize("num", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_changed_data_files_are_read_or_refused(tmp_path: Path, num: int) -> None:
    counts = tried(num, recipes=False, folder=tmp_path)
    assert sum(counts.values()) == num
    assert counts["refused"] > 0
    assert counts["read, rows named"] > 0


@pytest.mark.parametrize("num", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_changed_recipes_are_accepted_or_refused(tmp_path: Path, num: int) -> None:
    counts = tried(num, recipes=True, folder=tmp_path)
    assert sum(counts.values()) == num
    assert counts["refused"] > 0
    assert counts["accepted"] > 0
