"""The LoRA layer against plain autograd and against peft's."""

# T tokens, I inputs, O outputs, R rank

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_reference import lora_forward_reference
from tunesmith.methods.lora_layer import LoraLinear, lora_forward
from tunesmith.models.quantized import QuantizedLinear

Forward = Callable[..., Tensor]


def tensors(seed: int, *, shape: tuple[int, ...], outputs: int, rank: int, bias: bool) -> tuple[Tensor | None, ...]:
    """x, weight, bias, A and B in float64; the frozen ones without gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int, train: bool) -> Tensor:
        return torch.randn(sizes, dtype=torch.float64, generator=generator).requires_grad_(train)

    inputs = shape[-1]
    return (
        draw(*shape, train=True),
        draw(outputs, inputs, train=False),
        draw(outputs, train=False) if bias else None,
        draw(rank, inputs, train=True),
        draw(outputs, rank, train=True),
    )


def assert_same_output_and_gradients(forward: Forward, given: tuple[Tensor | None, ...], *, scale: float) -> None:
    trained = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    expected = lora_forward_reference(*given, scale=scale)
    out = forward(*given, scale=scale)
    g = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    # Sums of at most 40 products of standard normals in float64: 1e-12 is thousands of roundings.
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(out, trained, g), torch.autograd.grad(expected, trained, g), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=2).flatmap(
        lambda front: st.integers(1, 9).map(lambda inputs: (*front, inputs))
    ),
    outputs=st.integers(1, 9),
    rank=st.integers(1, 5),
    bias=st.booleans(),
    scale=st.sampled_from([0.25, 1.0, 2.0, 4.0]),
)
@settings(max_examples=60, deadline=None)
def test_forward_and_every_gradient_equal_plain_autograd(
    *, seed: int, shape: tuple[int, ...], outputs: int, rank: int, bias: bool, scale: float
) -> None:
    given = tensors(seed, shape=shape, outputs=outputs, rank=rank, bias=bias)
    assert_same_output_and_gradients(lora_forward, given, scale=scale)


def test_the_comparison_sees_a_missing_scale_in_one_gradient() -> None:
    class Unscaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):  # type: ignore[no-untyped-def]
            x, weight, bias, a, b, scale = tensors
            ctx.save_for_backward(x, weight, a, b)
            ctx.scale = scale
            return lora_forward_reference(x, weight, bias, a, b, scale=scale)

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            x, weight, a, b = ctx.saved_tensors
            glow = g @ b * ctx.scale
            return g @ weight + glow @ a, None, None, glow.t() @ x, g.t() @ (x @ a.t()), None

    def buggy(x, weight, bias, a, b, *, scale):  # type: ignore[no-untyped-def]
        return Unscaled.apply(x, weight, bias, a, b, scale)

    given = tensors(0, shape=(4, 6), outputs=5, rank=2, bias=True)
    assert_same_output_and_gradients(buggy, given, scale=1.0)
    with pytest.raises(AssertionError):
        assert_same_output_and_gradients(buggy, given, scale=2.0)


def test_a_frozen_input_needs_no_gradient() -> None:
    x, weight, bias, a, b = tensors(4, shape=(3, 4), outputs=5, rank=2, bias=True)
    lora_forward(x.detach(), weight, bias, a, b, scale=1.0).sum().backward()
    expected = torch.autograd.grad(lora_forward_reference(x.detach(), weight, bias, a, b, scale=1.0).sum(), (a, b))
    torch.testing.assert_close((a.grad, b.grad), expected, rtol=1e-12, atol=1e-12)


def test_a_gradient_without_memory_of_its_own_is_taken() -> None:
    """`y.sum().backward()` hands over one expanded number."""
    x, weight, bias, a, b = tensors(5, shape=(2, 3, 4), outputs=5, rank=2, bias=True)
    (from_sum,) = torch.autograd.grad(lora_forward(x, weight, bias, a, b, scale=2.0).sum(), (a,))
    out = lora_forward(x, weight, bias, a, b, scale=2.0)
    (from_ones,) = torch.autograd.grad(out, (a,), torch.ones_like(out))
    torch.testing.assert_close(from_sum, from_ones, rtol=1e-12, atol=1e-12)


def base_layer(kind: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(24, 40), "no bias": nn.Linear(24, 40, bias=False), "conv1d": Conv1D(40, 24)}
    layer = layers[kind].to(dtype).requires_grad_(False)
    if kind == "conv1d":
        nn.init.normal_(layer.bias)
    return layer


def with_adapter(base: nn.Module, *, scale: float = 2.0, dropout: float = 0.0, zeros: bool = False) -> LoraLinear:
    layer = LoraLinear(base, rank=4, scale=scale, dropout=dropout)
    torch.manual_seed(1)
    nn.init.normal_(layer.lora_A, std=0.2)
    if not zeros:
        nn.init.normal_(layer.lora_B, std=0.2)
    return layer


def test_a_base_that_computes_in_its_own_way_is_asked() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    base = Doubling(24, 40).requires_grad_(False)
    x = torch.randn(3, 24)
    layer = with_adapter(base, zeros=True)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(layer(x), base(x) + 2.0 * x @ layer.lora_A.t() @ layer.lora_B.t())


def peft_layer(base: nn.Module, ours: LoraLinear) -> nn.Module:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = base

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], fan_in_fan_out=isinstance(base, Conv1D))
    theirs = get_peft_model(Holder(), config).base_model.model.layer
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
    return theirs


def test_dropout_draws_what_peft_draws() -> None:
    ours = with_adapter(base_layer("linear"), dropout=0.5).train()
    theirs = peft_layer(base_layer("linear"), ours).train()
    theirs.lora_dropout["default"] = nn.Dropout(0.5)
    x = torch.randn(5, 24)
    torch.manual_seed(7)
    out = ours(x)
    torch.manual_seed(7)
    torch.testing.assert_close(out, theirs(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(out, ours(x)), "the next call draws anew"


def test_dropout_is_off_in_evaluation() -> None:
    layer = with_adapter(base_layer("linear"), dropout=0.5).eval()
    x = torch.randn(5, 24)
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), with_adapter(base_layer("linear"))(x), rtol=0, atol=0)


def test_bfloat16_is_as_close_to_float32_as_plain_autograd_in_bfloat16() -> None:
    exact = with_adapter(base_layer("linear"))
    layer = with_adapter(base_layer("linear")).to(torch.bfloat16)
    x, g = torch.randn(64, 24), torch.randn(64, 40)

    def gradients(module: Callable[[Tensor], Tensor], dtype: torch.dtype, *leaves: Tensor) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        return [t.float() for t in torch.autograd.grad(module(leaf), (leaf, *leaves), g.to(dtype))]

    def reference(x: Tensor) -> Tensor:
        return lora_forward_reference(x, layer.weight_OI, layer.bias, layer.lora_A, layer.lora_B, scale=2.0)

    true = gradients(exact, torch.float32, exact.lora_A, exact.lora_B)
    ours = gradients(layer, torch.bfloat16, layer.lora_A, layer.lora_B)
    plain = gradients(reference, torch.bfloat16, layer.lora_A, layer.lora_B)
    for t, mine, theirs in zip(true, ours, plain, strict=True):
        # The same rounding, at other places: a tenth more at most, and 1 % of the size of the gradient in all.
        assert (mine - t).norm() <= 1.1 * (theirs - t).norm()
        assert (mine - t).norm() <= 0.01 * t.norm()


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_may_write_into_the_answer(packed: bool) -> None:
    """As Longformer and DeBERTa do, which divide their queries in place."""
    torch.manual_seed(0)
    base: nn.Module = QuantizedLinear(nn.Linear(64, 8), device="cpu") if packed else nn.Linear(64, 8)
    layer = LoraLinear(base, rank=2, scale=1.0, dropout=0.0)
    x = torch.randn(2, 3, 64, requires_grad=True)
    for module in (base, layer):
        written = module(x)
        written /= 4.0
        found, expected = (torch.autograd.grad(out.sum(), x)[0] for out in (written, module(x) / 4.0))
        assert torch.equal(found, expected)
