"""Weights kept in bfloat16 alone: rounded at random, on average nothing is lost, and a run repeats bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from tiny_model import tiny_model
from tunesmith.errors import RecipeError
from tunesmith.methods.full import FullAttachment, attach
from tunesmith.optim import Optimizer
from tunesmith.optim.bfloat16 import round_stochastically
from tunesmith.recipe.methods import FullMethod
from tunesmith.recipe.schema import Optim

STOCHASTIC = FullMethod(rounding="stochastic")
DRAWS = 40_000


def rounded(value: float, *, seed: int = 0) -> Tensor:
    return round_stochastically(torch.full((DRAWS,), value), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [1.0 + 0.3 * 2**-7, -1.0 - 0.3 * 2**-7, 3.1e-5, -0.02, 1e30, 1e-40])
def test_the_mean_is_the_value_and_only_its_neighbours_are_drawn(value: float) -> None:
    found = rounded(value).double()
    assert len(found.unique()) == 2
    low, high = found.unique().tolist()
    exact = torch.tensor(value).double().item()
    assert low < exact < high
    # The mean of 40,000 draws of two numbers so far apart is off by at most five times its spread.
    assert found.mean().item() == pytest.approx(exact, abs=5 * 0.5 * (high - low) / DRAWS**0.5)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, float("inf"), float("-inf")])
def test_what_bfloat16_has_stays(value: float) -> None:
    assert torch.equal(rounded(value), torch.full((DRAWS,), value, dtype=torch.bfloat16))


def test_not_a_number_stays_one() -> None:
    assert rounded(float("nan")).isnan().all()


class OneWeight(nn.Module):
    dtype = torch.bfloat16

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)


# trap: L9
def assert_small_updates_arrive_on_average(settings: FullMethod, *, train_narrow: bool = False) -> None:
    """A thousand steps of 1e-3 from 1.0, of a thousand weights: bfloat16's neighbours of 1.0 lie 4e-3 and 8e-3 away."""
    model = OneWeight(torch.ones(1000, dtype=torch.bfloat16))
    trained = {"weight": model.weight} if train_narrow else attach(model, settings, seed=0).trained
    if train_narrow:
        model.weight.grad_dtype = None
        optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    else:
        update = Optimizer(trained, Optim(lr=1e-3, betas=(0.0, 0.0)))
    for step in range(1000):
        model.weight.sum().backward()
        if train_narrow:
            optimizer.step()
            optimizer.zero_grad()
        else:
            update.step(1e-3, number=step)
    # Each step's error is at most 2⁻⁸ of the weight: a walk of 1,000 such steps spreads by less than 0.06, its mean
    # over 1,000 weights by 0.002.
    assert model.weight.float().mean().item() == pytest.approx(0.0, abs=0.008)


def test_small_updates_arrive_on_average() -> None:
    assert_small_updates_arrive_on_average(STOCHASTIC)


def test_the_test_sees_updates_rounded_to_the_nearest() -> None:
    with pytest.raises(AssertionError):
        assert_small_updates_arrive_on_average(STOCHASTIC, train_narrow=True)


def tuned(*, steps: range = range(1, 4), seed: int = 0, optim: str = "adamw") -> tuple[FullAttachment, Optimizer]:
    attachment = attach(tiny_model(vocab_size=64, dtype=torch.bfloat16), STOCHASTIC, seed=seed)
    update = Optimizer(attachment.trained, Optim(name=optim, lr=1e-3), seed=seed)
    take(attachment, update, steps)
    return attachment, update


def take(attachment: FullAttachment, update: Optimizer, steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(step))
        attachment.model(ids, labels=ids).loss.backward()
        attachment.collect_gradients()
        update.step(1e-3, number=step)
        attachment.publish()


def same(first: FullAttachment, second: FullAttachment) -> bool:
    return all(torch.equal(first.trained[name], tensor) for name, tensor in second.trained.items())


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "lion", "adafactor", "muon"])
def test_what_is_drawn_follows_from_seed_and_step_alone(optim: str) -> None:
    straight, _ = tuned(optim=optim)
    torch.manual_seed(99)
    halfway, update = tuned(steps=range(1, 2), optim=optim)
    later, loaded = tuned(steps=range(0), optim=optim)
    for name, tensor in halfway.trained.items():
        later.trained[name].data.copy_(tensor)
    loaded.load(update.state())
    take(later, loaded, range(2, 4))
    assert same(straight, later)
    assert not same(straight, tuned(seed=1, optim=optim)[0])


def test_state_is_float32_and_stand_ins_hold_no_memory() -> None:
    attachment, update = tuned()
    assert {tensor.dtype for name, tensor in update.state().items() if name.endswith("exp_avg")} == {torch.float32}
    assert {tensor.dtype for tensor in attachment.trained.values()} == {torch.bfloat16}
    assert sum(leaf.untyped_storage().nbytes() for leaf in update.leaves.values()) == 0


def test_gradients_of_several_passes_add_up_in_float32() -> None:
    model = OneWeight(torch.ones(1, dtype=torch.bfloat16))
    attachment = attach(model, STOCHASTIC, seed=0)
    for part in (256.0, 1.0):
        (model.weight * part).sum().backward()
        attachment.collect_gradients()
    assert attachment.trained["weight"].grad.item() == 257.0  # bfloat16 has no number between 256 and 258


def test_it_is_refused_where_nothing_is_rounded() -> None:
    with pytest.raises(RecipeError, match=r"method.rounding: stochastic: .* Set precision: bfloat16"):
        attach(tiny_model(vocab_size=64), STOCHASTIC, seed=0)


def test_an_optimizer_that_averages_weights_is_refused() -> None:
    attachment = attach(tiny_model(vocab_size=64, dtype=torch.bfloat16), STOCHASTIC, seed=0)
    with pytest.raises(RecipeError, match=r"optim.name: schedule_free: .* method.rounding: nearest"):
        Optimizer(attachment.trained, Optim(name="schedule_free", lr=1e-3))
