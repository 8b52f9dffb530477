"""Dropout by draws that four elements share: the right share is dropped, and what is left is torch's own dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunesmith.models import dropping
from tunesmith.models.dropping import kept, use_fast_dropout

NUM = 400_000


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_that_was_asked_for_is_dropped(p: float, dtype: torch.dtype) -> None:
    """Within five deviations of the count of 400,000 draws; the share that it tells is exact to 2^-17."""
    mask, share = kept(torch.empty(NUM, dtype=dtype), p)
    assert mask.dtype == dtype
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(share - (1 - p)) <= 2**-17
    assert abs(float(mask.double().mean()) - share) <= 5 * (p * (1 - p) / NUM) ** 0.5


def test_neighbours_are_dropped_independently() -> None:
    """Each of the four that share a draw, all of its 64 bits used: no correlation beyond five deviations, 1 / √n."""
    mask, _ = kept(torch.empty(NUM), 0.5)
    four = mask.view(-1, 4)
    assert (four.mean(0) - 0.5).abs().max() <= 5 * 0.5 / len(four) ** 0.5
    related = torch.corrcoef(four.t()) - torch.eye(4)
    assert related.abs().max() <= 5 / len(four) ** 0.5
    assert (torch.corrcoef(torch.stack([mask[:-4], mask[4:]]))[0, 1]).abs() <= 5 / NUM**0.5


def test_the_planted_bug_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """63 of the 64 bits drawn, as torch does without being told otherwise: one in four is hardly ever dropped."""
    own = torch.Tensor.random_
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, *args, **kwargs: own(self))
    with pytest.raises(AssertionError):
        test_neighbours_are_dropped_independently()


def test_it_is_dropout_with_its_own_mask() -> None:
    """float64; result and gradient."""
    layers = nn.Sequential(nn.Dropout(0.3))
    assert use_fast_dropout(layers) == 1
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = layers(x)
    out.backward(g := torch.randn_like(x))
    torch.manual_seed(3)
    mask, share = kept(x, 0.3)
    torch.testing.assert_close(out, x * mask / share, rtol=0, atol=1e-14)
    torch.testing.assert_close(x.grad, g * mask / share, rtol=0, atol=1e-14)
    torch.manual_seed(3)
    assert torch.equal(layers(x), out)


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    layer = nn.Dropout(0.3)
    use_fast_dropout(layer)
    x, before = torch.randn(5), torch.get_rng_state()
    assert torch.equal(layer.eval()(x), x)
    layer.train().p = 0.0
    assert torch.equal(layer(x), x)
    assert torch.equal(torch.get_rng_state(), before)
    layer.p = 1.0
    assert not layer(x).any()


def test_other_kinds_of_dropout_are_left_alone() -> None:
    layers = nn.Sequential(nn.Dropout(0.1, inplace=True), nn.AlphaDropout(0.1), nn.Dropout1d(0.1))
    assert use_fast_dropout(layers) == 0


def test_rare_drops_are_drops() -> None:
    _, share = kept(torch.empty(8), 1e-9)
    assert share == 1 - 1 / dropping.LEVELS
