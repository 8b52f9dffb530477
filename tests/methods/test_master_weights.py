"""MasterWeights begin anywhere in their cells of bfloat16: the model is the same, and its first updates reach it."""

import pytest
import torch
from torch import Tensor, nn

from tunesmith.methods import master_weights
from tunesmith.methods.master_weights import MasterWeights, spread_in_cells

COUNT = 40_000
UPDATE = 5e-5
"""A usual step of full tuning: a hundredth of the way from 1.0 to the next value of bfloat16."""


def spread(values: Tensor, seed: int = 0) -> Tensor:
    moved = values.float().clone()
    spread_in_cells(moved, torch.Generator().manual_seed(seed))
    return moved


def every_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_whatever_bfloat16_has_is_what_its_master_rounds_to() -> None:
    values = every_bfloat16()
    for seed in range(8):
        moved = spread(values, seed)
        same = moved.to(torch.bfloat16).view(torch.int16) == values.view(torch.int16)
        assert bool((same | values.isnan()).all())
        assert bool(moved[values.isnan()].isnan().all())


def test_they_fill_the_cell_evenly_and_zeros_stay() -> None:
    moved = spread(torch.full((COUNT,), 1.5))
    half = 2**-8  # neighbours of 1.5 lie 2⁻⁷ away
    assert moved.min().item() < 1.5 - 0.99 * half
    assert moved.max().item() > 1.5 + 0.99 * half
    # An even spread over ± half has the deviation half / √3; the mean of 40,000 is off by five of its own at most.
    assert moved.double().mean().item() == pytest.approx(1.5, abs=5 * half / (3 * COUNT) ** 0.5)
    assert moved.double().std().item() == pytest.approx(half / 3**0.5, rel=0.02)
    assert torch.equal(spread(torch.zeros(8)), torch.zeros(8))


def test_a_seed_draws_the_same_again() -> None:
    values = torch.randn(100).to(torch.bfloat16)
    assert torch.equal(spread(values, 1), spread(values, 1))
    assert not torch.equal(spread(values, 1), spread(values, 2))


def assert_one_small_update_reaches_the_model(seed: int | None) -> None:  # trap: L9
    weight = nn.Parameter(torch.full((COUNT,), 1.5, dtype=torch.bfloat16))
    masters = MasterWeights({"weight": weight}, free_early=False, spread=seed)
    assert bool((weight == 1.5).all())
    with torch.no_grad():
        masters.trained["weight"].sub_(UPDATE)
    masters.publish()
    moved = 1.5 - weight.detach().double().mean().item()
    # A share p = UPDATE / 2⁻⁷ of the weights crosses, each by 2⁻⁷: within five deviations of such a share.
    share = UPDATE * 2**7
    assert moved == pytest.approx(UPDATE, abs=5 * 2**-7 * (share * (1 - share) / COUNT) ** 0.5)


def test_one_small_update_reaches_the_model_on_average() -> None:
    assert_one_small_update_reaches_the_model(seed=0)


def test_the_test_sees_masters_that_all_begin_in_the_middle() -> None:
    with pytest.raises(AssertionError):
        assert_one_small_update_reaches_the_model(seed=None)


def test_all_at_once_they_take_and_give_the_same_bits(monkeypatch) -> None:
    """As on CUDA: gradients of two micro-batches, one of which reaches only some weights."""

    def after(*, at_once: bool) -> list[Tensor]:
        monkeypatch.setattr(master_weights, "_in_one_call", lambda tensor: at_once)
        draw = torch.Generator().manual_seed(0)
        weights = {f"w{i}": nn.Parameter(torch.randn(5, i + 1, generator=draw).bfloat16()) for i in range(4)}
        masters = MasterWeights(weights, free_early=False, spread=3)
        for members in (("w0", "w1", "w2"), ("w0", "w2", "w3")):
            for name in members:
                weights[name].grad = torch.randn(weights[name].shape, generator=draw).bfloat16()
            masters.collect()
            assert all(weight.grad is None for weight in weights.values())
        grads = [master.grad.clone() for master in masters.trained.values()]
        with torch.no_grad():
            for master in masters.trained.values():
                master.sub_(0.1 * master.grad)
        masters.publish()
        return [*grads, *(weight.detach() for weight in weights.values())]

    one_by_one, at_once = after(at_once=False), after(at_once=True)
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, at_once, strict=True))
