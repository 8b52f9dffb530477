"""Runs of encoder–decoders of T5's kind: sources and targets are padded, each on its own."""

from pathlib import Path
from typing import Any

import pytest

from tiny_run import values_of
from tiny_tasks import encoder_decoder_folder, task_recipe
from tunesmith.errors import Stopped
from tunesmith.evaluation.general import can_generate
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.folder import Run, runs
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.summary import plan_values
from tunesmith.training.trainer import Listener, resume, train


def recipe_of(folder: Path, *, model_dropout: float = 0.0, **sections: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    model = str(encoder_decoder_folder(folder / "t5", dropout=model_dropout))
    return task_recipe(folder, "summarize", "encoder_decoder", rows=40, model=model, **sections)


def losses(setup: Setup) -> list[float]:
    return [event.values["loss"] for event in training_steps(setup)]


def test_the_plan_names_the_layout(tmp_path):
    assert plan_values(prepare(recipe_of(tmp_path), root=tmp_path))["layout"] == "encoder_decoder"


@pytest.mark.slow  # of the same kind of model, without dropout: test_every_task.py
def test_stopped_and_resumed_is_the_same_run(tmp_path):  # trap: R1
    """With dropout, and with layers that are recomputed; without: test_every_task.py."""
    recipe = recipe_of(tmp_path, model_dropout=0.1, train={"checkpointed_layers": 3})
    straight = train(recipe, root=tmp_path / "straight")
    calls = iter(range(1000))
    listener = Listener(should_stop=lambda: next(calls) == 13)
    with pytest.raises(Stopped):
        train(recipe, root=tmp_path / "stopped", listener=listener)
    run: Run = runs(tmp_path / "stopped")[0]
    assert values_of(resume(run).events()) == values_of(straight.events())


def test_where_memory_ends_a_pass_is_halved(tmp_path, monkeypatch):
    """Twice as many passes, the same loss but for rounding."""
    recipe = recipe_of(tmp_path, train={"rows_per_step": 8, "tokens_per_pass": 256})
    expected = losses(prepare(recipe, root=tmp_path))
    setup, calls = prepare(recipe, root=tmp_path), iter(range(1000))
    real = type(setup.collator).batch

    def ending(collator: Any, members: Any, **how: Any) -> Any:
        if next(calls) == 0:
            raise MemoryError
        return real(collator, members, **how)

    monkeypatch.setattr(type(setup.collator), "batch", ending)
    assert losses(setup) == pytest.approx(expected, abs=1e-4)


def test_its_general_ability_is_not_measured(tmp_path):
    setup = prepare(recipe_of(tmp_path), root=tmp_path)
    assert can_generate(setup.head, is_causal=True, max_tokens=setup.max_tokens)
    assert not setup.can_generate
