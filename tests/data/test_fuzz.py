"""Thousands of files changed at random are read, or refused in words, each within seconds.

`TUNESMITH_FUZZ_SEED=7 pytest -m slow tests/data/test_fuzz.py -s` tries others and prints the counts.
"""

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from data.mutations import at_most, data_seeds, mutants
from tunesmith.data.detect_format import FileFacts
from tunesmith.data.examples import examples
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Problem

SEED = int(os.environ.get("TUNESMITH_FUZZ_SEED", "0"))
EACH_S = 20
"""Most seconds a file may take; the slowest takes a hundredth of it."""


def outcome_of_file(path: Path) -> str:
    files = (DataFile(path=str(path)),)
    found: list[Problem] = []
    facts: list[FileFacts] = []
    num = 0
    try:
        for _ in examples(files, Data(train=files), found.append, facts=facts):
            num += 1
    except DataError as error:
        found += error.problems
        num = -1
    assert all(problem.source.line >= 0 and len(str(problem)) < 2000 for problem in found)
    if num < 0:
        return "refused"
    assert num or found  # no file is empty without a word
    lost = {problem.source.line for problem in found if problem.severity == "error"}
    assert num + len(lost) >= facts[0].rows, "each row is an example, or has a problem by its line"
    return f"{'read' if num else 'no row'}, {'rows named' if found else 'all good'}"


def tried(num: int, *, folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    slowest = 0.0
    for number, (name, content) in enumerate(mutants(data_seeds(), num, SEED)):
        path = folder / name
        path.write_bytes(content)
        begun = time.monotonic()
        try:
            with at_most(EACH_S):
                counts[outcome_of_file(path)] += 1
        except BaseException as error:
            kept = folder / f"fault-{SEED}-{number}-{name}"
            path.rename(kept)
            raise AssertionError(f"seed {SEED}, file {number}: {kept}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.monotonic() - begun)
        path.unlink()
    print(f"files, seed {SEED}: {num:,} tried, slowest {slowest:.2f} s: {dict(counts)}")
    return counts


@pytest.mark.parametrize("num", [300, pytest.param(24_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_changed_data_files_are_read_or_refused(tmp_path: Path, num: int) -> None:
    counts = tried(num, folder=tmp_path)
    assert sum(counts.values()) == num
    assert counts["refused"] > 0
    assert counts["read, rows named"] > 0
