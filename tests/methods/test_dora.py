"""DoRA's layer against the formula written out, against peft's, and its precision."""

# T tokens, I inputs, O outputs, R rank

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.test_lora_layer import base_layer
from tiny_model import tiny_model
from tunesmith.methods.lora import attach
from tunesmith.methods.lora_layer import DoraLinear
from tunesmith.recipe.methods import DoraMethod

VOCAB = 61
IDS = torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))


def moved(layer: DoraLinear) -> DoraLinear:
    """As training could have left it."""
    torch.manual_seed(1)
    nn.init.normal_(layer.lora_A, std=0.2)
    nn.init.normal_(layer.lora_B, std=0.2)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(torch.rand(40) + 0.5)
    layer.refresh()
    return layer


def reference(layer: DoraLinear, x: Tensor) -> Tensor:
    """Equation 5 of the paper, its norm a constant, by plain autograd."""
    v_OI = layer.weight_OI + layer.scale * layer.lora_B @ layer.lora_A
    rows_OI = layer.lora_magnitude_vector[:, None] * v_OI / v_OI.norm(dim=1, keepdim=True).detach()
    return F.linear(x, rows_OI, layer.bias)


def assert_equals_the_formula(forward: Callable[[DoraLinear, Tensor], Tensor], kind: str) -> None:
    layer = moved(DoraLinear(base_layer(kind), rank=4, scale=2.0, dropout=0.0))
    x = torch.randn(2, 7, 24, requires_grad=True)
    g = torch.randn(2, 7, 40)
    trained = (x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    out, expected = forward(layer, x), reference(layer, x)
    # 1e-4: float32 sums of 24 and 14 products of order 1 in another order.
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(out, trained, g), torch.autograd.grad(expected, trained, g), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_outputs_and_gradients_are_those_of_the_formula(kind: str) -> None:
    assert_equals_the_formula(lambda layer, x: layer(x), kind)


@pytest.mark.parametrize("bug", ["a norm with a gradient", "a norm of the update before", "a bias that is scaled"])
def test_the_comparison_sees(bug: str) -> None:
    def wrong(layer: DoraLinear, x: Tensor) -> Tensor:
        v_OI = layer.weight_OI + layer.scale * layer.lora_B @ layer.lora_A
        norm_O = v_OI.norm(dim=1) if bug == "a norm with a gradient" else v_OI.norm(dim=1).detach()
        if bug == "a norm of the update before":
            norm_O = layer.weight_OI.norm(dim=1)
        factor_O = layer.lora_magnitude_vector / norm_O
        out = F.linear(x, v_OI * factor_O[:, None])
        return out + layer.bias * (factor_O if bug == "a bias that is scaled" else 1)  # type: ignore[operator]

    with pytest.raises(AssertionError):
        assert_equals_the_formula(wrong, "linear")


def test_norms_are_computed_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    attachment = attach(model, DoraMethod(rank=4), seed=0)
    counted = []
    right = DoraLinear.refresh
    monkeypatch.setattr(DoraLinear, "refresh", lambda layer: (counted.append(layer), right(layer)))
    for _ in range(3):
        model(IDS).logits.sum().backward()
        attachment.collect_gradients()
    attachment.publish()
    assert len(counted) == len(attachment.layers)


def test_lengths_are_float32_in_a_model_that_is_not() -> None:
    layer = DoraLinear(base_layer("no bias", dtype=torch.bfloat16), rank=4, scale=1.0, dropout=0.0)
    assert layer.lora_magnitude_vector.dtype == torch.float32
    assert layer.lora_A.dtype == torch.bfloat16
    assert layer(torch.randn(3, 24).bfloat16()).dtype == torch.bfloat16


def test_dropout_falls_on_the_low_path_alone() -> None:
    layer = moved(DoraLinear(base_layer("linear"), rank=4, scale=2.0, dropout=0.5)).train()
    x = torch.randn(3, 24)
    torch.manual_seed(4)
    out = layer(x)
    torch.manual_seed(4)
    dropped = F.dropout(x, 0.5)
    low = F.linear(F.linear(dropped, layer.lora_A), layer.lora_B) * 2.0
    plain = F.linear(x, layer.weight_OI) + low
    expected = plain * layer.lora_magnitude_vector / layer.norm_O + layer.bias
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
