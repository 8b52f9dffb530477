"""Results at the ends of epochs, and evaluations there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_run import stop_at, tiny_recipe
from tunesmith.errors import Stopped
from tunesmith.inference.load import load_run
from tunesmith.runs import checkpoint
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import resume, train

STEPS = 6
"""Of an epoch: 16 rows, 3 a step."""


def steps_of(run: Run, kind: str) -> list[int]:
    return [event.step for event in run.events() if event.kind == kind]


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter_path / "adapter_model.safetensors")


def test_ends_of_epochs_are_measured_and_kept(tmp_path: Path) -> None:
    how = {"evaluation": {"every": "epoch", "keep": "last"}, "checkpoint": {"every": 1, "keep": 20, "snapshots": 2}}
    recipe = tiny_recipe(tmp_path, train={"epochs": 4}, **how)
    run = train(recipe, root=tmp_path / "runs", out=tmp_path / "whole")
    assert run.recipe().evaluation.every == STEPS
    assert steps_of(run, "evaluation") == [0, STEPS, 2 * STEPS, 3 * STEPS, 4 * STEPS]
    assert steps_of(run, "snapshot") == [2 * STEPS, 3 * STEPS], "the newest two before the end"
    snapshots = [Run(run.snapshots_path / f"step-{step}") for step in (2 * STEPS, 3 * STEPS)]
    assert sorted(run.snapshots_path.iterdir()) == [one.path for one in snapshots]
    for one, step in zip(snapshots, (2 * STEPS, 3 * STEPS), strict=True):
        then = checkpoint.load(run.checkpoints_path / f"step-{step}").weights
        now = load_run(one, offline=True).attachment.trained
        assert now.keys() == then.keys()
        assert all(torch.equal(now[name], then[name]) for name in then)

    with pytest.raises(Stopped):
        train(recipe, root=tmp_path / "runs", out=tmp_path / "cut", listener=stop_at(2 * STEPS - 1))
    cut = 2 * STEPS - 1
    stopped = Run(Run(tmp_path / "cut").snapshots_path / f"step-{cut}")
    now = load_run(stopped, offline=True).attachment.trained
    then = checkpoint.load(run.checkpoints_path / f"step-{cut}").weights
    again = resume(Run(tmp_path / "cut"))
    assert steps_of(again, "snapshot") == [cut, 2 * STEPS, 3 * STEPS], "where it was stopped, too"
    assert [event.values["at"] for event in again.events() if event.kind == "snapshot"] == ["stop", "epoch", "epoch"]
    assert all(torch.equal(now[name], then[name]) for name in then)
    same, other = (adapter(Run(one.snapshots_path / f"step-{2 * STEPS}")) for one in (run, again))
    assert all(torch.equal(same[name], other[name]) for name in same)


def test_a_run_of_one_epoch_has_its_result_alone(tmp_path: Path) -> None:
    run = train(tiny_recipe(tmp_path, train={"epochs": 1}, checkpoint={"snapshots": 2}), root=tmp_path / "runs")
    assert steps_of(run, "snapshot") == []
    assert not run.snapshots_path.exists()
