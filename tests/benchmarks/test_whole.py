"""The time of whole runs beside what was foreseen."""

from benchmarks.whole import PARTS, foreseen, markdown, taken_by_part

from tunesmith.planning.duration import KINDS

RUN = {"command": "tunesmith train m a.jsonl", "by_formula": 130.0, "after_probe": 95.0, "measured": 100.0}
RUN["parts"] = {"training": [80.0, 100.0, 75.0]}


def test_the_table_tells_errors_and_keeps_what_failed():
    page = markdown([RUN, {**RUN, "by_formula": 90.0}, {"command": "tunesmith train m b.jsonl", "error": "a\nno disk"}])
    assert "| `tunesmith train m a.jsonl` | 100 | 130 | +30% | 95 | -5% |" in page
    assert "| failed: no disk |" in page
    assert "| training | 80.0 | 100.0 | 75.0 |" in page
    assert "By formula, 2 runs: median error 20%, worst 30%." in page
    assert "After a probe, 2 runs: median error 5%, worst 5%." in page


def test_every_kind_of_work_is_part_of_a_run_once():
    assert sorted(kind for kinds, _ in PARTS.values() for kind in kinds) == sorted(KINDS)
    seconds = {"work": {kind: {"seconds": 2.0} for kind in KINDS}}
    assert sum(foreseen(seconds, part) for part in PARTS) == 2.0 * len(KINDS)


def test_what_a_run_took_is_all_some_part_of_it():
    times = {"start": 5.0, "plan": 5.5, "evaluation": 8.0, "checkpoint": 8.5, "step": 12.0, "note": 12.5, "end": 15.0}
    taken = taken_by_part([{"kind": kind, "time": time} for kind, time in times.items()], 2.0, 16.0)
    assert taken == {
        "starting": 3.0,
        "training": 4.0,
        "held-out rows": 2.5,
        "answers and general text": 0.0,
        "checkpoints": 1.0,
        "surprising rows and the end": 3.5,
    }
