"""Nodes of linear layers and gated MLPs against plain autograd, in float64."""

# T tokens, I inputs, O outputs, R rank

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from card import as_on_a_card
from tunesmith.models.card_kernels import ACTIVATIONS
from tunesmith.models.linear_nodes import LinearParts, gated_mlp, linears
from tunesmith.models.rms_norm import origin_of, rms_norm

PLAIN_ACTIVATIONS = (F.silu, lambda x: F.gelu(x, approximate="tanh"), F.gelu, F.relu)


def draw(*sizes: int, trained: bool = True) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64).requires_grad_(trained)


def parts(inputs: int, outputs: int, *, rank: int, bias: bool, trained: bool) -> LinearParts:
    """`trained`: weight and bias; the low-rank path always is."""
    return LinearParts(
        draw(outputs, inputs, trained=trained),
        draw(outputs, trained=trained) if bias else None,
        draw(rank, inputs) if rank else None,
        draw(outputs, rank) if rank else None,
        scale=1.7,
    )


def plain(x: Tensor, layer: LinearParts) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    out = F.linear(x, layer.weight, layer.bias_O)
    return out if layer.a_RI is None else out + F.linear(F.linear(x, layer.a_RI), layer.b_OR) * layer.scale


def assert_equal_with_gradients(ours: list[Tensor], theirs: list[Tensor], inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = [torch.randn_like(out) for out in theirs]
    mine, expected = (torch.autograd.grad(outs, inputs, grads, retain_graph=True) for outs in (ours, theirs))
    # Sums of at most 20 products of normal numbers in float64.
    torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)


def trained_of(layers: tuple[LinearParts, ...]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in layer.tensors if tensor is not None and tensor.requires_grad]


@pytest.fixture(params=[False, True], ids=["processor", "card"])
def place(request: pytest.FixtureRequest) -> Iterator[None]:
    with as_on_a_card() if request.param else nullcontext():
        yield


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("rank", "bias", "trained"), list(product((0, 2), (False, True), (False, True))))
def test_siblings_and_a_gated_mlp_equal_plain_autograd(*, rank: int, bias: bool, trained: bool) -> None:
    torch.manual_seed(0)
    x = draw(2, 3, 5)
    layers = tuple(parts(5, outputs, rank=r, bias=bias, trained=trained) for outputs, r in ((7, rank), (4, 2 * rank)))
    inputs = [x, *trained_of(layers)]
    assert_equal_with_gradients(list(linears(x, layers)), [plain(x, layer) for layer in layers], inputs)

    how = {"rank": rank, "bias": bias, "trained": trained}
    gate, up, down = parts(5, 8, **how), parts(5, 8, **how), parts(8, 5, **how)
    for activation, value in zip(ACTIVATIONS, PLAIN_ACTIVATIONS, strict=True):
        expected = plain(value(plain(x, gate)) * plain(x, up), down)
        inputs = [x, *trained_of((gate, up, down))]
        assert_equal_with_gradients([gated_mlp(x, (gate, up, down), activation)], [expected], inputs)


def test_the_answers_of_some_siblings_alone_have_gradients() -> None:
    torch.manual_seed(0)
    x = draw(3, 5)
    layers = (parts(5, 7, rank=2, bias=False, trained=False), parts(5, 4, rank=2, bias=False, trained=False))
    (mine,) = torch.autograd.grad(linears(x, layers)[1].sum(), x)
    (expected,) = torch.autograd.grad(plain(x, layers[1]).sum(), x)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_a_path_of_zeros_changes_no_bit_and_a_small_one_is_rounded_once() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(80, 96).bfloat16()
    a, b = torch.randn(4, 96).bfloat16(), torch.zeros(80, 4).bfloat16()
    assert torch.equal(linears(x, [LinearParts(weight, None, a, b, 2.0)])[0], F.linear(x, weight))
    b = (0.05 * torch.randn(80, 4)).bfloat16()
    low = (x @ a.t()).double()
    exact = x.double() @ weight.double().t() + 2.0 * low @ b.double().t()
    after = F.linear(x, weight).addmm_(x @ a.t(), b.t(), alpha=2.0)
    ours = linears(x, [LinearParts(weight, None, a, b, 2.0)])[0]
    assert (ours - exact).norm() <= 1.01 * (after - exact).norm()


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_rms_norm_equals_the_one_that_models_spell_out(start: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 64).to(dtype).requires_grad_(), torch.randn(64).to(dtype).requires_grad_()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    expected = (normed * (1 + weight.float())).to(dtype) if start else weight * normed.to(dtype)
    ours, grad = rms_norm(x, weight, 1e-5, start=start), torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad(out, (x, weight), grad) for out in (ours, expected))
    tolerance = 8 * torch.finfo(dtype).eps  # a few roundings in another order
    for one, other in zip((ours, *mine), (expected, *theirs), strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def kept_bytes(out: Tensor, ignored: list[Tensor]) -> int:
    """Bytes of the tensors that the graph behind `out` keeps, each memory once."""
    sizes: dict[int, int] = {}
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            kept = [t for t in getattr(node, "saved_tensors", ()) if t is not None]
            sizes |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
            nodes += [before for before, _ in node.next_functions]
    known = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    return sum(size for address, size in sizes.items() if address not in known)


def test_answers_of_norms_are_computed_again_bit_for_bit() -> None:
    """64 × 96 numbers of two bytes for the siblings and as many for the MLP; what was written into is kept."""
    torch.manual_seed(0)

    def narrow(*sizes: int) -> Tensor:
        return draw(*sizes).detach().bfloat16().requires_grad_()

    x, weight = narrow(64, 96), narrow(96)
    layers = tuple(LinearParts(narrow(80, 96), None, narrow(4, 96), narrow(80, 4), 2.0) for _ in range(2))
    down = LinearParts(narrow(96, 80), None)
    trained = [x, weight, *trained_of((*layers, down))]

    def answers(normed: Tensor) -> Tensor:
        return torch.cat([*linears(normed, layers), gated_mlp(normed, (*layers, down), ACTIVATIONS[0])], 1)

    ours, kept = answers(rms_norm(x, weight, 1e-5)), answers(rms_norm(x, weight, 1e-5).view(64, 96))
    grad = torch.randn_like(ours)
    assert torch.equal(ours, kept)
    assert kept_bytes(kept, trained) - kept_bytes(ours, trained) == 64 * 96 * 2
    mine, expected = (torch.autograd.grad(out, trained, grad) for out in (ours, kept))
    assert all(map(torch.equal, mine, expected))

    changed = rms_norm(x, weight, 1e-5)
    assert origin_of(changed) is not None
    assert origin_of(changed.mul_(2)) is None
