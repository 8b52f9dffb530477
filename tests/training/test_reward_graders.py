"""A run of task reward as the grader of another run."""

from pathlib import Path

import pytest

from rewarded import rewarded
from tiny_run import same_run, stopped
from tiny_tasks import task_recipe
from tunesmith.errors import InputError
from tunesmith.graders import schema
from tunesmith.graders.grade import Answer
from tunesmith.graders.pool import Pool
from tunesmith.inference.load import load_run
from tunesmith.inference.predict import Predictor, predict_list
from tunesmith.inference.reward_scores import RewardScorer, reward_run, weights_of
from tunesmith.runs.folder import Run
from tunesmith.training.resolve import resolve_run
from tunesmith.training.trainer import resume, train

QUICK = {"evaluation": {"samples": 0, "general": False}, "train": {"max_steps": 2}, "precision": "float32"}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("judge")
    return train(task_recipe(folder, "reward", "causal", rows=12, **QUICK), root=folder / "runs")


def test_a_grade_is_the_number_that_the_run_predicts(judge: Run) -> None:
    grader = schema.load(f"run:{judge.path}")
    answers = ("yes please", "no\n no")
    with Pool(grader, scorer_of=lambda part: RewardScorer(part, root=judge.path.parent)) as pool:
        graded = [pool.submit(Answer(text), {"prompt": "Hello there", "n": 1}).result() for text in answers]
        assert pool.submit(Answer(""), {"prompt": "Hello there"}).result().reward is not None
        identity = pool.identity
    rows = [{"prompt": "Hello there", "completion": text} for text in answers]
    lines = predict_list(Predictor(load_run(judge)), rows)
    assert [grade.reward for grade in graded] == pytest.approx([line["reward"] for line in lines], abs=1e-5)
    named = grader.model_copy(update={"run": judge.path.name})
    with Pool(named, scorer_of=lambda part: RewardScorer(part, root=judge.path.parent)) as pool:
        assert pool.identity == identity, "wherever it lies"


def test_an_answer_that_it_cannot_read_has_no_reward(judge: Run) -> None:
    with Pool(schema.load(f"run:{judge.path}"), scorer_of=lambda part: RewardScorer(part, root=Path())) as pool:
        grade = pool.submit(Answer("word " * 4000), {"prompt": "Hello"}).result()
        assert grade.reward is None
        assert "the reward run cannot read it" in grade.error


def test_what_is_no_reward_run_is_refused(judge: Run, tmp_path: Path) -> None:
    grader = schema.load(f"run:{tmp_path / 'none'}")
    with pytest.raises(InputError, match="none"):
        reward_run(grader, tmp_path)
    other = train(task_recipe(tmp_path, "chat", "causal", rows=8, **QUICK), root=tmp_path / "runs")
    with pytest.raises(InputError, match="is a run of task chat"):
        reward_run(schema.load(f"run:{other.path.name}"), tmp_path / "runs")
    with pytest.raises(InputError, match="`train` and `grade` only"), Pool(grader):
        pass


def test_a_run_learns_from_it_and_goes_on_bit_for_bit(judge: Run, tmp_path: Path) -> None:
    recipe = rewarded(tmp_path, train={"max_steps": 3})
    recipe = recipe.model_copy(
        update={"reinforce": recipe.reinforce.model_copy(update={"grader": f"run:{judge.path}"})}
    )
    plan = resolve_run(recipe, root=tmp_path / "runs")
    assert plan.forecast is not None
    assert plan.forecast.memory.other_models == weights_of(schema.load(f"run:{judge.path}"), Path()) > 0
    whole = train(recipe, root=tmp_path / "runs")
    rewards = [event.values["reward"] for event in whole.events() if event.kind == "step"]
    assert len(set(rewards)) == 3
    same_run(resume(stopped(whole.recipe(), tmp_path / "stopped", 2)), whole)
