"""Seconds by formula: products as they were tried here, everything else by what it moves and how often it starts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tunesmith.planning import trying
from tunesmith.planning.devices import CPU_LAUNCH, Device, here, named
from tunesmith.planning.duration import (
    FINISHING_S,
    LOADED,
    STARTING_S,
    WRITTEN,
    Looking,
    finishing_seconds,
    looking,
    pass_seconds,
    starting_seconds,
)
from tunesmith.planning.sketch import Kept
from tunesmith.planning.tracing import MAPPED, Product, Segment, Tracer
from tunesmith.planning.trying import Tried

MACHINE = Device("cpu", "cpu", 2**30, products=1e9, bandwidth=1e8, fresh=1e7, launch=1e-3)


class Known:
    """Every product took as long."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    def seconds(self, product: Product) -> float | None:
        return self._seconds


def traced(do) -> Segment:
    with FakeTensorMode(), Tracer([], gradients=lambda: 0) as tracer:
        do()
    return tracer.close()[0]


def segment(*products: Product, **others: int) -> Segment:
    return Segment(("forward", 0, 0), products=Counter(products), **others)


def test_what_was_tried_counts_as_it_was_and_the_rest_by_the_roofline():
    computing = Product(2_000_000_000, 1, torch.float32, "computing")
    reading = Product(1, 300_000_000, torch.float32, "reading")
    some = [segment(computing, computing, reading)]
    assert pass_seconds(some, MACHINE, torch.float32, None) == pytest.approx(2 + 2 + 3)
    assert pass_seconds(some, MACHINE, torch.float32, Known(None)) == pytest.approx(2 + 2 + 3)
    assert pass_seconds(some, MACHINE, torch.float32, Known(0.25)) == pytest.approx(0.75)


def test_products_of_half_the_width_take_half_as_long():
    some = [segment(Product(2_000_000_000, 1, torch.float32, "wide"))]
    assert pass_seconds(some, MACHINE, torch.bfloat16, None) == pytest.approx(4)


def test_the_rest_is_bytes_and_starts():
    some = [segment(moved=300_000_000, fresh=100_000_000, num_ops=50)]
    assert pass_seconds(some, MACHINE, torch.float32, None) == pytest.approx(2 + 10 + 0.05)


def test_what_makes_a_block_of_its_own_counts_as_fresh():
    def do() -> None:
        small = torch.empty(1024, dtype=torch.uint8)
        large = torch.empty(MAPPED, dtype=torch.uint8)
        small.clone(), large.clone()

    found = traced(do)
    # each `empty` is written once, each clone read and written
    assert (found.moved, found.fresh) == (3 * 1024 + 3 * MAPPED, 3 * MAPPED)


def multiply() -> None:
    a = torch.empty(8, 16).requires_grad_()
    b = torch.empty(32, 16, dtype=torch.float32).requires_grad_()
    F.linear(a, b).sum().backward()
    torch.empty(8, 4).addmm_(torch.empty(8, 3), torch.empty(5, 3)[:4].t(), alpha=0.5)


def attend() -> None:
    q = torch.empty(1, 2, 48, 64, dtype=torch.bfloat16).requires_grad_()
    F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()


def multiply_in_place() -> None:
    out = torch.empty(2, 3, 5)
    torch.bmm(torch.empty(2, 3, 4), torch.empty(2, 5, 4).transpose(1, 2), out=out)


@pytest.mark.parametrize("do", [multiply, attend, multiply_in_place])
def test_every_product_of_a_trace_can_be_tried(do):
    found = traced(do)
    assert found.products
    tried = Tried("cpu", threads=1)
    tried.look([found])
    assert all((tried.seconds(product) or 0) > 0 for product in found.products)


def test_the_products_that_cost_most_are_tried_first_and_each_once(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(Tried, "_try", lambda self, call: asked.append(call) or 1.0)
    rare, often = Product(5, 1, torch.float32, "rare"), Product(2, 1, torch.float32, "often")
    large = Product(9, trying.LARGEST + 1, torch.float32, "large")
    tried = Tried("cpu", threads=1)
    tried.look([segment(rare), segment(often, often, often, large)])
    tried.look([segment(rare)])
    assert asked == ["often", "rare"]
    assert tried.seconds(large) is None


def test_no_more_time_is_spent_than_there_is(monkeypatch):
    monkeypatch.setattr(trying, "BUDGET", 0.0)
    product = Product(5, 1, torch.float32, "any")
    tried = Tried("cpu", threads=1)
    tried.look([segment(product)])
    assert tried.seconds(product) is None


def test_this_machine_tells_three_speeds_and_a_card_that_is_not_here_two():
    found = here("cpu", threads=1, dtype=torch.float32)
    assert min(found.products, found.bandwidth, found.fresh) > 0
    assert found.launch == CPU_LAUNCH
    card = named("H100-80G")
    assert card.fresh == card.bandwidth


def test_layers_go_by_the_token_and_the_head_by_the_target():
    """Two layers that move 10⁸ bytes each over 4 tokens, a head that moves 3 · 10⁸ for 2 targets; a second for 10⁸."""
    layer, head = (Segment((place, 0, 0), moved=moved) for place, moved in (("forward", 10**8), ("between", 3 * 10**8)))
    found = looking([layer, layer, head], MACHINE, torch.float32, None, tokens=4, targets=2)
    assert found == Looking(token=0.5, target=1.5)
    assert found.price(targets=10, tokens=100) == pytest.approx(0.65), "of rows of which a tenth is trained"
    assert found.price(targets=0, tokens=0) == 0.0


def test_start_and_end_go_by_bytes_on_top_of_what_libraries_take():
    kept = Kept(weights=int(2 * LOADED), masters=0, gradients=0, optimizer=0, trained_parameters=0)
    assert starting_seconds(kept) == pytest.approx(STARTING_S + 2)
    assert finishing_seconds(int(WRITTEN)) == pytest.approx(FINISHING_S + 2), "the result is rehearsed, and written"
