"""Events as trackers take them."""

from pathlib import Path

from trackers.logs import draw, ending, evaluation, event, new_run, opening, trained
from tunesmith.trackers.run_reader import RunReader, StepMetrics, metrics_of, plainly_named
from tunesmith.types import Event


def steps_of(reader: RunReader, events: list[Event]) -> list[StepMetrics]:
    return [step for one in events for step in reader.add(one)]


def test_names_and_values_are_those_of_the_event() -> None:
    step = event("step", 4, loss=0.1 + 0.2, lr=1e-4, grad_norm=2.0, tokens=5, rows=[1, 2])
    assert metrics_of(step) == {
        "train/loss": 0.30000000000000004,
        "train/learning_rate": 1e-4,
        "train/grad_norm": 2.0,
        "train/tokens": 5,
        "train/seconds": 0.25,
        "train/peak_bytes": 1000,
    }


def test_an_evaluation_has_intervals_and_a_loss_for_each_source() -> None:
    value = draw("eval", 3, 9)
    assert metrics_of(evaluation("step", 3, 9)) == {
        "eval/loss": value,
        "eval/loss_low": value - 0.1,
        "eval/loss_high": value + 0.1,
        "eval/a b.jsonl/loss": value,
        "eval/a_b.jsonl/loss": value / 2,
        "eval/a_b.jsonl_/loss": value / 3,
        "eval/hf___datasets_é_split_train/loss": value / 4,
    }


def test_names_that_no_tracker_could_hold_stay_different() -> None:
    assert plainly_named({"..": 1, "_": 2, "a" * 300: 3, "b" + "a" * 299: 4}) == {
        "_": 1,
        "__": 2,
        "a" * 200: 3,
        "a" * 200 + "_": 4,
    }


def test_texts_of_rows_are_no_metrics() -> None:
    assert metrics_of(event("sample", 0, prompt="secret", answer="secret")) == {}


def test_a_step_is_given_out_once_it_is_complete(tmp_path: Path) -> None:
    reader = RunReader(new_run(tmp_path))
    given = steps_of(reader, [*opening(9), *trained(1, 3, 9)])
    assert [step.step for step in given] == [0, 1, 2]
    assert steps_of(reader, trained(4, 4, 9))[0].values.keys() >= {"train/loss", "eval/loss"}


def test_a_killed_run_keeps_its_newest_step_back_until_it_goes_on(tmp_path: Path) -> None:
    reader = RunReader(new_run(tmp_path))
    assert [step.step for step in steps_of(reader, [*opening(9), *trained(1, 3, 9)[:-1]])] == [0, 1, 2]
    (third, *_) = steps_of(reader, [event("resume", 2, from_step=2), *trained(3, 4, 9)])
    assert third.values.keys() >= {"train/loss", "eval/loss"}


def test_the_end_gives_out_the_last_step_and_the_last_values(tmp_path: Path) -> None:
    reader = RunReader(new_run(tmp_path))
    given = steps_of(reader, [*opening(4), *trained(1, 4, 4), *ending(4)])
    assert [step.step for step in given] == [0, 1, 2, 3, 4]
    assert given[-1].values["result/eval/loss"] == given[-1].values["eval/loss"]
    assert reader.notes == ["few rows", "kept: the last step"]
    assert reader.facts["data"]["chats.jsonl"] == "ab" * 32


def test_steps_that_a_resumed_run_repeats_come_once(tmp_path: Path) -> None:
    reader = RunReader(new_run(tmp_path))
    given = steps_of(reader, [*opening(9), *trained(1, 5, 9), event("resume", 2, from_step=2), *trained(3, 9, 9)])
    assert [step.step for step in given] == [*range(9)]
