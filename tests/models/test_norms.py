"""Norms in one node are the models' own norms: result and gradients, for each class of module there is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from packed import CAN, batch_of, rows_of, sharp
from tunesmith.models import norms
from tunesmith.models.attention import use_ragged
from tunesmith.models.forward import logits_at_targets

WITH_RMS = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "mistral",
    "phi3",
    "olmo2",
    "smollm3",
    "granite",
)


def answers(model: nn.Module) -> list[torch.Tensor]:
    """Logits of a packed batch, and the gradient of every weight."""
    use_ragged(model)
    model.zero_grad()
    batch = batch_of(rows_of())
    logits_NV = logits_at_targets(model, batch)
    F.cross_entropy(logits_NV.float(), batch.targets_N).backward()
    return [logits_NV.detach(), *(weight.grad for weight in model.parameters())]


@pytest.mark.parametrize("arch", CAN)
def test_a_model_answers_and_learns_alike(arch):
    """float32: 1e-4 of the largest is rounding through a whole model of such weights; others have no RMS norms."""
    model = sharp(arch)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    expected = answers(copy.deepcopy(model))
    replaced = norms.use_fast_norms(model)
    assert (replaced > 0) == (arch in WITH_RMS)
    for one, other in zip(answers(model), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("arch", WITH_RMS)
def test_in_bfloat16_a_norm_rounds_as_the_models_own(arch):
    """Bit for bit forward: one rounding more or less would be a step of bfloat16 in every layer."""
    own, fast = sharp(arch).bfloat16(), sharp(arch).bfloat16()
    norms.use_fast_norms(fast)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    pairs = [(a, b) for a, b in zip(own.modules(), fast.modules(), strict=True) if "forward" in vars(b)]
    for a, b in pairs:
        wide = x.repeat(1, 8)[:, : len(a.weight)]
        assert torch.equal(a(wide), b(wide))


def test_gradients_are_those_of_the_formula():
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: norms._RmsNorm.apply(x, weight, 1e-6), (x, weight))


def test_inputs_are_left_as_they_are():
    x = torch.randn(3, 5).requires_grad_()
    weight = torch.rand(5)
    grad, before = torch.randn(3, 5), x.detach().clone()
    grad_before = grad.clone()
    norms._RmsNorm.apply(x, weight, 1e-6).backward(grad)
    assert torch.equal(x, before)
    assert torch.equal(grad, grad_before)


class OddRMSNorm(nn.Module):
    """Looks like the others, and is not: it forgets the mean's root."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps)


def test_a_norm_that_only_looks_known_stays_its_own():
    odd = OddRMSNorm()
    assert norms.use_fast_norms(odd) == 0
    assert "forward" not in vars(odd)


def test_the_self_check_catches_a_wrong_formula(monkeypatch):
    """Planted: another epsilon."""
    real = norms._epsilon
    monkeypatch.setattr(norms, "_epsilon", lambda module: real(module) + 1.0)
    assert norms.use_fast_norms(sharp("llama")) == 0
