"""A method is one file, one row of METHODS and one class of settings: this one trains the norms alone."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import PreTrainedModel

from tiny_run import same_run, stopped, tiny_recipe
from tunesmith.errors import RecipeError
from tunesmith.inference.load import load_model, load_run
from tunesmith.methods import METHODS, Method, full
from tunesmith.methods.master_weights import MasterWeights
from tunesmith.recipe.methods import METHOD_OPTIONS, RegisteredMethod
from tunesmith.recipe.schema import Recipe
from tunesmith.training.trainer import resume, train
from tunesmith.types import Attachment


class NormsMethod(RegisteredMethod):
    """Only the weights of norms are trained."""

    name: Literal["norms"] = "norms"
    rate_factor: float = 1.0
    """Factor of the learning rate."""


class NormsAttachment(Attachment):
    method = "norms"

    def __init__(self, model: PreTrainedModel, rate_factor: float) -> None:
        model.requires_grad_(False)
        weights = {name: weight for name, weight in model.named_parameters() if "norm" in name}
        self._masters = MasterWeights(weights, free_early=False)
        self.trained = self._masters.trained
        self.rate_factors = dict.fromkeys(self.trained, rate_factor)

    def collect_gradients(self) -> None:
        self._masters.collect()

    def publish(self) -> None:
        self._masters.publish()


def attach(model: PreTrainedModel, settings: NormsMethod, *, seed: int) -> NormsAttachment:
    return NormsAttachment(model, settings.rate_factor)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Method(
        name="norms",
        doc="Only the weights of norms are trained; the result is a model folder.",
        attach=attach,
        save_result=full.save_result,
        load_result=full.load_result,
        learning_rate=lambda settings, kind, num_parameters: (1e-2, "few numbers"),
        describe=lambda settings: "The norms were tuned.",
        is_adapter=False,
    )
    monkeypatch.setitem(METHODS, "norms", row)
    monkeypatch.setitem(METHOD_OPTIONS, "norms", NormsMethod)


def recipe_of(folder: Path) -> Recipe:
    recipe = tiny_recipe(folder).model_dump()
    return Recipe.model_validate({**recipe, "method": {"name": "norms", "rate_factor": 2.0}})


def test_a_method_from_outside_trains_resumes_and_is_loaded(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    run = train(recipe, root=tmp_path / "straight")
    assert run.recipe().method == NormsMethod(rate_factor=2.0)  # as it was written into the run's folder
    losses = [event.values["loss"] for event in run.events() if event.kind == "step"]
    assert losses[-1] < losses[0]
    same_run(resume(stopped(recipe, tmp_path / "stopped", 2)), run)
    tuned = load_run(run).model.state_dict()
    base = load_model(recipe.model).model.state_dict()
    moved = {name for name, weight in tuned.items() if not torch.equal(weight.float(), base[name].float())}
    assert moved == {name for name in base if "norm" in name}


def test_its_settings_are_checked(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path).model_dump()
    with pytest.raises((RecipeError, ValueError), match="rate_factor"):
        Recipe.model_validate({**recipe, "method": {"name": "norms", "rate_factor": "fast"}})
