"""Divergences from a teacher and their gradients, against torch in float64 over the whole vocabulary."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tunesmith.models import divergence
from tunesmith.models.divergence import listed, reverse, sum_of_logits
from tunesmith.models.fused_loss import OutputLayer

N, V, D, K = 37, 50, 8, 6
"""Targets, vocabulary, hidden size, listed tokens."""
PADDED = V + 14
"""Outputs of a model, the last of which are no tokens."""


def list_of(logits_NV: Tensor, top: int, temperature: float) -> Tensor:
    """As a teacher's is kept."""
    logp_NV = (logits_NV.double() / temperature).log_softmax(-1)
    best = logp_NV.topk(top)
    rest_N1 = logp_NV.scatter(1, best.indices, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([best.indices.double(), best.values, rest_N1], 1).float()


def grouped(logits_NV: Tensor, teacher_NV: Tensor, top: int, temperature: float) -> Tensor:
    """Σ p log(p / q) over the events: each of the teacher's likeliest tokens, and all others."""
    q_NV, p_NV = ((values_NV / temperature).softmax(-1) for values_NV in (logits_NV, teacher_NV))
    ids_NK = p_NV.topk(top).indices
    events = []
    for of_NV in (p_NV, q_NV):
        listed_NK = of_NV.gather(1, ids_NK)
        events.append(torch.cat([listed_NK, 1 - listed_NK.sum(1, keepdim=True)], 1))
    return (events[0] * (events[0] / events[1]).log()).sum()


def reversed_whole(logits_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    q_NV, p_NV = ((values_NV / temperature).softmax(-1) for values_NV in (logits_NV, teacher_NV))
    return (q_NV * (q_NV / p_NV).log()).sum()


@pytest.fixture
def given() -> tuple[OutputLayer, Tensor, Tensor]:
    """An output layer, what it reads, and a teacher's logits: both models have outputs that are no tokens."""
    torch.manual_seed(3)
    layer = nn.Linear(D, PADDED)
    return OutputLayer(layer, 1.0, False, None), torch.randn(N, D), 2 * torch.randn(N, PADDED)


def agrees(
    given: tuple[OutputLayer, Tensor, Tensor],
    of_piece: divergence.OfPiece,
    oracle: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Loss and gradients, piece by piece and of whole logits, equal an oracle's in float64 to 1e-6."""
    output, hidden_ND, teacher_NV = given
    wide = nn.Linear(D, PADDED, dtype=torch.float64)
    wide.load_state_dict(output.layer.state_dict())
    exact_ND = hidden_ND.double().requires_grad_()
    expected = oracle(wide(exact_ND)[:, :V], teacher_NV.double()[:, :V])
    expected.backward()
    for whole in (False, True):
        output.layer.zero_grad()
        input_ND = hidden_ND.clone().requires_grad_()
        seen: list[Tensor] = []
        loss = sum_of_logits(output.layer(input_ND), of_piece, seen) if whole else None
        loss = output.sum_of(input_ND, of_piece, losses=seen) if loss is None else loss
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6 * N)
        assert seen[0].sum().item() == pytest.approx(loss.item(), rel=1e-5)
        for found, exact in ((input_ND.grad, exact_ND.grad), (output.layer.weight.grad, wide.weight.grad)):
            assert found is not None
            assert exact is not None
            torch.testing.assert_close(found.double(), exact, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top", [1, K, V - 1])
def test_a_list_and_the_rest_as_one_event(given, top, temperature):  # trap: G32
    values_NC = list_of(given[2][:, :V], top, temperature)
    of_piece = listed(values_NC, vocabulary=V, temperature=temperature)
    agrees(given, of_piece, partial(grouped, top=top, temperature=temperature))


def test_parts_of_a_piece_are_the_piece(given, monkeypatch):
    monkeypatch.setattr(divergence, "LOGITS_BYTES", 4 * PADDED * 5)
    test_a_list_and_the_rest_as_one_event(given, K, 2.5)
    test_the_reverse_of_the_whole_vocabulary(given, 0.5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_reverse_of_the_whole_vocabulary(given, temperature):
    of_piece = reverse(lambda here: given[2][here], vocabulary=V, temperature=temperature)
    agrees(given, of_piece, partial(reversed_whole, temperature=temperature))


def test_a_list_that_is_normalised_again_is_found(given, monkeypatch):  # trap: G32 planted
    list_of_whole = list_of

    def normalised(logits_NV, top, temperature):
        values_NC = list_of_whole(logits_NV, top, temperature)
        values_NC[:, top:-1] = values_NC[:, top:-1].log_softmax(-1)
        values_NC[:, -1] = float("-inf")
        return values_NC

    monkeypatch.setitem(globals(), "list_of", normalised)
    with pytest.raises(AssertionError):
        test_a_list_and_the_rest_as_one_event(given, K, 1.0)


def test_outputs_that_are_no_tokens_are_found_where_they_count(given):  # trap: G31 planted
    of_piece = reverse(lambda here: given[2][here], vocabulary=PADDED, temperature=1.0)
    with pytest.raises(AssertionError):
        agrees(given, of_piece, partial(reversed_whole, temperature=1.0))


def test_an_equal_model_has_none(given):
    output, hidden_ND, _ = given
    logits_NV = output.layer(hidden_ND).detach()
    values_NC = list_of(logits_NV[:, :V], K, 1.0)
    pieces = [
        listed(values_NC, vocabulary=V, temperature=1.0),
        reverse(lambda here: logits_NV[here], vocabulary=V, temperature=1.0),
    ]
    for of_piece in pieces:
        losses_N, gradient_NV = of_piece(logits_NV.clone(), slice(None))
        assert losses_N.abs().max() < 1e-6
        assert gradient_NV.abs().max() < 1e-6


def test_chances_of_zero_are_no_numbers_that_are_none():
    """A teacher that is sure: all others have no chance at all."""
    logits_NV = torch.randn(1, V)
    values_NC = torch.tensor([[4.0, 0.0, float("-inf")]])
    losses_N, gradient_NV = listed(values_NC, vocabulary=V, temperature=1.0)(logits_NV.clone(), slice(None))
    assert losses_N.item() == pytest.approx(-logits_NV.log_softmax(-1)[0, 4].item(), abs=1e-5)
    assert gradient_NV.isfinite().all()
