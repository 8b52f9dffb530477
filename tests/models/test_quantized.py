"""A packed weight: what it unpacks to, and products with it held against plain autograd on what it unpacks to."""

# T tokens, I inputs, O outputs

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_reference import lora_forward_reference
from tunesmith.errors import RecipeError
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.models import quantized
from tunesmith.models.quantized import QuantizedLinear

kinds = pytest.mark.parametrize("kind", [nn.Linear, Conv1D])


def layer(kind: Any, inputs: int, outputs: int, *, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    made = Conv1D(outputs, inputs) if kind is Conv1D else nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.02)
    return made.to(dtype)


def packed(base: nn.Module) -> QuantizedLinear:
    return QuantizedLinear(base, device="cpu")


def off_by(found: Tensor, weight: Tensor) -> float:
    return float((found.float() - weight.detach().float()).norm() / weight.detach().float().norm())


@kinds
@pytest.mark.parametrize("shape", [(64, 48), (160, 10), (96, 5), (33, 7), (256, 192)])
def test_a_weight_unpacks_to_nearly_what_it_was(kind: Any, shape: tuple[int, int]) -> None:
    base = layer(kind, *shape)
    made = packed(base)
    assert made.weight.shape == base.weight.shape
    assert made.weight_OI().shape == (shape[1], shape[0]) == made.shape_OI
    # 16 levels of a normal distribution: 9 % of its width.
    assert off_by(made.weight, base.weight) < 0.11


def test_a_row_of_zeros_stays_one() -> None:
    base = layer(nn.Linear, 64, 3)
    base.weight.data[1] = 0
    assert torch.equal(packed(base).weight[1], torch.zeros(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_twice_gives_the_same_bits(dtype: torch.dtype) -> None:
    first, second = (packed(layer(nn.Linear, 128, 96, dtype=dtype)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    assert first.weight.dtype == dtype


def test_what_it_weighs() -> None:
    """Of 256 × 256 weights: half a byte each, a byte a block of 64, and a little for the scales' own."""
    base = layer(nn.Linear, 256, 256)
    num, blocks = 256 * 256, 256 * 256 // 64
    assert packed(base).num_bytes == num // 2 + blocks + 4 * blocks // 256 + 4 * 256 + 4


@kinds
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_products_are_those_of_the_unpacked_weight(kind: Any, shape: tuple[int, ...]) -> None:
    made = packed(layer(kind, 64, 48))
    torch.manual_seed(1)
    x, g = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 48)
    expected = F.linear(x, made.weight_OI(), made.bias)
    out = made(x)
    # float32, sums of 64 products below 1: in another order of sums.
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    inputs = [x, made.bias]
    for mine, theirs in zip(torch.autograd.grad(out, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@kinds
def test_low_rank_paths_beside_it_are_those_of_plain_autograd(kind: Any) -> None:
    made = packed(layer(kind, 64, 48))
    path = LoraLinear(made, rank=4, scale=2.0, dropout=0.0)
    torch.manual_seed(1)
    for matrix in (path.lora_A, path.lora_B):
        matrix.data.normal_()
    x, g = torch.randn(2, 3, 64, requires_grad=True), torch.randn(2, 3, 48)
    out = path(x)
    expected = lora_forward_reference(x, made.weight_OI(), made.bias, path.lora_A, path.lora_B, scale=2.0)
    trained = [x, path.lora_A, path.lora_B]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(out, trained, g), torch.autograd.grad(expected, trained, g), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("with_path", [False, True])
def test_the_graph_keeps_no_unpacked_weight(with_path: bool) -> None:
    made: nn.Module = packed(layer(nn.Linear, 256, 256))
    if with_path:
        made = LoraLinear(made, rank=2, scale=1.0, dropout=0.0)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        out = made(torch.randn(4, 256, requires_grad=True))
    gc.collect()
    kept += [t.shape for t in gc.get_objects() if type(t) is Tensor]
    assert torch.Size((256, 256)) not in kept
    assert out.grad_fn is not None


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"method.name: qlora needs .*pip install 'bitsandbytes>="):
        quantized.check_installed()
