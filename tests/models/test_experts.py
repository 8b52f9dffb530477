"""Products of experts: by group, one after the other and packed, all as a plain loop over the experts computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mixtures import FAMILIES, IDS, drawn, logits, loss, mixture
from often import often
from tunesmith.methods.qlora import quantize_base, unpack_base
from tunesmith.models import experts as module
from tunesmith.models.experts import (
    ExpertMatrix,
    ExpertParts,
    Rows,
    expert_layers,
    expert_linear,
    experts_per_token,
    put_expert_layer,
)
from tunesmith.models.quantized_experts import QuantizedExperts
from tunesmith.recipe.methods import QloraMethod

TOKENS, CHOSEN, EXPERTS, INPUTS, OUTPUTS, SCALE = 11, 2, 5, 16, 24, 0.7
ROUTES: dict[str, Callable[[], Tensor]] = {
    "any": lambda: torch.randint(0, EXPERTS, (TOKENS, CHOSEN), generator=torch.Generator().manual_seed(1)),
    "one hot": lambda: torch.full((TOKENS, 1), 3),
    "first and last": lambda: torch.tensor([[0, EXPERTS - 1]] * TOKENS),
}


def plain_loop(x_SI: Tensor, weight_EOI: Tensor, a_ERI: Tensor, b_EOR: Tensor, experts_S: Tensor) -> Tensor:
    """Each row by the matrix of its expert with the path in it, one after the other, by plain autograd: the oracle."""
    merged_EOI = weight_EOI + SCALE * b_EOR @ a_ERI
    return torch.stack([merged_EOI[expert] @ x_I for x_I, expert in zip(x_SI, experts_S.tolist(), strict=True)])


# trap: A25
def assert_equals_the_plain_loop(route: str, rank: int, *, packed: bool = False) -> None:
    rows = Rows(ROUTES[route](), EXPERTS)
    x_TI, weight = drawn(torch.Size((TOKENS, INPUTS))), nn.Parameter(drawn(torch.Size((EXPERTS, OUTPUTS, INPUTS))))
    base = ExpertMatrix(weight.requires_grad_(False), is_transposed=False)
    held = QuantizedExperts(base, device="cpu") if packed else base
    x_SI = x_TI[rows.tokens_S].requires_grad_()
    a_ERI, b_EOR = (
        drawn(torch.Size(shape), 7).requires_grad_() for shape in ((EXPERTS, rank, INPUTS), (EXPERTS, OUTPUTS, rank))
    )
    y_SO = expert_linear(x_SI, ExpertParts(held.parts().weight, a_ERI, b_EOR, SCALE), rows)
    expected_SO = plain_loop(x_SI, held.weight, a_ERI, b_EOR, rows.experts_S)
    weights_SO = drawn(y_SO.shape, 9)
    ours, theirs = (torch.autograd.grad((out * weights_SO).sum(), (x_SI, a_ERI, b_EOR)) for out in (y_SO, expected_SO))
    # Sums of 24 numbers of order 1 in another order, float32.
    for found, expected in zip((y_SO, *ours), (expected_SO, *theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("rank", "packed"), [(8, False), (3, False), (8, True)], ids=["grouped", "odd rank", "packed"])
def test_products_and_gradients_are_those_of_a_plain_loop(route: str, rank: int, packed: bool) -> None:
    assert_equals_the_plain_loop(route, rank, packed=packed)


def test_an_expert_without_tokens_that_kept_something_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_can_group", lambda *tensors: False)
    theirs = torch.Tensor.new_zeros
    stale = lambda like, *size: theirs(like, *size).add_(1.0 if len(size) == 3 else 0.0)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_zeros", stale)
    with pytest.raises(AssertionError):
        assert_equals_the_plain_loop("one hot", 8)


def test_products_by_group_and_one_after_the_other_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture("qwen3_moe")
    expected = logits(model)
    put_all(model)
    assert torch.equal(logits(model), expected)  # the same operations in the same order
    monkeypatch.setattr(module, "_can_group", lambda *tensors: False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def put_all(model: nn.Module) -> None:
    """Let our forward compute every module of experts."""
    for name, layer in expert_layers(model).items():
        put_expert_layer(model, name, _Plain(layer))


class _Plain(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def parts(self) -> ExpertParts:
        return self.layer.parts()


# trap: A23
def assert_computes_what_the_family_does(family: str) -> None:
    model = mixture(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_bias"):
                weight.normal_(generator=torch.Generator().manual_seed(3))
    expected = logits(model)
    model.set_experts_implementation("eager")
    on_eager = logits(model)
    put_all(model)
    assert torch.equal(logits(model), expected)
    # Their own loop over experts adds in another order.
    torch.testing.assert_close(expected, on_eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", often(FAMILIES, "qwen3_moe", "gpt_oss"))
def test_every_family_computes_as_its_own(family: str) -> None:
    assert_computes_what_the_family_does(family)


@pytest.mark.parametrize("flag", ["has_bias", "has_gate"])
def test_a_flag_that_is_not_read_would_be_seen(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = module.experts_forward

    def forgetful(experts: nn.Module, *inputs: Tensor) -> Tensor:
        setattr(experts, "_apply_gate" if flag == "has_gate" else flag, halves if flag == "has_gate" else False)
        return theirs(experts, *inputs)

    monkeypatch.setattr(module, "experts_forward", forgetful)
    with pytest.raises(AssertionError):
        assert_computes_what_the_family_does("gpt_oss")


def halves(y_SO: Tensor) -> Tensor:
    """The gate of nearly all other families."""
    gate, up = y_SO.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def test_the_number_of_experts_a_token_goes_to_is_known() -> None:
    assert {family: experts_per_token(mixture(family).config) for family in ("qwen3_moe", "gpt_oss")} == {
        "qwen3_moe": 2,
        "gpt_oss": 2,
    }
    assert experts_per_token(mixture("hunyuan_v1_moe", moe_topk=[2, 3]).config) == 3


# trap: A24
def assert_packed_by_expert(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_base(model, QloraMethod(rank=4), device="cpu")
    layers = expert_layers(model)
    assert layers
    assert all(isinstance(layer, QuantizedExperts) for layer in layers.values())
    assert not any(weight.ndim == 3 for weight in model.parameters())
    unpacked: list[int] = []
    theirs = QuantizedExperts.matrix_OI
    monkeypatch.setattr(
        QuantizedExperts, "matrix_OI", lambda self, expert: unpacked.append(expert) or theirs(self, expert)
    )
    with torch.no_grad():
        model(IDS[:1, :1])  # one token, which goes to two of four experts
    assert len(unpacked) == 2 * len(layers)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_packed_experts_are_the_dense_ones_that_they_unpack_to(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(family)
    plain = logits(model)
    assert_packed_by_expert(model, monkeypatch)
    packed, names = logits(model), set(expert_layers(model))
    assert not torch.equal(packed, plain)
    unpack_base(model)
    assert names < {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(logits(model), packed, rtol=1e-4, atol=1e-5)
    assert loss(model).isfinite()


def test_experts_left_in_sixteen_bits_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.methods.qlora.expert_targets", lambda model: [])
    with pytest.raises(AssertionError):
        assert_packed_by_expert(mixture("qwen3_moe"), monkeypatch)


def test_unpacking_all_experts_at_once_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = lambda self: ExpertParts(self.weight.mT if self.is_transposed else self.weight)  # noqa: E731
    monkeypatch.setattr(QuantizedExperts, "parts", dense)
    with pytest.raises(AssertionError):
        assert_packed_by_expert(mixture("qwen3_moe"), monkeypatch)


def test_experts_of_an_odd_size_stay_and_are_said() -> None:
    model = mixture("qwen3_moe", hidden_size=60, moe_intermediate_size=20, head_dim=16)
    notes = quantize_base(model, QloraMethod(rank=4), device="cpu")
    assert "4 tensors of experts are not quantised: an expert's numbers are no multiple of 64" in notes
