"""What a rank does in the tests of runs that learn from rewards on several processes, see `parallel.group`."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from rewarded import rewarded
from tiny_run import stop_at
from tunesmith.errors import Stopped
from tunesmith.recipe.schema import Recipe
from tunesmith.training import groups, trainer
from tunesmith.training.trainer import Listener, train

SECTIONS: dict[str, Any] = {
    "reinforce": {"updates": 2, "kl": 0.05},
    "evaluation": {"every": 4},
    "data": {"held_out": 0.25},
}


def recipe_of(folder: Path) -> Recipe:
    """Steps of three prompts, so that two ranks draw unlike shares."""
    return rewarded(folder, **SECTIONS)


def _run(folder: Path, name: str, listener: Listener | None = None) -> Any:
    try:
        return str(train(recipe_of(folder), root=folder / "root", out=folder / name, listener=listener).path)
    except Stopped as stopped:
        return str(stopped)


def straight(folder: Path) -> Any:
    """With the number of processes of graders that this rank has in its steps."""
    drive, found = trainer._drive, dict[str, Any]()

    def noted(session: Any, **how: Any) -> None:
        children = session.setup.drawing.pool.children.values()
        found["graders"] = sum(child._process.poll() is None for each in children for child in each._all)
        drive(session, **how)

    with patch.object(trainer, "_drive", noted):
        found["run"] = _run(folder, "straight")
    return found


def stopped(folder: Path) -> Any:
    """Between a draw and its last step: ranks agree to stop, and end a step later."""
    return _run(folder, "stopped", stop_at(2))


def resumed(folder: Path) -> Any:
    return _run(folder, "stopped")


def swapped_planted(folder: Path) -> Any:
    """Answers are put together rank by rank, not prompt by prompt."""

    def one_behind_the_other(world: Any, mine: Any, num: int) -> Any:
        answers = [gathered(world, mine, num)[at] for at in [*range(0, num, 2), *range(1, num, 2)]]
        return answers

    gathered = groups.all_answers
    with patch.object(groups, "all_answers", one_behind_the_other):
        return _run(folder, "swapped")
