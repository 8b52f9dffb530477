"""A run with a teacher on two processes is the run of one: lists, answers, losses, weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.distil_scenarios import recipe_of
from parallel.group import start
from scoring import scoring
from tiny_run import last_tensors, same_to_rounding
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import train

NAMES = ("off_policy", "on_policy")
EXACT = ("rows", "targets", "ended", "answer_tokens", "longest_answer")
NEAR = ("loss", "surprise", "grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("taught")
    recipe_of(made, "on_policy")
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return start(folder, *NAMES, module="parallel.distil_scenarios")


def assert_run_of_one(folder: Path, run: Run, name: str) -> None:
    alone = train(recipe_of(folder, name), root=folder / "alone")
    same_to_rounding(run, alone, exact=EXACT, near=NEAR)
    of_two = last_tensors(run)
    # Adam makes of a gradient near zero a step of its whole rate
    assert all(torch.allclose(of_two[name], tensor, atol=2e-3) for name, tensor in last_tensors(alone).items())


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_learn_as_one(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    assert "error" not in ranks[0][name], ranks[0]
    assert_run_of_one(folder, Run(folder / name), name)


def test_rows_are_read_by_the_first_rank_alone(ranks: list[dict[str, Any]]) -> None:
    assert [rank["off_policy"]["loads"] for rank in ranks] == [1, 0]
    assert [rank["on_policy"]["loads"] for rank in ranks] == [1, 1], "each reads the answers that it learns"
    for name in ("off_policy", "on_policy"):
        assert [bool(rank[name]["reads"]) for rank in ranks] == [True, False]


@pytest.mark.slow
def test_two_processes_ask_a_teacher_at_an_address_as_one(folder: Path) -> None:
    with scoring(folder / "teacher") as server:
        (folder / "address").write_text(server.address)
        [first, _] = start(folder, "at_address", module="parallel.distil_scenarios")
        assert "error" not in first["at_address"], first
        assert_run_of_one(folder, Run(folder / "at_address"), "at_address")


@pytest.mark.slow
def test_answers_that_are_given_to_other_prompts_are_seen(folder: Path) -> None:
    start(folder, "swapped_planted", module="parallel.distil_scenarios")
    with pytest.raises((AssertionError, FileNotFoundError)):
        assert_run_of_one(folder, Run(folder / "swapped"), "on_policy")
