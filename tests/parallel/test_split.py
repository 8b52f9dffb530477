"""Layers split over two processes: less memory, the steps of one process, checkpoints whole or absent. On gloo, in one
start for all checks."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from often import slow
from parallel.group import start
from parallel.scenarios import steps_of
from parallel.split_scenarios import KILLED_AT, make_inputs, run_recipe, whole_recipe_of
from parallel.test_group import Found, _copy_until, alone, both, losses
from tunesmith.data.sampler import StepSampler
from tunesmith.runs import checkpoint
from tunesmith.runs.folder import Run
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import resume, train

SCENARIOS = ("full", "memory_ends", "run_full", "resumed_by_two", "killed")
RARE = ("lora", "recomputed", "few_rows", "rounded", "alike", "plain", "rehearsed", "run_lora")
"""With other settings, before a release."""
PLANTED = ("counted_planted", "averaged_planted", "own_norm_planted", "unhooked_planted", "killed_planted")
"""Bugs that nothing but the tests below would see: slow, as in test_group.py."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("split")
    make_inputs(made)
    return made


@pytest.fixture(scope="module")
def run_alone(folder: Path) -> Run:
    return train(run_recipe(folder, "full"), root=folder / "alone", out=folder / "run-alone")


@pytest.fixture(scope="module")
def found(folder: Path, run_alone: Run) -> Found:
    _copy_until(run_alone.path, folder / "from-one", step=10)
    return start(folder, *SCENARIOS, module="parallel.split_scenarios", killed=(1,))


@pytest.fixture(scope="module")
def rare(folder: Path) -> Found:
    return start(folder, *RARE, module="parallel.split_scenarios")


@pytest.fixture(scope="module")
def planted(folder: Path) -> Found:
    return start(folder, *PLANTED, module="parallel.split_scenarios", killed=(1,))


def assert_same_losses(rank: dict[str, Any], one: dict[str, Any]) -> None:
    """float32 sums in another order: 1e-6 for losses of about 6."""
    assert rank["losses"] == pytest.approx(one["losses"], abs=1e-6)


@pytest.mark.parametrize(("fixture", "method"), [slow(("rare", "lora")), ("found", "full")])
def test_split_layers_take_the_steps_of_whole_ones_and_less_memory(
    fixture: str, method: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    ranks, one = both(request.getfixturevalue(fixture), method), alone(folder, method)
    for rank in ranks:
        assert rank["share"] <= 0.6
        assert_same_losses(rank, one)
        assert rank["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert rank["trained"] == 1 if method == "lora" else rank["trained"] <= 0.6
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert ranks[0]["digest"] == ranks[1]["digest"]


def passes_of(plan: StepSampler, step: int, size: int = 2) -> list[int]:
    parts = [replace(plan, part=(rank, size)) for rank in range(size)]
    return [len(part.step(step)) + len(part.idle(step)) for part in parts]


# trap: D3
def test_every_rank_runs_as_many_passes(found: Found, folder: Path) -> None:
    """Another number of passes ends the processes: gloo calls std::terminate for collectives that do not match."""
    assert sum(rank["idle"] for rank in both(found, "full")) > 0
    plan = prepare(whole_recipe_of(folder), root=folder / "alone").sampler
    for size in (2, 3, 4):
        assert all(len(set(passes_of(replace(plan, equal_passes=True), step, size))) == 1 for step in range(1, 13))
    assert any(len(set(passes_of(plan, step))) > 1 for step in range(1, 13))  # the test sees it


# trap: D4, D14
@pytest.mark.slow
@pytest.mark.parametrize("bug", ["counted_planted", "averaged_planted"])
def test_the_test_sees_passes_that_count_and_means_over_ranks(planted: Found, folder: Path, bug: str) -> None:
    for rank in both(planted, bug):
        assert len(rank["losses"]) == 12
        with pytest.raises(AssertionError):
            assert_same_losses(rank, alone(folder, "full"))


@pytest.mark.slow
def test_the_test_sees_gradients_clipped_by_the_norm_of_own_pieces(planted: Found, folder: Path) -> None:
    for rank in both(planted, "own_norm_planted"):
        assert rank["norms"] != pytest.approx(alone(folder, "full")["norms"], rel=1e-2)


# trap: D15
@pytest.mark.slow
def test_nodes_that_read_weights_find_them_whole(rare: Found, folder: Path) -> None:
    """With the nodes of this package and without."""
    for rank in both(rare, "plain"):
        assert_same_losses(rank, alone(folder, "full"))


@pytest.mark.slow
def test_pieces_of_a_layer_would_not_go_through_unnoticed(planted: Found) -> None:
    assert all(rank["error"] in ("RuntimeError", "GroupError") for rank in both(planted, "unhooked_planted"))


@pytest.mark.slow
def test_beginnings_that_rows_share_are_computed_once(rare: Found, folder: Path) -> None:
    one = alone(folder, "full", data={"train": [str(folder / "alike.jsonl")]}, train={"epochs": 1})
    for rank in both(rare, "alike"):
        assert rank["shares"]
        assert_same_losses(rank, one)


# trap: D15
@pytest.mark.slow
def test_recomputed_layers_and_ranks_without_rows_change_nothing(rare: Found, folder: Path) -> None:
    for name, train_options in (
        ("recomputed", {"max_steps": 4}),
        ("few_rows", {"epochs": 1, "rows_per_step": 1, "max_steps": 3}),
    ):
        one = alone(folder, "full", train=train_options)
        for rank in both(rare, name):
            assert_same_losses(rank, one)


@pytest.mark.slow
def test_pieces_in_bfloat16_have_masters_in_float32(rare: Found, folder: Path) -> None:
    """bfloat16: losses of about 6 to its rounding; masters begin elsewhere in their cells."""
    recipe = whole_recipe_of(folder, "full", train={"max_steps": 4}).model_copy(update={"precision": "bfloat16"})
    one = steps_of(prepare(recipe, root=folder / "alone"))
    for rank in both(rare, "rounded"):
        assert rank["types"] == ["torch.float32"]
        assert rank["losses"] == pytest.approx(one["losses"], abs=2e-2)


def test_memory_that_ends_inside_a_pass_ends_the_rank_with_a_way_on(found: Found) -> None:
    """The others wait inside the pass, until its process ends."""
    waiting, ended = both(found, "memory_ends")
    assert "error" in waiting
    assert ended["error"] == "GroupError"
    assert "step 2: out of memory on rank 1" in ended["text"]
    assert "--set train.tokens_per_pass=48" in ended["text"]


@pytest.mark.slow
def test_the_heaviest_pass_is_tried_before_the_first_step(rare: Found, folder: Path) -> None:
    _, ended = both(rare, "rehearsed")
    assert ended["error"] == "GroupError"
    assert "before the first step: out of memory on rank 1 in the heaviest pass, of " in ended["text"]
    assert "Resume with --set train.tokens_per_pass=48" in ended["text"]
    assert not [event for event in Run(folder / "run-rehearsed").events() if event.kind == "step"]


def test_a_run_with_split_layers_measures_and_answers_as_one_process_does(
    found: Found, folder: Path, run_alone: Run
) -> None:
    split = Run(folder / "run-full")
    assert losses(split) == pytest.approx(losses(run_alone), abs=1e-6)
    for kind, key in (("sample", "answer"), ("evaluation", "loss")):
        values = [[e.values[key] for e in run.events() if e.kind == kind] for run in (split, run_alone)]
        assert values[0] == (values[1] if kind == "sample" else pytest.approx(values[1], abs=1e-5))
    weights = [load_file(run.model_path / "model.safetensors") for run in (split, run_alone)]
    assert weights[0].keys() == weights[1].keys()
    far = {name: float((weights[0][name] - weight).abs().max()) for name, weight in weights[1].items()}
    # One process computes norms and MLPs by nodes that split layers do not have: AdamW enlarges what they round.
    assert {name: distance for name, distance in far.items() if distance > 5e-5} == {}


@pytest.mark.slow
def test_a_run_of_adapters_with_split_layers_has_its_result(rare: Found, folder: Path) -> None:
    assert (folder / "run-lora" / "adapter" / "adapter_model.safetensors").is_file()


# trap: D10
def test_a_run_of_two_goes_on_alone_and_that_of_one_as_two(
    found: Found, folder: Path, run_alone: Run, tmp_path: Path
) -> None:
    """Saved on two and resumed on one, saved on one and resumed on two: the losses of an undisturbed run."""
    run = _copy_until(folder / "run-full", tmp_path / "from-two", step=10)
    resume(run, settings=["devices=1"])
    for resumed in (run, Run(folder / "from-one")):
        assert losses(resumed) == pytest.approx(losses(run_alone), abs=1e-6)
        assert resumed.state() == "done"
    assert run.recipe().shard is False
    assert Run(folder / "from-one").recipe().shard is True
    assert Run(folder / "from-one").recipe().devices == 2


def assert_whole(run: Run) -> None:
    assert checkpoint.steps(run.checkpoints_path) == [0, KILLED_AT - 2]
    assert not list(run.checkpoints_path.glob(f"step-{KILLED_AT}*"))


@pytest.mark.slow
def test_the_test_sees_a_checkpoint_that_is_half_there(planted: Found, folder: Path) -> None:
    with pytest.raises(AssertionError):
        assert_whole(Run(folder / "killed-planted"))


# trap: D11
def test_a_rank_that_is_killed_while_it_saves_leaves_the_checkpoint_before(
    found: Found, folder: Path, run_alone: Run, tmp_path: Path
) -> None:
    assert found[0]["killed"]["error"] == "GroupError"
    run = Run(folder / "killed")
    assert_whole(run)
    shutil.copytree(run.path, tmp_path / "goes-on")
    resume(Run(tmp_path / "goes-on"), settings=["devices=1"])
    assert losses(Run(tmp_path / "goes-on")) == pytest.approx(losses(run_alone), abs=1e-6)
