"""Rotation never takes the best or the newest."""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tunesmith.runs import checkpoint


def save(folder: Path, step: int) -> None:
    checkpoint.save(folder, step, weights={"w": torch.tensor([step])}, optimizer={}, state={})


def never(path: Path, reason: str) -> None:
    raise AssertionError(f"{path} is called damaged: {reason}")


def rotate_by_name(folder: Path, *, keep: int, best: int | None) -> list[int]:
    """Planted bug: step-1000 before step-200."""
    names = sorted(path.name for path in folder.glob("step-*"))
    doomed = [name for name in names[:-keep] if name != f"step-{best}"]
    for name in doomed:
        shutil.rmtree(folder / name)
    return []


def rotate_by_count(folder: Path, *, keep: int, best: int | None) -> list[int]:
    """Planted bug: the best is one like any other."""
    return checkpoint.rotate(folder, keep=keep, best=None)


def rotate_best_first(folder: Path, *, keep: int, best: int | None) -> list[int]:
    """Planted bug: the best counts among those kept, and the newest goes instead."""
    order = [step for step in checkpoint.steps(folder) if step != best]
    kept = keep - (best is not None)
    for step in order[: len(order) - kept]:
        shutil.rmtree(folder / f"step-{step}")
    return []


def check_rotation(rotate, folder: Path, *, seed: int) -> None:
    """A random run: steps up to 200,000 and beyond, evaluations beside saves, the best moving, keep from 1."""
    draw = random.Random(seed)
    keep = draw.choice([1, 1, 2, 3])
    step, best, all_saved = 0, None, []
    for _ in range(draw.randint(1, 8)):
        step += draw.choice([1, 9, 90, 900, 200_000])
        save(folder, step)
        all_saved.append(step)
        if draw.random() < 0.4:
            best = step
        rotate(folder, keep=keep, best=best)
        expected = sorted({*all_saved[-keep:], *([best] if best is not None else [])})
        assert checkpoint.steps(folder) == expected
    newest = checkpoint.newest(folder, never)
    assert (newest.step, newest.weights["w"].item()) == (step, step)
    if best is not None:
        assert checkpoint.load(folder / f"step-{best}").weights["w"].item() == best


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """Hundreds of runs in seconds: what reaches the disk when is another test's subject (test_checkpoint_faults)."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("num_runs", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_best_and_newest_survive_hundreds_of_runs(in_memory, num_runs):  # trap: R6
    for seed in range(num_runs):
        check_rotation(checkpoint.rotate, in_memory / str(seed), seed=seed)


@pytest.mark.parametrize("planted", [rotate_by_name, rotate_by_count, rotate_best_first])
def test_the_random_runs_catch_a_bad_rotation(in_memory, planted):  # trap: R6 planted
    with pytest.raises(AssertionError):  # noqa: PT012
        for seed in range(50):
            check_rotation(planted, in_memory / str(seed), seed=seed)


def test_rotation_counts_only_what_is_complete(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "step-30" / "state.json").unlink()
    assert checkpoint.rotate(tmp_path, keep=1, best=None) == [10]
    assert sorted(os.listdir(tmp_path)) == ["step-20", "step-30"]


def test_rotation_keeps_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.rotate(tmp_path, keep=0, best=None)
