"""A run on two sources: its shares, each source's own loss in events and report, and an exact resume."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tiny_run import chats, tiny_recipe, values_of
from tiny_tasks import rows_of, task_recipe, write
from tunesmith.errors import Stopped
from tunesmith.evaluation.scores import loss_by_source
from tunesmith.recipe.schema import DataFile, Recipe
from tunesmith.runs.folder import Run
from tunesmith.training.progress import Listener
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import resume, train

pytestmark = pytest.mark.pages


def recipe(folder: Path) -> Recipe:
    files = [
        {"path": str(chats(folder / "a.jsonl", 16, seed=1)), "weight": 0.75},
        {"path": str(chats(folder / "b.jsonl", 30, seed=2)), "weight": 0.25},
    ]
    return tiny_recipe(folder, data={"train": files, "mix": "shares", "held_out": 0.25}, evaluation={"every": 3})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("mixed")
    return train(recipe(folder), root=folder / "runs")


def events_of(run: Run, kind: str) -> list[Any]:
    return [event for event in run.events() if event.kind == kind]


def test_the_plan_and_the_report_name_the_mix(run: Run) -> None:
    (plan,) = events_of(run, "plan")
    assert [round(one["share"], 2) for one in plan.values["mix"]] == pytest.approx([0.75, 0.25], abs=0.03)
    assert plan.values["mix"][0]["times"] == 1
    assert run.report["mix"] == plan.values["mix"]


def test_the_steps_of_an_epoch_have_the_shares(run: Run) -> None:
    (plan,) = events_of(run, "plan")
    rows = [row for event in events_of(run, "step")[: plan.values["steps_per_epoch"]] for row in event.values["rows"]]
    seen = Counter("a" if row < 16 else "b" for row in rows)
    assert seen["a"] == plan.values["mix"][0]["rows"]
    assert seen["b"] == round(plan.values["mix"][1]["rows"] * plan.values["mix"][1]["times"])


def test_every_evaluation_has_the_loss_of_each_source(run: Run) -> None:
    for event in events_of(run, "evaluation"):
        sources = event.values["sources"]
        assert [Path(path).name for path in sources] in (["a.jsonl", "b.jsonl"], ["b.jsonl", "a.jsonl"])
        assert sum(one["rows"] for one in sources.values()) == event.values["rows"]
        low, high = sorted(one["loss"]["value"] for one in sources.values())
        assert low <= event.values["loss"] <= high


def test_the_report_shows_both_sources(run: Run) -> None:
    page = (run.path / "report.html").read_text("utf-8")
    assert "each seen per epoch" in page
    assert all(f"{name}.jsonl" in page for name in "ab")


def test_losses_of_sources_add_up_to_the_loss_of_all_rows() -> None:
    rows = [{"hash": f"{at:016x}", "loss": 1.0 + at, "count": 2.0, "correct": 0} for at in range(6)]
    found = loss_by_source(rows, ["a", "b"] * 3)
    assert found["a"]["loss"]["value"] == (1 + 3 + 5) / 6
    assert found["b"]["loss"]["value"] == (2 + 4 + 6) / 6
    assert loss_by_source(rows, ["a"] * 6) == {}


@pytest.mark.slow  # what a step takes follows from its number: tests/data/test_mixing.py
def test_a_mixed_run_resumes_bit_for_bit(run: Run, tmp_path: Path) -> None:
    stopped = []

    def should_stop() -> bool:
        stopped.append(1)
        return len(stopped) == 5

    with pytest.raises(Stopped):
        train(recipe(tmp_path), root=tmp_path / "runs", out=tmp_path / "r", listener=Listener(should_stop=should_stop))
    again = resume(Run(tmp_path / "r"))

    def steps(of: Run) -> list[Any]:
        return [value for value in values_of(of.events()) if value[0] == "step"]

    assert steps(again) == steps(run)


@pytest.mark.parametrize(("weight", "rows_per_step"), [(2.0, 5), (0.4, 7), (3.0, 4)])
def test_so_many_epochs_between_evaluations_are_epochs_of_the_sampler(
    tmp_path: Path, weight: float, rows_per_step: int
) -> None:
    """Rows that are taken more often, or in part, make epochs of another length than the rows of the files."""
    given = task_recipe(tmp_path, "classify", "encoder", rows=40, train={"rows_per_step": rows_per_step, "epochs": 6})
    more = write(tmp_path / "more.jsonl", rows_of("classify", 30, seed=3))
    files = (given.data.train[0], DataFile(path=str(more), weight=weight))
    held = write(Path(given.data.eval[0].path), rows_of("classify", 40, seed=7))
    data = given.data.model_copy(update={"train": files, "eval": (DataFile(path=str(held)),)})
    evaluation = given.evaluation.model_copy(update={"every": "auto"})
    setup = prepare(given.model_copy(update={"data": data, "evaluation": evaluation}), root=tmp_path / "runs")
    reason = next(choice.reason for choice in setup.choices if choice.key == "evaluation.every")
    num = int(re.match(r"every (\d+) epochs", reason)[1])  # type: ignore[index]
    assert num > 1
    assert setup.recipe.evaluation.every == num * setup.sampler.steps_per_epoch
