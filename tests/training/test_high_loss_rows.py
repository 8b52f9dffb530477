"""Rows of high loss are found among the losses that training saw: each row's own, before its update, measured once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_run import tiny_recipe
from tiny_tasks import task_recipe
from tunesmith.evaluation import predict_rows as predicting
from tunesmith.models.fused_loss import OutputLayer
from tunesmith.runs.folder import Run
from tunesmith.tasks import losses
from tunesmith.training import evaluate as looking
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.trainer import train


def seen(run: Run, last: int) -> dict[int, float]:
    """Row → its loss in its last step after step `last`."""
    steps = [event for event in run.events() if event.kind == "step" and event.step > last]
    return {row: loss for e in steps for row, loss in zip(e.values["rows"], e.values["row_losses"], strict=True)}


def measured_before_each_step(setup: Setup) -> None:
    """The losses in a step's event are those of its rows under the weights before it."""
    steps = training_steps(setup)
    for step in range(1, setup.total_steps + 1):
        rows = setup.sampler.rows(step)
        found = predicting.predict_rows(setup.model, setup.task, setup.collator, rows, tokens_per_pass=1000)
        values = next(steps).values
        own = dict(zip(values["rows"], values["row_losses"], strict=True))
        assert [own[row] for row in rows] == pytest.approx(found.losses_I.tolist(), rel=1e-4)
        assert sum(own.values()) / values["targets"] == pytest.approx(values["loss"], rel=1e-4)


@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_a_step_tells_the_loss_of_each_of_its_rows_before_the_update(tmp_path: Path, kernels: str) -> None:
    measured_before_each_step(prepare(tiny_recipe(tmp_path, kernels=kernels), root=tmp_path))


@pytest.mark.parametrize(("task", "kind"), [("classify", "encoder"), ("tag", "encoder"), ("text", "causal")])
def test_of_every_task_that_adds_up_targets(tmp_path: Path, task: str, kind: str) -> None:
    recipe = task_recipe(tmp_path, task, kind, rows=12, dropout=0.0, train={"epochs": 1})
    measured_before_each_step(prepare(recipe, root=tmp_path))


def test_the_losses_of_targets_are_those_that_the_sum_adds_up() -> None:
    layer = torch.nn.Linear(8, 50)
    hidden, targets = torch.randn(7, 8, requires_grad=True), torch.arange(7)
    one_by_one: list[torch.Tensor] = []
    total = OutputLayer(layer, 1.0, False, None).loss_sum(hidden, targets, smoothing=0.1, z=0.01, losses=one_by_one)
    assert not one_by_one[0].requires_grad
    assert float(one_by_one[0].sum()) == pytest.approx(float(total), rel=1e-6)
    options = losses.Loss(label_smoothing=0.1, z_loss=0.01)
    assert one_by_one[0].tolist() == pytest.approx(
        losses.target_losses(layer(hidden), targets, options).tolist(), rel=1e-5
    )


@pytest.mark.pages
def test_rows_of_high_loss_come_from_the_last_epoch_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    outcomes = looking._outcomes

    def counted(session, collator, rows_I, what, writing=None):
        asked.append(what)
        return outcomes(session, collator, rows_I, what, writing)

    monkeypatch.setattr(looking, "_outcomes", counted)
    run = train(tiny_recipe(tmp_path, rows=40), root=tmp_path / "runs")
    assert asked == ["evaluate", "evaluate"]
    listed = json.loads((run.path / "evaluation" / "surprising.json").read_text())
    plan = next(event.values for event in run.events() if event.kind == "plan")
    own = seen(run, plan["steps"] - plan["steps_per_epoch"])
    assert (listed["looked_at"], listed["from"]) == (len(own), "training")
    assert len(own) == plan["rows"]["train"]
    setup = prepare(tiny_recipe(tmp_path, rows=40), root=tmp_path / "again")
    per_target = {row: loss / setup.rows.store.denominators[row] for row, loss in own.items()}
    best = sorted(per_target, key=lambda row: -per_target[row])[:20]
    assert [row["source"] for row in listed["rows"]] == [str(setup.rows.store.source(row)) for row in best]
    assert [row["loss"] / row["count"] for row in listed["rows"]] == pytest.approx([per_target[row] for row in best])
    assert "of highest loss, of 36 that were learnt in the last epoch" in (run.path / "report.md").read_text()


def test_a_classifier_says_what_it_answers_to_the_listed_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    outcomes = looking._outcomes

    def counted(session, collator, rows_I, what, writing=None):
        numbers.extend([len(rows_I)] if what == "surprise" else [])
        return outcomes(session, collator, rows_I, what, writing)

    monkeypatch.setattr(looking, "_outcomes", counted)
    run = train(task_recipe(tmp_path, "classify", "encoder", rows=60), root=tmp_path / "runs")
    listed = json.loads((run.path / "evaluation" / "surprising.json").read_text())
    assert numbers == [20]
    assert listed["looked_at"] == 60
    assert all("predicted" in row for row in listed["rows"])
    found = [row["loss"] / row["count"] for row in listed["rows"]]
    assert found == sorted(found, reverse=True)


def test_fewer_rows_are_looked_at_where_the_recipe_says_so(tmp_path: Path) -> None:
    run = train(tiny_recipe(tmp_path, rows=40, evaluation={"surprising": 7, "samples": 0}), root=tmp_path / "runs")
    listed = json.loads((run.path / "evaluation" / "surprising.json").read_text())
    assert listed["looked_at"] == len(listed["rows"]) == 7
    assert np.all(np.diff([row["loss"] / row["count"] for row in listed["rows"]]) <= 0)
