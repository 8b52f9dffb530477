"""What holds for every optimizer of the table: its step, its state, what it refuses, that a model learns."""

import importlib.util
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor

from often import often
from optim_references import REFERENCES, adamw
from tiny_model import tiny_model
from tiny_run import same_run, stopped, tiny_recipe
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.methods import METHODS
from tunesmith.methods.master_weights import MasterWeights
from tunesmith.optim import OPTIMIZERS, Optimizer
from tunesmith.recipe.load import validate
from tunesmith.recipe.methods import LoraMethod
from tunesmith.recipe.schema import USUAL, Optim, OptimizerName
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import resume, train

every = pytest.mark.parametrize("name", list(OPTIMIZERS))
SHAPES = {
    "embed_tokens.weight": (70, 64),
    "layers.0.tall.weight": (80, 64),
    "layers.0.wide.weight": (64, 96),
    "layers.0.low.weight": (4, 64),
    "norm.weight": (64,),
    "layers.0.tall.bias": (80,),
    "lm_head.weight": (70, 64),
}
TAKEN = {
    "adamw_8bit": {"layers.0.tall.weight", "layers.0.wide.weight", "lm_head.weight"},
    "muon": {"layers.0.tall.weight", "layers.0.wide.weight", "layers.0.low.weight"},
}
"""What an optimizer does not leave to AdamW; the others take all."""
DECAYING = {name for name, shape in SHAPES.items() if len(shape) > 1} - {"embed_tokens.weight"}


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def run(update: Optimizer, steps: range, *, rate: float = 0.01) -> None:
    for step in steps:
        for name, gradient in gradients(step).items():
            update.trained[name].grad = gradient
        update.step(rate * (1 + step / 10))


def optim(name: str, **settings: object) -> Optim:
    return Optim(name=name, lr=0.01, weight_decay=0.1, **settings)  # type: ignore[arg-type]


def test_the_table_the_options_and_the_references_name_the_same_optimizers() -> None:
    names = ["adamw", "adamw_8bit", "lion", "adafactor", "muon"]
    assert list(OPTIMIZERS) == list(USUAL) == list(get_args(OptimizerName)) == list(REFERENCES) == names
    assert all(row.name == name and row.doc for name, row in OPTIMIZERS.items())


def assert_steps_are_the_reference(name: str) -> None:
    tensors = some_tensors()
    weights = {key: tensor.detach().double() for key, tensor in tensors.items()}
    start, kept = dict(weights), {key: {} for key in weights}
    update = Optimizer(tensors, optim(name))
    run(update, range(1, 6))
    for key, tensor in tensors.items():
        reference, allowed = REFERENCES[name] if key in TAKEN.get(name, SHAPES) else (adamw, 1e-5)
        for step in range(1, 6):
            gradient, rate = gradients(step)[key].double(), 0.01 * (1 + step / 10)
            decay = 0.1 if key in DECAYING else 0.0
            weights[key] = reference(weights[key], gradient, kept[key], step=step, lr=rate, decay=decay)
        way = (weights[key] - start[key]).norm()
        assert (tensor.detach().double() - weights[key]).norm() <= allowed * way, key


@every
def test_five_steps_are_those_of_the_paper_in_float64(name: str) -> None:
    """With a rate that changes, decay on matrices alone, and the tensors that an optimizer leaves to AdamW."""
    assert_steps_are_the_reference(name)


@every
def test_the_step_test_sees_decay_on_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.optim.optimizers.decays", lambda name, tensor: True)
    with pytest.raises(AssertionError):
        assert_steps_are_the_reference(name)


@every
def test_what_an_optimizer_does_not_take_is_left_to_adamw(name: str) -> None:
    update = Optimizer(some_tensors(), optim(name))
    shares = {row.name: set(names) for row, names, _ in update.parts}
    taken = TAKEN.get(name, set(SHAPES))
    assert shares == ({name: taken, "adamw": set(SHAPES) - taken} if name in TAKEN else {name: set(SHAPES)})


BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "lion": 4.0, "adafactor": 0.09, "muon": 4.0}
"""Bytes of state a weight of a matrix inside a layer [128, 64], as docs/reference/optimizers.md has them."""


@every
def test_its_state_weighs_what_is_documented(name: str) -> None:
    tensors = {"layers.0.tall.weight": torch.randn(128, 64).requires_grad_()}
    update = Optimizer(tensors, optim(name))
    tensors["layers.0.tall.weight"].grad = torch.randn(128, 64)
    update.step(0.01)
    kept = {key: tensor for key, tensor in update.state().items() if tensor.numel() > 1}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    assert num_bytes / 8192 == pytest.approx(BYTES[name], abs=0.005)
    assert update.state_bytes() == pytest.approx(num_bytes, abs=4)  # a step is counted too


@every
def test_saved_and_loaded_the_updates_go_on_bit_for_bit(name: str) -> None:
    whole = some_tensors()
    run(Optimizer(whole, optim(name)), range(1, 7))

    half = some_tensors()
    update = Optimizer(half, optim(name))
    run(update, range(1, 4))
    state = save({key: tensor.clone() for key, tensor in update.state().items()})
    later = {key: tensor.detach().clone().requires_grad_() for key, tensor in half.items()}
    update = Optimizer(later, optim(name))
    update.load(load(state))
    assert save(update.state()) == state
    run(update, range(4, 7))
    assert all(torch.equal(later[key], tensor) for key, tensor in whole.items())


@every
def test_the_resume_test_sees_a_state_that_is_not_put_back(name: str) -> None:
    whole = some_tensors()
    run(Optimizer(whole, optim(name)), range(1, 7))
    half = some_tensors()
    run(Optimizer(half, optim(name)), range(1, 4))
    run(Optimizer(half, optim(name)), range(4, 7))
    assert not all(torch.equal(half[key], tensor) for key, tensor in whole.items())


@every
def test_state_is_empty_before_an_update_and_without_a_gradient(name: str) -> None:
    tensors = some_tensors()
    update = Optimizer(tensors, optim(name))
    assert update.state() == {}
    tensors["layers.0.wide.weight"].grad = torch.randn(SHAPES["layers.0.wide.weight"])
    update.step(0.01)
    owners = {key.partition("/")[0] for key in update.state()}
    assert owners == {"layers.0.wide.weight"}
    assert all(tensor.grad is None for tensor in tensors.values())


@every
@pytest.mark.parametrize("harm", ["missing", "unknown", "shape", "dtype"])
def test_state_that_does_not_fit_is_refused_and_nothing_changes(name: str, harm: str) -> None:
    tensors = some_tensors()
    update = Optimizer(tensors, optim(name))
    run(update, range(1, 2))
    state, before = dict(update.state()), save(update.state())
    part = max((key for key in state if key.startswith("layers.0.wide")), key=lambda key: state[key].numel())
    if harm == "missing" and name == "muon":
        return  # one part is all it keeps: without it the tensor had no gradient yet
    if harm == "missing":
        del state[part]
    elif harm == "unknown":
        state["layers.9.weight/step"] = torch.zeros(())
    else:
        state[part] = state[part][1:].clone() if harm == "shape" else state[part].double()
    named = {"missing": f"{part} is missing", "unknown": "nothing trained has the name layers.9.weight/step"}
    with pytest.raises(CheckpointError, match=f"optimizer state: {named.get(harm, f'{part} has shape .*, expected ')}"):
        update.load(state)
    assert save(update.state()) == before


@every
def test_a_factor_multiplies_the_rate_of_its_tensors_alone(name: str) -> None:
    plain, factored = some_tensors(), some_tensors()
    settings, key = Optim(name=name, lr=0.01), "layers.0.wide.weight"
    slow, fast = Optimizer(plain, settings), Optimizer(factored, settings, factors={key: 4.0})
    before = {name: tensor.detach().clone() for name, tensor in plain.items()}
    run(slow, range(1, 2))
    run(fast, range(1, 2))
    for name_, tensor in plain.items():
        moved, expected = factored[name_] - before[name_], (tensor - before[name_]) * (4 if name_ == key else 1)
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)  # the way of a first step is its rate


@every
def test_masters_stay_float32_and_small_updates_are_not_lost(name: str) -> None:  # trap: L9
    """A thousand updates of a bfloat16 weight that are each below its rounding."""
    assert_small_updates_add_up(name, free_early=True)


def assert_small_updates_add_up(name: str, *, free_early: bool, rounded: bool = False) -> None:
    layer = torch.nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(layer.weight, 1.0)
    masters = MasterWeights({"layers.0.weight": layer.weight}, free_early=free_early)
    update = Optimizer(masters.trained, Optim(name=name, lr=1e-5))
    direction = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    for _ in range(100):
        layer.weight.grad = direction.clone()
        masters.collect()
        update.step(1e-5)
        masters.publish()
        if rounded:
            with torch.no_grad():
                masters.trained["layers.0.weight"].copy_(layer.weight)
    master = masters.trained["layers.0.weight"]
    assert master.dtype == torch.float32
    # Muon keeps the size of all updates together, not of each; a weight whose gradient is small moves less.
    assert ((master - 1).abs() > 1e-5).float().mean() > 0.9


@every
def test_the_test_of_small_updates_sees_weights_kept_in_bfloat16(name: str) -> None:
    with pytest.raises(AssertionError):
        assert_small_updates_add_up(name, free_early=False, rounded=True)


@every
def test_a_model_learns_with_it(name: str) -> None:
    """Twelve steps on one batch, at a rate that is AdamW's times the factor of the table."""
    model = tiny_model("llama", vocab_size=64)
    attachment = METHODS["lora"].attach(model, LoraMethod(rank=4), seed=0)
    rate = 1e-2 * OPTIMIZERS[name].rate[0]
    update = Optimizer(attachment.trained, Optim(name=name, lr=rate))
    ids = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        attachment.collect_gradients()
        update.step(rate)
        attachment.publish()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adafactor", "betas": [0.9, 0.99]}, "adafactor has none"),
        ({"name": "lion", "eps": 1e-6}, "lion has none"),
        ({"name": "adamw", "momentum": 0.9}, "adamw has none"),
        ({"name": "muom"}, "did you mean muon"),
        ({"name": "muon", "nesterov": True}, "unknown key"),
    ],
)
def test_what_an_optimizer_does_not_have_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate({"optim": settings})


def test_null_is_what_is_usual_and_is_written_out() -> None:
    assert Optim(name="lion").betas == (0.9, 0.99)
    assert Optim(name="muon").momentum == 0.95
    assert (Optim().schedule, Optim().betas, Optim().eps) == ("linear", (0.9, 0.999), 1e-8)
    assert validate({"optim": {"name": "lion", "betas": None}}).optim.betas == (0.9, 0.99)
    with pytest.raises(ValidationError):
        Optim(name="adafactor", eps=1e-8)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion"])
def test_a_missing_package_is_named_before_anything_is_loaded(name, tmp_path, monkeypatch) -> None:
    package = OPTIMIZERS[name].extra
    monkeypatch.setattr("tunesmith.optim.optimizers.find_spec", lambda wanted: None)
    recipe = tiny_recipe(tmp_path, optim={"name": name})
    monkeypatch.setattr("tunesmith.models.resolve_model.resolve_model", None)  # called, it would end in another error
    with pytest.raises(RecipeError, match=rf"optim.name: {name} needs the package {package}.*pip install '?{package}"):
        prepare(recipe, root=tmp_path)


@every
def test_the_rate_chosen_is_that_of_adamw_times_a_stated_factor(name: str, tmp_path) -> None:
    setup = prepare(tiny_recipe(tmp_path, optim={"name": name, "lr": "auto"}), root=tmp_path)
    choice = next(choice for choice in setup.choices if choice.key == "optim.lr")
    factor, source = OPTIMIZERS[name].rate
    assert choice.value == pytest.approx(5e-4 * factor)
    assert source in choice.reason
    assert name == "adamw" or "arXiv" in source


@pytest.mark.parametrize("name", often(OPTIMIZERS, "muon", "adafactor"))
def test_a_run_stopped_at_any_step_and_resumed_is_the_same_run(name: str, tmp_path: Path) -> None:
    """Weights, state, result and every event value, with evaluations between, in bfloat16 and with the best kept."""
    method = "full" if name in ("adafactor", "muon", "adamw_8bit") else "lora"  # what depends on the shape of a weight
    settings = {"name": "lora", "rank": 8, "dropout": 0.1} if method == "lora" else {"name": "full"}
    sections = {"optim": {"name": name, "lr": 1e-3, "weight_decay": 0.1}, "evaluation": {"every": 2, "keep": "best"}}
    recipe = tiny_recipe(tmp_path, rows=12, precision="bfloat16", **sections)
    recipe = validate({**recipe.model_dump(), "method": settings})
    straight = train(recipe, root=tmp_path / "straight")
    for step in (1, 4) if name == "adamw" else (4,):
        run = stopped(straight.recipe(), tmp_path / "stopped", step)
        same_run(resume(run), straight)
        shutil.rmtree(run.path)


@pytest.mark.slow
def test_the_run_test_sees_a_state_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of AdamW: test_resume; each by itself: above."""
    recipe = tiny_recipe(tmp_path, rows=12, optim={"name": "muon", "lr": 1e-3})
    straight = train(recipe, root=tmp_path / "straight")
    run = stopped(straight.recipe(), tmp_path / "stopped", 3)
    monkeypatch.setattr("tunesmith.optim.Optimizer.load", lambda self, tensors: None)
    resume(run)
    with pytest.raises(AssertionError):
        same_run(run, straight)


def test_every_extra_of_the_table_can_be_installed_by_its_name() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    for row in OPTIMIZERS.values():
        assert row.extra is None or f'\n{row.extra} = ["{row.extra}' in pyproject
        assert row.extra is None or importlib.util.find_spec(row.extra)
