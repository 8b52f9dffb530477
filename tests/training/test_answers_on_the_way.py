"""Prompts that are answered at evaluations on the way: as often as asked for, and they change nothing else."""

from pathlib import Path

from tiny_run import tiny_recipe
from tunesmith.training.trainer import train
from tunesmith.types import Event


def events(folder: Path, on_the_way: int) -> list[Event]:
    """What a run of twelve steps logs that is measured at every fourth."""
    evaluation = {"samples": 2, "sample_tokens": 4, "general": False, "every": 4, "samples_on_the_way": on_the_way}
    return list(train(tiny_recipe(folder, evaluation=evaluation), root=folder / f"runs-{on_the_way}").events())


def test_some_prompts_are_answered_at_each_evaluation_on_the_way(tmp_path: Path) -> None:
    quiet, told = events(tmp_path, 0), events(tmp_path, 1)
    on_the_way = [event for event in told if event.kind == "sample" and event.values["name"] == "step"]
    assert [(event.step, event.values["index"]) for event in on_the_way] == [(4, 0), (8, 0), (12, 0)]
    assert all(event.values["answer"] for event in on_the_way)
    rest = [event for event in told if event not in on_the_way]
    for kind in ("step", "evaluation", "sample", "answers"):
        values = [[(event.step, event.values) for event in log if event.kind == kind] for log in (quiet, rest)]
        assert values[0] == values[1], kind
