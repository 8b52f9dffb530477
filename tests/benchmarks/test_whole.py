"""What is foreseen beside what is measured: errors, and a run's time by its parts."""

import json
import os

import pytest
from benchmarks.planning import errors
from benchmarks.reviews import make_reviews
from benchmarks.whole import PARTS, foreseen, taken_by_part, taken_by_phase

from tunesmith.planning.forecast import WORK_KINDS


def test_errors_are_shares_of_what_was_measured():
    found = [{"foreseen": 110, "measured": 100}, {"foreseen": 80, "measured": 100}, {"error": "x"}]
    assert errors(found, "foreseen", "measured") == pytest.approx([0.1, 0.2])


def test_every_kind_of_work_is_part_of_a_run_once():
    assert sorted(kind for kinds, _ in PARTS.values() for kind in kinds) == sorted(WORK_KINDS)
    seconds = {"work": {kind: {"seconds": 2.0} for kind in WORK_KINDS}}
    assert sum(foreseen(seconds, part) for part in PARTS) == 2.0 * len(WORK_KINDS)


def test_what_a_run_took_is_all_some_part_of_it():
    times = {"start": 5.0, "plan": 5.5, "evaluation": 8.0, "checkpoint": 8.5, "step": 12.0, "note": 12.5, "end": 15.0}
    taken = taken_by_part([{"kind": kind, "time": time} for kind, time in times.items()], 2.0, 16.0)
    assert list(taken.values()) == [3.0, 4.0, 2.5, 0.0, 1.0, 3.5]


def test_phases_add_up_to_the_run_and_answers_on_the_way_count_apart(tmp_path):
    listed = tmp_path / "evaluation" / "surprising.json"
    listed.parent.mkdir()
    listed.write_text("{}")
    os.utime(listed, (17.5, 17.5))
    told = [
        ("plan", 5.0, "", {}), ("evaluation", 9.0, "before", {"answering": 1.5}), ("sample", 9.0, "before", {}),
        ("checkpoint", 9.5, "", {}), ("step", 12.0, "", {}), ("step", 14.0, "", {}), ("note", 14.5, "", {}),
        ("evaluation", 17.0, "after", {}), ("end", 18.5, "", {}),
    ]  # fmt: skip
    events = [{"kind": kind, "time": at, "values": {"name": name}, "timing": timing} for kind, at, name, timing in told]
    taken = taken_by_phase(events, 2.0, 20.0, tmp_path)
    assert taken == {
        "start": 3.0, "answers, before": 1.5, "losses, before": 2.5, "checkpoints": 0.5, "steps": 4.5,
        "losses, after": 3.0, "rows of high loss": 0.5, "result and report": 1.0, "end of the process": 1.5,
    }  # fmt: skip
    assert sum(taken.values()) == 18.0


def test_reviews_are_the_same_every_time_and_no_two_are_alike(tmp_path):
    words = make_reviews(tmp_path / "a", 200, 50)
    assert words[1] == "--eval"
    files = [(tmp_path / name / f"reviews-{side}.jsonl") for name in "ab" for side in ("train", "held-out")]
    make_reviews(tmp_path / "b", 200, 50)
    texts = [path.read_text("utf-8") for path in files]
    assert texts[:2] == texts[2:]
    rows = "".join(texts[:2]).splitlines()
    assert len(rows) == len(set(rows)) == 250
    answers = [json.loads(row)["messages"][1]["content"] for row in rows]
    assert 0.55 < answers.count("positive") / len(answers) < 0.75
    assert make_reviews(tmp_path / "c", 20, 0) == [str(tmp_path / "c" / "reviews-train.jsonl")]
