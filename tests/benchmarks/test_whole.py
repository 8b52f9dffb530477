"""What is foreseen beside what is measured: errors, and a run's time by its parts."""

import pytest
from benchmarks.planning import errors
from benchmarks.whole import PARTS, foreseen, taken_by_part

from tunesmith.planning.forecast import KINDS


def test_errors_are_shares_of_what_was_measured():
    found = [{"foreseen": 110, "measured": 100}, {"foreseen": 80, "measured": 100}, {"error": "x"}]
    assert errors(found, "foreseen", "measured") == pytest.approx([0.1, 0.2])


def test_every_kind_of_work_is_part_of_a_run_once():
    assert sorted(kind for kinds, _ in PARTS.values() for kind in kinds) == sorted(KINDS)
    seconds = {"work": {kind: {"seconds": 2.0} for kind in KINDS}}
    assert sum(foreseen(seconds, part) for part in PARTS) == 2.0 * len(KINDS)


def test_what_a_run_took_is_all_some_part_of_it():
    times = {"start": 5.0, "plan": 5.5, "evaluation": 8.0, "checkpoint": 8.5, "step": 12.0, "note": 12.5, "end": 15.0}
    taken = taken_by_part([{"kind": kind, "time": time} for kind, time in times.items()], 2.0, 16.0)
    assert list(taken.values()) == [3.0, 4.0, 2.5, 0.0, 1.0, 3.5]
