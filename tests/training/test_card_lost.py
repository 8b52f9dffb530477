"""A card that fails in mid-run ends it with a sentence, and the run goes on from its checkpoint; afterwards nothing is
left on a card."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_run import tiny_recipe
from tunesmith.errors import DeviceError
from tunesmith.training import trainer
from tunesmith.training.loop import training_steps
from tunesmith.training.trainer import resume, train


def test_a_card_that_fails_in_mid_run_is_named_and_the_run_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = tiny_recipe(tmp_path, checkpoint={"every": 2})
    whole = train(recipe, root=tmp_path, out=tmp_path / "whole")

    def failing(state: Any, *, start: int = 0) -> Iterator[Any]:
        for event in training_steps(state, start=start):
            yield event
            if event.step == 3:
                raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported")

    monkeypatch.setattr(trainer, "training_steps", failing)
    with pytest.raises(DeviceError) as ended:
        train(recipe, root=tmp_path, out=tmp_path / "lost")
    text = str(ended.value)
    assert text.startswith("after step 3: cpu failed: CUDA error: unspecified launch failure")
    assert "Step 2 is saved: tunesmith resume" in text
    monkeypatch.setattr(trainer, "training_steps", training_steps)
    lost = trainer.Run(tmp_path / "lost")
    failed = [event for event in lost.events() if event.kind == "failed"]
    assert failed[0].values["code"] == "DeviceError"
    resume(lost)
    losses = [[e.values["loss"] for e in run.events() if e.kind == "step"] for run in (whole, lost)]
    assert losses[0] == losses[1]


def test_no_model_is_left_after_a_run(tmp_path: Path, monkeypatch: Any) -> None:
    models: list[Any] = []
    prepare = trainer.prepare

    def noting(*args: Any, **how: Any) -> Any:
        setup = prepare(*args, **how)
        models.append(weakref.ref(setup.model))
        return setup

    monkeypatch.setattr(trainer, "prepare", noting)
    monkeypatch.setattr(trainer, "free_cached_memory", lambda: None)
    gc.collect()
    gc.disable()
    try:
        train(tiny_recipe(tmp_path), root=tmp_path, out=tmp_path / "run")
        assert models[0]() is None
    finally:
        gc.enable()
