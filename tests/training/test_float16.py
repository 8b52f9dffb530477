"""float16 on a card of capability 7: the loss is scaled, and the scale gives way where gradients overflow."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from often import often
from tiny_run import tiny_recipe
from tunesmith.errors import NonFiniteError
from tunesmith.training import state
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.state import LossScale


def setup_of(folder: Path, precision: str = "float16", **sections: Any) -> Setup:
    return prepare(tiny_recipe(folder, precision=precision, **sections), root=folder)


def steps(setup: Setup) -> list[dict[str, Any]]:
    return [dict(event.values) for event in training_steps(setup)]


@pytest.mark.parametrize("method", often([{"name": "lora"}, "full", {"name": "qlora"}], "full"), ids=str)
def test_a_run_learns_as_in_float32(tmp_path, method):
    """A weight is off by 2^-11 at most, and so are activations."""
    recipe: dict[str, Any] = {"optim": {"lr": 1e-3}, "method": method}
    found, exact = (steps(setup_of(tmp_path, precision, **recipe)) for precision in ("float16", "float32"))
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in exact], rel=2e-3)
    assert [step["grad_norm"] for step in found] == pytest.approx([step["grad_norm"] for step in exact], rel=3e-2)
    assert [step["loss_scale"] for step in found] == [2.0**16] * len(found)
    assert not any("loss_scale" in step for step in exact)


def small_gradients_arrive(scale: LossScale) -> None:
    """A layer in float16 whose gradient, 1e-9 a weight, float16 has not."""
    layer = nn.Linear(4, 1, bias=False).half()
    x = torch.full((1, 4), 1e-4, dtype=torch.float16)
    scale.scaled(layer(x).float().sum() * 1e-1, 1e4).backward()
    master = nn.Parameter(torch.zeros(1, 4))
    master.grad = layer.weight.grad.float()
    scale.undo([master])
    assert master.grad.tolist()[0] == pytest.approx([1e-9] * 4, rel=0.05)


def test_small_gradients_arrive():  # trap: L17
    small_gradients_arrive(LossScale.of("float16"))


def test_the_test_sees_gradients_that_became_zero():  # trap: L17 planted
    with pytest.raises(AssertionError):
        small_gradients_arrive(LossScale())


def test_other_precisions_are_divided_as_ever():
    loss = torch.tensor(7.0)
    assert torch.equal(LossScale.of("bfloat16").scaled(loss, 3.0), loss / 3.0)


def test_a_scale_that_overflows_is_halved_and_the_step_made_anew(tmp_path, monkeypatch):
    usual = steps(setup_of(tmp_path))
    monkeypatch.setattr(state, "FIRST_SCALE", 2.0**36)
    setup = setup_of(tmp_path)
    made: list[int] = []
    loss_sum = setup.task.loss_sum
    object.__setattr__(setup.task, "loss_sum", lambda model, batch: made.append(1) or loss_sum(model, batch))
    found = steps(setup)
    scales = [step["loss_scale"] for step in found]
    assert scales == sorted(scales, reverse=True)
    assert 2.0**16 < scales[-1] < 2.0**36
    tried = [1 + math.log2(before / after) for before, after in pairwise([2.0**36, *scales])]
    assert len(made) == sum(step["passes"] * times for step, times in zip(found, tried, strict=True))
    for step, expected in zip(found, usual, strict=True):
        assert step["rows"] == expected["rows"]
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


def test_a_loss_that_is_no_number_is_not_tried_again(tmp_path):
    setup = setup_of(tmp_path)
    made: list[int] = []
    loss_sum = setup.task.loss_sum
    object.__setattr__(
        setup.task, "loss_sum", lambda model, batch: made.append(1) or loss_sum(model, batch) * float("nan")
    )
    with pytest.raises(NonFiniteError, match="the update was not made"):
        steps(setup)
    assert len(made) == len(setup.sampler.step(1))


def test_gradients_that_overflow_without_a_scale_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "FIRST_SCALE", 4.0)
    setup = setup_of(tmp_path)
    hook = setup.attachment.collect_gradients

    def overflow() -> None:
        hook()
        next(iter(setup.attachment.trained.values())).grad.fill_(float("inf"))

    setup.attachment.collect_gradients = overflow
    with pytest.raises(NonFiniteError, match=r"gradient norm (inf|nan)"):
        steps(setup)
    assert setup.loss_scale.value == 1.0
