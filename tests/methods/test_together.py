"""LoRA layers computed together are the same layers: outputs and every gradient, against one by one."""

# T tokens, I inputs, F width of an MLP, R rank

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from packed import CAN, batch_of, rows_of, sharp
from tunesmith.methods import together
from tunesmith.methods.lora import LoraAttachment, attach
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.methods.together import ACTIVATIONS, MLP, compute_together, siblings_forward
from tunesmith.models.attention import use_packed_attention
from tunesmith.models.forward import logits_at_targets
from tunesmith.models.modes import checkpoint_layers
from tunesmith.recipe.methods import DoraMethod, LoraMethod

GATED = (
    *("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("mistral", "olmo2", "smollm3", "granite", "cohere"),
)
SIBLINGS = (*GATED, "qwen3_moe", "opt")
"""phi3, gpt2 and gpt_neox have one layer for queries, keys and values, and other MLPs."""


def layer(inputs: int, outputs: int, *, rank: int, bias: bool = False, seed: int = 0) -> LoraLinear:
    """float64, of random numbers, its matrices trained."""
    generator = torch.Generator().manual_seed(seed)
    made = LoraLinear(nn.Linear(inputs, outputs, bias=bias).double(), rank=rank, scale=2.0 / rank, dropout=0.0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    made.base.requires_grad_(False)
    return made


def gradients(out: Tensor, *wanted: Tensor) -> list[Tensor]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, wanted, grad)]


def all_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """float64: sums of some dozen products of standard normals, three deep."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * max(1.0, float(other.detach().abs().max())))


@given(
    front=st.lists(st.integers(1, 4), max_size=2),
    inputs=st.integers(1, 9),
    outputs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.booleans()), min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=60)
def test_siblings_are_layers_one_by_one(front, inputs, outputs):
    """Each with a rank of its own; by plain autograd."""
    layers = [layer(inputs, n, rank=rank, bias=bias, seed=i) for i, (n, rank, bias) in enumerate(outputs)]
    x = torch.randn(*front, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    trained = [matrix for one in layers for matrix in (one.lora_A, one.lora_B)]
    ours = gradients(torch.cat(siblings_forward(x, layers), -1), x, *trained)
    all_close(ours, gradients(torch.cat([one._forward_by_autograd(x) for one in layers], -1), x, *trained))


class Mlp(nn.Module):
    def __init__(self, inputs: int, width: int, ranks: tuple[int, int, int]) -> None:
        super().__init__()
        self.gate_proj = layer(inputs, width, rank=ranks[0], seed=1)
        self.up_proj = layer(inputs, width, rank=ranks[1], seed=2)
        self.down_proj = layer(width, inputs, rank=ranks[2], seed=3)
        self.act = F.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


@given(
    inputs=st.integers(1, 9),
    width=st.integers(1, 9),
    ranks=st.tuples(*[st.integers(1, 4)] * 3),
    activation=st.integers(0, 2),
)
@settings(deadline=None, max_examples=60)
def test_an_mlp_is_its_layers_one_by_one(inputs, width, ranks, activation):
    mlp = Mlp(inputs, width, ranks)
    mlp.act = ACTIVATIONS[activation].value
    x = torch.randn(2, 3, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    trained = [m for name in MLP for m in (getattr(mlp, name).lora_A, getattr(mlp, name).lora_B)]
    ours = gradients(together._gated(mlp, ACTIVATIONS[activation], mlp.forward, x), x, *trained)
    all_close(ours, gradients(mlp(x), x, *trained))


def test_a_known_mlp_is_taken_and_an_odd_one_is_not():
    """Planted: an MLP of the right names whose gate is squared."""
    usual, odd = Mlp(6, 8, (2, 2, 2)), Mlp(6, 8, (2, 2, 2))
    odd.act = torch.square
    assert compute_together(usual) == (1, 0)
    assert compute_together(odd) == (0, 1)  # gate and up still read the same input


def tuned(arch: str, *, fast: bool, **settings) -> tuple[nn.Module, LoraAttachment]:
    """A tiny model with adapters that do something."""
    model = sharp(arch)
    use_packed_attention(model)
    attachment = attach(model, LoraMethod(rank=4, alpha=8, **settings), seed=0)
    with torch.no_grad():
        for name, tensor in attachment.trained.items():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    attachment.publish()
    found = compute_together(model) if fast else (0, 0)
    if fast and not settings:
        assert (found[0] > 0, found[1] > 0) == (arch in GATED, arch in SIBLINGS)
    return model, attachment


def answers(model: nn.Module, attachment: LoraAttachment) -> list[Tensor]:
    batch = batch_of(rows_of())
    logits_NV = logits_at_targets(model, batch)
    F.cross_entropy(logits_NV.float(), batch.targets_N).backward()
    attachment.collect_gradients()
    return [logits_NV.detach(), *(tensor.grad for tensor in attachment.trained.values())]


def models_are_alike(one, other) -> None:
    """float32: the sums of a whole model, rounded in another order."""
    for ours, theirs in zip(answers(*one), answers(*other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("arch", CAN)
def test_every_model_answers_and_learns_alike(arch):
    models_are_alike(tuned(arch, fast=True), tuned(arch, fast=False))


@pytest.mark.parametrize(
    "settings",
    [{"targets": ("q_proj", "v_proj", "up_proj")}, {"rank_pattern": {"k_proj": 2, "up_proj": 7}}, {"init": "pissa"}],
)
def test_models_in_which_layers_differ_learn_alike(settings):
    """Some adapted, of several ranks, or with a start that is taken off."""
    models_are_alike(tuned("llama", fast=True, **settings), tuned("llama", fast=False, **settings))


def test_recomputed_layers_learn_alike():
    """The recomputation is broken off in the middle of a layer: what waits there must not reach the next one."""
    both = [tuned("llama", fast=fast) for fast in (True, False)]
    for model, _ in both:
        checkpoint_layers(model.train(), 2)
    for _ in range(2):
        models_are_alike(*both)
        for _, attachment in both:
            for tensor in attachment.trained.values():
                tensor.grad = None


def test_dropout_and_dora_and_adapters_that_are_off_go_layer_by_layer(monkeypatch):
    monkeypatch.setattr(together._Gated, "apply", lambda *args: pytest.fail("an MLP in one node"))
    monkeypatch.setattr(together._Siblings, "apply", lambda *args: pytest.fail("siblings in one node"))
    batch = batch_of(rows_of())
    model = sharp("llama")
    use_packed_attention(model)
    attach(model, DoraMethod(rank=4), seed=0)
    assert compute_together(model) == (0, 0)
    model = sharp("llama").train()
    use_packed_attention(model)
    attach(model, LoraMethod(rank=4, dropout=0.5), seed=0)
    compute_together(model)
    logits_at_targets(model, batch)
    monkeypatch.undo()
    model, attachment = tuned("llama", fast=True)
    untouched = sharp("llama")
    use_packed_attention(untouched)
    with attachment.adapter_disabled():
        assert torch.equal(logits_at_targets(model, batch), logits_at_targets(untouched, batch))


def test_adapters_that_are_taken_off_leave_a_plain_model():
    model, attachment = tuned("llama", fast=True)
    attachment.unload()
    untouched, batch = sharp("llama"), batch_of(rows_of())
    use_packed_attention(untouched)
    assert torch.equal(logits_at_targets(model, batch), logits_at_targets(untouched, batch))


def test_an_input_of_ones_own_is_not_mixed_up():
    """Layers of the right names that read different tensors."""
    parent = nn.Module()
    parent.q_proj, parent.k_proj, parent.v_proj = (layer(4, 3, rank=2, seed=i) for i in range(3))
    plain = copy.deepcopy(parent)
    assert compute_together(parent) == (0, 1)
    a, b = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, x in (("q_proj", a), ("k_proj", b), ("v_proj", a), ("v_proj", b), ("q_proj", b), ("q_proj", a)):
        torch.testing.assert_close(getattr(parent, name)(x), getattr(plain, name)(x), rtol=1e-12, atol=1e-12)


def test_the_test_catches_a_gradient_that_is_left_out(monkeypatch):
    """Planted: what the input gets from the low-rank paths is forgotten."""
    real = together._Siblings.backward

    def forgetful(ctx, *grads):
        gx, *others = real(ctx, *grads)
        return gx * 0.9, *others

    monkeypatch.setattr(together._Siblings, "backward", staticmethod(forgetful))
    with pytest.raises(AssertionError):
        test_siblings_are_layers_one_by_one.hypothesis.inner_test([2], 4, [(3, 2, False)])
