"""What a rank does in the tests of runs with a teacher on several processes, see `parallel.group`."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from tiny_run import model_folder, tiny_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.training import groups, local_teacher
from tunesmith.training.local_teacher import LocalTeacher
from tunesmith.training.trainer import train


def recipe_of(folder: Path, name: str) -> Recipe:
    """Steps of three rows, so that two ranks have unlike shares. At an address the teacher is the server whose
    address is in the folder."""
    teacher = str(model_folder(folder / "teacher", seed=5))
    distil: dict[str, Any] = {"teacher": teacher, "top": 16}
    distil |= {} if name == "off_policy" else {"on_policy": True, "max_new_tokens": 6}
    if name == "at_address":
        distil |= {"teacher": (folder / "address").read_text(), "model": "large"}
    evaluation = {"samples": 0, "general": False, "surprising": 0}
    settings: dict[str, Any] = {"method": "full", "optim": {"lr": 3e-3}, "train": {"max_steps": 4}}
    return tiny_recipe(folder, task="distil", distil=distil, evaluation=evaluation, **settings)


def _run(folder: Path, name: str, out: str = "") -> dict[str, Any]:
    """How often this rank has loaded the teacher, and had rows read."""
    loads, reads = list[str](), list[int]()
    load, lists = local_teacher.load_any, LocalTeacher.lists

    def loaded(place: str, **how: Any) -> Any:
        loads.append(place)
        return load(place, **how)

    def read(self: Any, rows: Any) -> Any:
        reads.append(len(rows))
        return lists(self, rows)

    with patch.object(local_teacher, "load_any", loaded), patch.object(LocalTeacher, "lists", read):
        train(recipe_of(folder, name), root=folder / f"root-{out or name}", out=folder / (out or name))
    return {"loads": len(loads), "reads": reads}


def off_policy(folder: Path) -> Any:
    return _run(folder, "off_policy")


def on_policy(folder: Path) -> Any:
    return _run(folder, "on_policy")


def at_address(folder: Path) -> Any:
    return _run(folder, "at_address")


def swapped_planted(folder: Path) -> Any:
    """Answers are put together rank by rank, not prompt by prompt."""
    gathered = groups.all_answers

    def one_behind_the_other(world: Any, mine: Any, num: int) -> Any:
        return [gathered(world, mine, num)[at] for at in [*range(0, num, 2), *range(1, num, 2)]]

    with patch.object(groups, "all_answers", one_behind_the_other):
        return _run(folder, "on_policy", "swapped")
