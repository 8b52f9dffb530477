"""A run that learns from rewards on two processes is the run of one: answers, grades, losses, weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.group import start
from parallel.reward_scenarios import recipe_of
from tiny_run import last_tensors, same_run, same_to_rounding
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import train

EXACT = ("rows", "ended", "answer_tokens", "longest_answer", "reward", "spread")
NEAR = ("loss", "surprise", "mismatch", "clipped_low", "clipped_high", "kl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rewards")
    recipe_of(made)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return start(folder, "straight", module="parallel.reward_scenarios")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Run:
    return train(recipe_of(folder), root=folder / "alone")


def answers_of(run: Run) -> list[Any]:
    files = sorted((run.path / "rollouts").glob("step-*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [[line[key] for key in ("source", "sample", "text", "reward", "advantage")] for line in lines]


def assert_run_of_one(run: Run, alone: Run) -> None:
    assert answers_of(run) == answers_of(alone)
    same_to_rounding(run, alone, exact=EXACT, near=NEAR)
    one, two = last_tensors(alone), last_tensors(run)
    assert all(torch.allclose(two[name], tensor, atol=1e-4) for name, tensor in one.items())


def test_two_processes_draw_grade_and_learn_as_one(found, folder, alone):  # trap: G11, G21
    assert "error" not in found[0]["straight"], found[0]
    assert_run_of_one(Run(folder / "straight"), alone)
    assert len(answers_of(alone)) == 6 * 3 * 4


def test_the_rank_that_grades_alone_has_a_grader_at_work(found):
    assert [rank["straight"]["graders"] for rank in found] == [1, 0]


@pytest.mark.slow
def test_the_test_sees_answers_that_are_given_to_other_prompts(folder, alone):
    start(folder, "swapped_planted", module="parallel.reward_scenarios")
    with pytest.raises((AssertionError, FileNotFoundError)):
        assert_run_of_one(Run(folder / "swapped"), alone)


@pytest.mark.slow
def test_two_processes_stopped_within_a_draw_end_as_those_that_never_were(found, folder):  # trap: G22
    again = start(folder, "stopped", "resumed", module="parallel.reward_scenarios")
    assert "stopped after step 3" in again[0]["stopped"]
    same_run(Run(folder / "stopped"), Run(folder / "straight"))
