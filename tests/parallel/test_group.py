"""A run of two processes is the run of one: losses, rows, results, ends. Held on gloo, in one start for all checks."""

import json
import os
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from parallel.group import start
from parallel.scenarios import make_inputs, recipe_of, steps_of
from tiny_run import values_of
from tunesmith.data.sampler import StepSampler
from tunesmith.recipe.load import validate
from tunesmith.runs import checkpoint
from tunesmith.runs.folder import Run
from tunesmith.training.same_run import MAY_CHANGE
from tunesmith.training.setup import prepare
from tunesmith.training.step import _step_seed
from tunesmith.training.trainer import resume, train

SCENARIOS = (
    "lora", "full", "experts", "few_rows", "other_rows_planted", "drift_planted", "seeds", "memory_ends",
    "memory_is_gone", "not_finite", "straight", "stopped", "another_recipe", "resumed", "started_again",
    "without_folder", "less_memory", "less_memory_planted", "slow_rows", "other_data", "other_version",
    "saved_by_the_library", "alike", "alike_planted", "apart", "apart_swapped", "apart_again", "looking",
    "looking_in_small_passes",
)  # fmt: skip
PLANTED = (
    "averaged_planted", "own_divisor_planted", "seeds_planted", "memory_is_gone_planted", "not_finite_planted",
    "stopped_planted", "two_writers_planted", "padded_planted", "looking_planted", "slow_rows_planted",
)  # fmt: skip
"""Bugs that nothing but the tests below would see. They show what a test is worth, once it is written: slow."""
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("group")
    make_inputs(made)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return start(folder, *SCENARIOS)


@pytest.fixture(scope="module")
def planted(found: Found, folder: Path) -> Found:
    return start(folder, *PLANTED)


@cache
def _alone(folder: Path, recipe: str) -> dict[str, Any]:
    return steps_of(prepare(validate(json.loads(recipe)), root=folder / "alone"))


def alone(folder: Path, method: str = "lora", **sections: Any) -> dict[str, Any]:
    return _alone(folder, recipe_of(folder, method, **sections).model_dump_json())


def both(found: Found, name: str) -> list[Any]:
    return [rank[name] for rank in found]


def assert_same_steps(ranks: list[Any], one: dict[str, Any]) -> None:
    """float32 sums in another order: 1e-6 for losses of about 6; weights after twelve updates of AdamW."""
    first, second = ranks
    assert first == second
    assert first["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert first["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert list(map(sorted, first["rows"])) == list(map(sorted, one["rows"]))
    for name, values in one["weights"].items():
        assert first["weights"][name] == pytest.approx(values, abs=1e-5), name


# trap: L3
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_ranks_take_the_steps_of_one(found: Found, folder: Path, method: str) -> None:
    assert_same_steps(both(found, method), alone(folder, method))


def test_two_ranks_adapt_experts_as_one_does(found: Found, folder: Path) -> None:
    assert_same_steps(both(found, "experts"), _alone(folder, (folder / "experts.json").read_text("utf-8")))


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["averaged_planted", "own_divisor_planted"])
def test_the_test_sees_another_divisor(planted: Found, folder: Path, bug: str) -> None:
    with pytest.raises(AssertionError):
        assert_same_steps(both(planted, bug), alone(folder))


def test_a_rank_may_have_no_rows(found: Found, folder: Path) -> None:
    expected = alone(folder, train={"epochs": 1, "rows_per_step": 1, "max_steps": 4})
    assert_same_steps(both(found, "few_rows"), expected)


def test_beginnings_that_rows_share_are_computed_once_by_all_or_none(found: Found, folder: Path) -> None:
    data = {"train": [str(folder / "alike.jsonl")]}
    assert all(rank.pop("shares") for rank in both(found, "alike"))
    assert_same_steps(both(found, "alike"), alone(folder, data=data, train={"epochs": 1}))
    assert "shared prefixes is False, on rank 0 True" in both(found, "alike_planted")[1]["text"]


# trap: L3b
def test_ranks_that_take_rows_of_other_steps_are_told_by_their_targets(found: Found) -> None:
    assert both(found, "other_rows_planted")[0]["error"] == "GroupError"
    assert "targets were computed by 2 ranks; the step has" in both(found, "other_rows_planted")[0]["text"]


# trap: D1
def test_replicas_that_drift_end_the_run_by_the_name_of_the_rank(found: Found) -> None:
    assert both(found, "lora")[0]["digest"] == both(found, "lora")[1]["digest"]
    for rank in both(found, "drift_planted"):
        assert rank["error"] == "GroupError"
        assert "step 0: the weights of rank 1 are not those of rank 0" in rank["text"]


def assert_seeds_differ(first: list[float], second: list[float]) -> None:
    assert len(first) == len(second) == 12
    assert not set(first) & set(second)


# trap: D2
def test_each_rank_drops_other_numbers_and_rank_0_those_of_a_run_alone(found: Found) -> None:
    assert_seeds_differ(*both(found, "seeds"))
    own = [(5 * 1_000_003 + step * 0x9E3779B97F4A7C15) % 2**63 for step in (1, 9)]
    assert [_step_seed(5, step, 0) for step in (1, 9)] == own


@pytest.mark.slow
def test_the_test_sees_ranks_that_drop_the_same_numbers(planted: Found) -> None:
    with pytest.raises(AssertionError):
        assert_seeds_differ(*both(planted, "seeds_planted"))


# trap: D5
def test_memory_that_ends_on_one_rank_changes_no_update(found: Found, folder: Path) -> None:
    ranks, one = both(found, "memory_ends"), alone(folder)
    assert_same_steps(ranks, one)
    assert any(ranks[0]["smaller"])
    assert min(filter(None, ranks[0]["smaller"])) <= 80


def assert_masks_are_those_of_the_look(ranks: list[Any], small: list[Any]) -> None:
    assert ranks[0] == ranks[1]
    assert any(ranks[0]["smaller"])
    assert [{**rank, "smaller": None} for rank in ranks] == [{**rank, "smaller": None} for rank in small]


def test_where_memory_ends_all_ranks_look_again(found: Found) -> None:  # trap: P25
    """With dropout: the step is, to the bit, that of a run which has such small passes from the start."""
    small = both(found, "looking_in_small_passes")
    assert_masks_are_those_of_the_look(both(found, "looking"), small)


@pytest.mark.slow
def test_the_test_sees_ranks_that_go_on_with_an_old_look(found: Found, planted: Found) -> None:
    with pytest.raises(AssertionError):
        assert_masks_are_those_of_the_look(both(planted, "looking_planted"), both(found, "looking_in_small_passes"))


def assert_both_give_up(ranks: list[Any]) -> None:
    assert [rank["error"] for rank in ranks] == ["OutOfMemoryError"] * 2
    assert all("step 1: out of memory on rank 1 in a micro-batch of one row" in rank["text"] for rank in ranks)


def test_memory_that_is_gone_on_one_rank_ends_both(found: Found) -> None:
    assert_both_give_up(both(found, "memory_is_gone"))


@pytest.mark.slow
def test_the_test_sees_a_rank_that_keeps_it_to_itself(planted: Found) -> None:
    with pytest.raises(AssertionError):
        assert_both_give_up(both(planted, "memory_is_gone_planted"))


def assert_no_update(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["error"] == "NonFiniteError"
        assert rank["same"]
        assert sorted(rank["text"].partition("Rows of the step: ")[2].partition(". Lower")[0].split(", ")) == sorted(
            ranks[1]["rows"]
        )


# trap: D6
def test_a_loss_that_is_no_number_on_one_rank_stops_all_and_names_its_rows(found: Found) -> None:
    assert_no_update(both(found, "not_finite"))


@pytest.mark.slow
def test_the_test_sees_ranks_that_look_before_they_meet(planted: Found) -> None:
    with pytest.raises((AssertionError, KeyError)):
        assert_no_update(both(planted, "not_finite_planted"))


def assert_stopped_together(ranks: list[Any]) -> None:
    assert [rank.get("error") for rank in ranks] == ["Stopped"] * 2
    assert "stopped after step 7 of 12" in ranks[0]["text"]
    assert "stopped after step 7 of 12" in ranks[1]["text"]


# trap: D7
def test_a_rank_that_is_asked_to_stop_stops_all_after_the_same_step(found: Found) -> None:
    assert_stopped_together(both(found, "stopped"))


@pytest.mark.slow
def test_the_test_sees_ranks_that_read_their_own_flag(planted: Found) -> None:
    with pytest.raises(AssertionError):
        assert_stopped_together(both(planted, "stopped_planted"))


# trap: D10, D13
def test_a_group_that_is_started_again_goes_on_bit_for_bit(found: Found, folder: Path) -> None:
    run = Run(folder / "stopped")
    assert {rank["run"] for rank in both(found, "resumed")} == {str(run.path)}
    assert values_of(run.events()) == values_of(Run(folder / "straight").events())
    assert [event.values["from_step"] for event in run.events() if event.kind == "resume"] == [7]
    assert both(found, "started_again") == both(found, "resumed")


def test_machines_without_a_common_disk_need_rank_0_where_the_run_lies(found: Found, folder: Path) -> None:
    assert [rank["error"] for rank in both(found, "apart")] == ["Stopped"] * 2
    swapped = both(found, "apart_swapped")
    assert swapped[0]["error"] == "InputError"
    assert f"{folder / 'machine-1' / 'run'}: rank 1 on " in swapped[0]["text"]
    assert "has a run there, rank 0 on " in swapped[1]["text"]
    run = Run(folder / "machine-0" / "run")
    assert (run.state(), [event.kind for event in run.events()].count("resume")) == ("done", 1)
    assert "run" not in both(found, "apart_again")[1]["left"]


def test_another_recipe_is_refused_where_a_run_lies(found: Found, folder: Path) -> None:
    refused = both(found, "another_recipe")
    assert refused[0]["error"] == "RunError"
    assert f"{folder / 'stopped'}: a run of another recipe" in refused[0]["text"]
    assert refused[1]["error"] == "GroupError"  # with the words of rank 0
    assert "another recipe" in refused[1]["text"]


def test_a_group_of_another_agent_needs_a_folder(found: Found) -> None:
    assert all(rank["error"] == "RecipeError" and "--out" in rank["text"] for rank in both(found, "without_folder"))


def losses(run: Run) -> list[float]:
    return [event.values["loss"] for event in run.events() if event.kind == "step"]


def test_a_run_of_two_goes_on_alone(found: Found, folder: Path, tmp_path: Path) -> None:
    """The losses before and after: to the rounding of float32."""
    assert "devices" in MAY_CHANGE
    expected = losses(Run(folder / "straight"))
    run = _copy_until(folder / "straight", tmp_path / "alone", step=10)
    resume(run, settings=["devices=1"])
    assert losses(run) == pytest.approx(expected, abs=1e-6)
    notes = [event.values["text"] for event in run.events() if event.kind == "note"]
    assert any("devices=1" in note for note in notes)
    assert run.recipe().devices == 1


@pytest.mark.slow
def test_the_test_sees_steps_that_depend_on_the_number_of_ranks(
    found: Found, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = StepSampler.rows
    monkeypatch.setattr(StepSampler, "rows", lambda plan, step: right(plan, step + 2 - plan.part[1]))
    run = _copy_until(folder / "straight", tmp_path / "alone", step=10)
    resume(run, settings=["devices=1"])
    assert losses(run) != pytest.approx(losses(Run(folder / "straight")), abs=1e-6)


def _copy_until(source: Path, target: Path, *, step: int) -> Run:
    """The run as it was at a checkpoint, as if it had been killed after it."""
    import shutil

    shutil.copytree(source, target)
    for path in (target / "checkpoints").iterdir():
        if path.name != f"step-{step}":
            shutil.rmtree(path)
    run = Run(target)
    log, saved = target / "events.jsonl", checkpoint.load(target / "checkpoints" / f"step-{step}").state["log"]
    log.write_bytes(log.read_bytes()[: saved["bytes"]])
    assert checkpoint.steps(run.checkpoints_path) == [step]
    return run


def assert_measured_once(two: Path, one: Path) -> None:
    for name in ("before.jsonl", "after.jsonl"):
        lines = [(folder / "evaluation" / name).read_text().splitlines() for folder in (two, one)]
        measured, expected = ([json.loads(line)["loss"] for line in some] for some in lines)
        assert len(measured) == len(expected)
        if name == "before.jsonl":  # the weights after are equal to rounding only
            assert measured == expected


@pytest.fixture(scope="module")
def run_alone(folder: Path) -> Run:
    evaluation = {"samples": 9, "sample_tokens": 2, "surprising": 8, "every": 4}
    return train(recipe_of(folder, evaluation=evaluation), root=folder / "alone", out=folder / "run-alone")


# trap: D8
def test_each_row_is_measured_once_with_the_bits_of_one_process(found: Found, folder: Path, run_alone: Run) -> None:
    assert_measured_once(folder / "straight", run_alone.path)


@pytest.mark.slow
def test_the_test_sees_rows_that_nobody_measures(planted: Found, folder: Path, run_alone: Run) -> None:
    with pytest.raises(AssertionError):
        assert_measured_once(folder / "padded", run_alone.path)


def test_answers_best_step_and_result_are_those_of_one_process(found: Found, folder: Path, run_alone: Run) -> None:
    two = Run(folder / "straight")
    for run in (two, run_alone):
        assert sorted(path.name for path in run.adapter_path.iterdir())
    samples = [[e.values for e in run.events() if e.kind == "sample" and e.step == 0] for run in (two, run_alone)]
    assert samples[0] == samples[1]
    evaluations = [[e.values["loss"] for e in run.events() if e.kind == "evaluation"] for run in (two, run_alone)]
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-5)
    assert two.report["metrics"]["after"]["measures"]["loss"]["value"] == pytest.approx(
        run_alone.metrics["loss"]["value"], abs=1e-5
    )


def assert_one_writer(run: Run) -> None:
    steps = [event.step for event in run.events() if event.kind == "step"]
    assert len(steps) > 1
    assert all(b == a + 1 for a, b in pairwise(steps))


# trap: D9
def test_one_rank_writes(found: Found, folder: Path) -> None:
    assert_one_writer(Run(folder / "straight"))


@pytest.mark.slow
def test_the_test_sees_two_writers(planted: Found, folder: Path) -> None:
    with pytest.raises(AssertionError):
        assert_one_writer(Run(folder / "two-writers"))


# trap: D16
def test_what_the_first_rank_decides_holds_for_all(found: Found) -> None:
    """The smallest memory counts."""
    first, second = both(found, "less_memory")
    assert first["recipe"] == second["recipe"]
    assert first["rooms"] == second["rooms"]
    assert first["room"] == first["rooms"][1] < first["rooms"][0]
    refused = both(found, "less_memory_planted")
    assert refused[1]["error"] == "RunError"
    assert "setting train.tokens_per_pass is 97, on rank 0 96" in refused[1]["text"]


# trap: D17
def test_rows_may_take_longer_than_any_time_out(found: Found) -> None:
    assert len(both(found, "slow_rows")[1]["losses"]) == 1


@pytest.mark.slow
def test_the_test_sees_a_wait_without_signs_of_life(planted: Found) -> None:
    ranks = both(planted, "slow_rows_planted")
    assert ranks[1]["error"] == "GroupError"
    assert "rank 0 of 2 gave no sign of life for 1 s" in ranks[1]["text"]


def test_ranks_with_other_data_or_versions_are_refused(found: Found) -> None:
    data = both(found, "other_data")
    assert data[1]["error"] == "RunError"
    assert "chats.jsonl is " in data[1]["text"]
    for rank in both(found, "other_version"):
        assert rank["error"] in ("InputError", "GroupError")
        assert "has torch 9.1, rank 0 on" in rank["text"]


# trap: D19
def test_the_result_does_not_lie_with_what_libraries_do_in_a_group(found: Found, folder: Path) -> None:
    """transformers' own saving writes nothing on rank 1: what a rank reads back is therefore rank 0's."""
    first, second = both(found, "saved_by_the_library")
    assert "model.safetensors" in first
    with pytest.raises(AssertionError):
        assert second == first
    assert (folder / "straight" / "adapter" / "adapter_model.safetensors").is_file()
    assert os.listdir(folder / "straight" / "exports") == [] if (folder / "straight" / "exports").exists() else True
