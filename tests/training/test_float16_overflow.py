"""A model whose numbers float16 cannot hold is trained in float32, if nobody asked for float16."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_run import tiny_recipe
from tunesmith.models import machine
from tunesmith.recipe.schema import Recipe
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import prepare
from tunesmith.types import Choice


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recipe on a tiny Llama with one matrix 3e6 times as large, where float16 is the fast type."""

    def make(precision: str = "auto") -> Recipe:
        recipe = tiny_recipe(tmp_path, precision=precision)
        file = Path(recipe.model) / "model.safetensors"
        weights = load_file(file)
        name = next(name for name in sorted(weights) if name.endswith("0.mlp.down_proj.weight"))
        weights[name] = weights[name] * 3e6
        save_file(weights, file, {"format": "pt"})
        return recipe

    right = machine.choose_precision

    def choose(name: str, device: str) -> Choice:
        return Choice("precision", "float16", "as on a T4") if name == "auto" else Choice("precision", name, "as given")

    monkeypatch.setattr(machine, "choose_precision", choose)
    assert right is not choose
    return make


def test_a_model_that_overflows_is_loaded_again_in_float32(large: Any, tmp_path: Path) -> None:
    setup = prepare(large(), root=tmp_path)
    assert setup.recipe.precision == "float32"
    assert setup.model.dtype == torch.float32
    assert setup.sampler.layout == "packed"
    chosen = {choice.key: choice.reason for choice in setup.choices}
    assert "too large for float16" in chosen["precision"]
    assert "precision" not in setup.user_options
    assert next(training_steps(setup)).values["loss"] < 100


def test_a_type_that_was_given_is_taken(large: Any, tmp_path: Path) -> None:
    assert prepare(large("float16"), root=tmp_path).recipe.precision == "float16"


def test_a_model_that_float16_holds_stays_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: Any) -> None:
    assert prepare(tiny_recipe(tmp_path, precision="auto"), root=tmp_path).recipe.precision == "float16"


def test_the_gradient_of_a_head_is_scaled_before_it_is_rounded() -> None:
    """Its sum over the targets may be above 65,504, and is divided by their number."""
    from torch import nn

    from tunesmith.models.fused_loss import OutputLayer

    layer = nn.Linear(4, 8, bias=True).half()
    hidden = torch.full((4096, 4), 60.0, dtype=torch.float16, requires_grad=True)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    output = OutputLayer(layer=layer, scale=1.0, divides=False, cap=None)
    (output.loss_sum(hidden, torch.zeros(4096, dtype=torch.int64), smoothing=0.0, z=0.0) / 4096).backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad[0].tolist() == pytest.approx([-60 * 7 / 8] * 4, rel=1e-3)
