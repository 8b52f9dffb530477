"""Products in portions are the products: every row once, and the gradients of a linear layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tiny_model import tiny_model
from tunesmith.models import products
from tunesmith.models.output import find_output


@pytest.fixture(autouse=True)
def two_threads_with_amx(monkeypatch) -> None:
    monkeypatch.setattr(products, "_is_two_with_amx", lambda: True)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    """To the product in float64: rounded once to bfloat16, half of whose last bit is 2^-9, and to float32 before."""
    largest = float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("rows", "outputs", "cuts"),
    [
        (544, 576, None),
        (545, 576, [448, 97]),
        (640, 576, [448, 192]),
        (960, 576, [448, 512]),
        (1439, 576, [448, 448, 543]),
        (1440, 576, None),
        (640, 1536, None),
        (200, 191, None),
        (200, 192, [128, 72]),
    ],
)
def test_portions_are_below_the_outputs(rows, outputs, cuts):
    assert products._cuts(torch.empty(rows, 384, dtype=torch.bfloat16), outputs) == cuts


def test_what_is_fast_is_not_cut(monkeypatch):
    assert products._cuts(torch.empty(640, 383, dtype=torch.bfloat16), 576) is None  # few inputs
    assert products._cuts(torch.empty(640, 1536), 576) is None  # float32
    monkeypatch.setattr(products, "_is_two_with_amx", lambda: False)
    assert products._cuts(torch.empty(640, 1536, dtype=torch.bfloat16), 576) is None


@given(rows=st.integers(1, 1100), outputs=st.sampled_from([192, 256, 320]), has_bias=st.booleans())
@settings(deadline=None, max_examples=30)
def test_they_are_the_product(rows, outputs, has_bias):
    x, weight, bias = drawn(rows, 384), drawn(outputs, 384), drawn(outputs)
    exact = F.linear(x.double(), weight.double(), bias.double() if has_bias else None)
    close(products.linear(x, weight, bias if has_bias else None), exact)


@given(rows=st.integers(1, 1100), inputs=st.sampled_from([192, 256, 320]))
@settings(deadline=None, max_examples=30)
def test_they_are_the_gradient_of_the_input(rows, inputs):
    g, weight = drawn(rows, 384), drawn(384, inputs)
    exact = g.double() @ weight.double()
    close(products.times(g, weight), exact)
    into = drawn(rows, inputs)
    close(products.add_times_(into.clone(), g, weight), into.double() + exact)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_layer_learns_alike(has_bias):
    layer = nn.Linear(400, 256, bias=has_bias).bfloat16()
    x = drawn(3, 100, 400).requires_grad_()
    grad = drawn(3, 100, 256)

    def answers() -> list[torch.Tensor]:
        out = layer(x)
        return [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)]

    expected = answers()
    assert products.use_fast_linears(nn.Sequential(layer)) == 1
    for found, other in zip(answers(), expected, strict=True):
        assert found.shape == other.shape
        assert float((found - other).float().norm()) <= 2**-8 * float(other.float().norm())


def test_a_frozen_layer_gets_no_gradient():
    layer = nn.Linear(400, 256).bfloat16().requires_grad_(False)
    products.use_fast_linears(nn.Sequential(layer))
    x = drawn(300, 400).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_layers_within_one_node_and_other_kinds_stay_as_they_are(monkeypatch):
    class Own(nn.Linear):
        pass

    node, own = nn.Sequential(nn.Linear(4, 4)), Own(4, 4)
    node.forward = lambda x: x
    assert products.use_fast_linears(nn.Sequential(node, own)) == 0
    monkeypatch.setattr(products, "_is_two_with_amx", lambda: False)
    assert products.use_fast_linears(nn.Sequential(nn.Linear(4, 4))) == 0


def test_the_output_layer_stays_as_it_is():
    """Else it would not be known any more, and give all logits at once."""
    model = tiny_model("llama", vocab_size=96)
    assert products.use_fast_linears(model) == 14
    assert "forward" not in vars(model.get_output_embeddings())
    assert find_output(model) is not None


@pytest.mark.parametrize(("limit", "has_amx"), [("AVX512_CORE_BF16", False), ("avx512_core_amx", True), ("ALL", True)])
def test_what_onednn_may_not_use_does_not_count(monkeypatch, limit, has_amx):
    monkeypatch.setattr(products, "cpu_flags", lambda: {"amx_bf16"})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert products._has_amx.__wrapped__() is has_amx
