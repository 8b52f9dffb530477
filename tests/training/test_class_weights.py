"""A run with weights of classes: whoever measures its result again finds the loss that its report has."""

from dataclasses import replace
from pathlib import Path

import pytest

from tiny_tasks import task_recipe
from tunesmith.inference.load import load_run
from tunesmith.inference.measure import evaluate_file
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("weights")
    recipe = task_recipe(folder, "classify", "encoder", rows=25, train={"class_weights": "balanced", "max_steps": 2})
    path = Path(recipe.data.train[0].path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[5:]).replace("fruit", "place", 6))
    return train(recipe, root=folder / "runs", offline=True)


# trap: M3
def test_eval_finds_the_weighted_loss_of_the_report(run: Run) -> None:
    speaker, path = load_run(run, offline=True), run.recipe().data.eval[0].path
    weights = run.recipe().train.class_weights
    assert isinstance(weights, dict), "what balanced came to is in the recipe of the run"
    assert weights["fruit"] > 1 > weights["place"]
    reported = run.read_json("report.json")["metrics"]["after"]["loss"]

    def check(loss: float) -> None:
        assert loss == pytest.approx(reported, abs=1e-5)  # float32 in passes of other lengths

    check(evaluate_file(speaker, path).measures["loss"]["value"])
    assert speaker.labels is not None
    unweighted = replace(speaker, labels=replace(speaker.labels, weights_C=None))
    with pytest.raises(AssertionError):
        check(evaluate_file(unweighted, path).measures["loss"]["value"])


def test_the_recipe_of_a_weighted_run_repeats_it(run: Run, tmp_path: Path) -> None:
    again = train(run.recipe(), root=tmp_path, offline=True)
    losses = [[event.values["loss"] for event in one.events() if event.kind == "step"] for one in (run, again)]
    assert losses[0] == losses[1]
