"""Nodes of a card on a processor: against what models spell out, with gradients, and which way computes an operator."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from card import as_on_a_card
from tunesmith.models import card_kernels, fast_layers
from tunesmith.models.card_kernels import ACTIVATIONS, OPERATORS, gate, gate_backward, rotated, way_of
from tunesmith.models.rms_norm import rms_norm

CPU = torch.device("cpu")
ROUNDINGS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}
"""A few roundings of each type, in another order."""


def assert_near(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= ROUNDINGS[dtype] * other.norm()


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_the_one_that_models_spell_out(start: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 64).to(dtype).requires_grad_(), torch.randn(64).to(dtype).requires_grad_()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    expected = (normed * (1 + weight.float())).to(dtype) if start else weight * normed.to(dtype)
    grad = torch.randn_like(expected)
    with as_on_a_card():
        ours = rms_norm(x, weight, 1e-5, start=start)
        mine = torch.autograd.grad(ours, (x, weight), grad)
    assert_near([ours, *mine], [expected, *torch.autograd.grad(expected, (x, weight), grad)], dtype)


@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_a_rotation_is_the_models(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 7, heads, 8).to(dtype).transpose(1, 2).requires_grad_() for heads in (4, 2))
    cos, sin = (torch.randn(2, 7, 8).to(dtype) for _ in range(2))
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    ours = rotated(q, cos, sin), rotated(k, cos, sin)
    grads = [torch.randn_like(out) for out in expected]
    assert ours[0].transpose(1, 2).is_contiguous()  # as packed attention reads it, without a copy
    mine, theirs = (torch.autograd.grad(outs, (q, k), grads) for outs in (ours, expected))
    assert_near([*ours, *mine], [*expected, *theirs], dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_a_gate_and_its_gradients_are_those_of_autograd(
    activation: card_kernels.Activation, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    g, u, gh = (torch.randn(6, 10).to(dtype).requires_grad_() for _ in range(3))
    h = activation.value(g) * u
    expected = [h, *torch.autograd.grad(h, (g, u), gh)]
    with torch.no_grad(), as_on_a_card():
        assert_near([gate(g, u, activation), *gate_backward(gh, g, u, activation, needs_h=True)], [h, *expected], dtype)


def test_attention_that_turns_otherwise_keeps_its_own() -> None:
    with as_on_a_card():
        fast_layers._rotation_agrees.cache_clear()
        assert fast_layers._rotation_agrees(apply_rotary_pos_emb, CPU, torch.float32)
        assert not fast_layers._rotation_agrees(interleaved, CPU, torch.float32)
    fast_layers._rotation_agrees.cache_clear()


class GemmaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(torch.full((64,), 20.0).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (64,), eps=self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)


def counts_as_the_model(*, card: bool) -> None:
    """Fails where a norm with weights of 20, in bfloat16, does not answer as before."""
    norm = GemmaRMSNorm()
    model, x = nn.Sequential(norm), torch.randn(3, 64).bfloat16()
    before = norm(x)
    with as_on_a_card() if card else nullcontext():
        fast_layers.use_fast_layers(model)
        after = norm(x)
    assert "forward" in vars(norm)
    assert (after - before).norm() < 0.01 * before.norm()


@pytest.mark.parametrize("card", [False, True])
def test_large_weights_of_a_norm_are_counted_from_where_the_model_counts(*, card: bool) -> None:
    """In bfloat16 20 and 21 are nearly alike: they were taken for one another."""
    counts_as_the_model(card=card)  # trap: L18


def test_the_test_sees_weights_that_are_counted_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_layers, "_norm_agrees", lambda module, start: start == 0)
    with pytest.raises(AssertionError):
        counts_as_the_model(card=False)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.act_fn = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_an_activation_is_known_by_its_own_values() -> None:
    """Of small numbers SiLU and GELU differ by less than bfloat16 rounds: one was taken for the other."""
    torch.manual_seed(0)
    mlp = Gated().bfloat16()
    with torch.no_grad():
        mlp.gate_proj.weight.mul_(0.02)
    fast_layers.use_fast_layers(mlp)
    assert mlp.forward.args[1].name == "gelu_tanh"


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch):
    """Chosen anew, with what `_compiled` shall be."""

    def choose(compiled, name: str = "gate", setting: str | bool = "silu") -> card_kernels.Way:
        monkeypatch.setattr(card_kernels, "_compiled", compiled)
        monkeypatch.setattr(card_kernels, "_CHOSEN", {})
        return way_of(name, CPU, torch.bfloat16, setting)

    return choose


def test_the_compiled_kernel_is_taken_where_it_is_right(ways) -> None:
    assert ways(lambda plain: plain).name == "compiled"
    assert ways(lambda plain: plain, "rotate", False).name == "compiled"
    assert ways(lambda plain: plain, "gate_backward").refused == ()


def broken(plain):
    raise RuntimeError("Failed to find C compiler")


def off(plain):
    return lambda g, u, act: plain(g, u, act) * 1.05


def writes(plain):
    return lambda g, u, act: plain(g, u, act) + 0 * g.zero_()


@pytest.mark.parametrize(
    ("compiled", "why"),
    [(broken, "Failed to find C compiler"), (off, "off by 0.05"), (writes, "it writes into its inputs")],
)
def test_a_way_that_fails_or_is_wrong_is_named_and_the_next_one_computes(ways, compiled, why: str) -> None:
    way = ways(compiled)
    assert (way.name, way.run) == ("one by one", OPERATORS["gate"].plain)
    assert why in way.refused[0]
    assert why in card_kernels.refused_here(CPU, torch.bfloat16)
    assert card_kernels.refused_here(CPU, torch.float32) == ""


def test_ligers_kernels_are_the_second_way_where_they_are_installed(ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_kernels, "find_spec", lambda name: name == "liger_kernel")
    assert ways(broken).name == "one by one"  # found, but it does not start
    operator = card_kernels.Operator(OPERATORS["gate"].schema, OPERATORS["gate"].plain, OPERATORS["gate"].plain)
    monkeypatch.setitem(card_kernels.OPERATORS, "gate", operator)
    assert ways(broken).name == "Liger's"
    assert ways(broken, setting="relu").name == "one by one"


def test_memory_that_ends_in_a_probe_is_not_hidden(ways) -> None:
    def ends(plain):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        ways(ends)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "setting"), [("gate", "silu"), ("gate_backward", "silu"), ("rotate", False), ("rotate", True)]
)
def test_the_compiler_of_torch_makes_one_kernel_of_each(name: str, setting: str | bool) -> None:
    """Counted as one operator by `benchmarks roofline`. Slow: a C++ compiler runs."""
    from torch._inductor import metrics

    metrics.reset()
    compiled = card_kernels._compiled(OPERATORS[name].whole or OPERATORS[name].plain)
    assert card_kernels._problem(compiled, name, CPU, torch.bfloat16, setting) == ""
    assert metrics.generated_kernel_count == 1
