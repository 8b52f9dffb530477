"""Losses of pairs: by formulas in float64, by TRL's own numbers, digits at the ends of their range, and gradients."""

import json
import math
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from shape.tree import ROOT
from tiny_model import tiny_model
from tunesmith.data.branches import line_tokens, lines_of
from tunesmith.data.drafts import Draft, join
from tunesmith.models.fused_loss import find_output_layer
from tunesmith.recipe.objectives import Prefer
from tunesmith.tasks.preference_losses import OBJECTIVES, Pairs, line_logps, pair_losses
from tunesmith.types import Row, Source

PEER = json.loads((Path(__file__).parent / "trl_losses.json").read_text("utf-8"))
"""Made by trl_losses.py where TRL is installed."""


def pairs_of(s: Any, n: Any, reference: Any, margin: Any = 0.0) -> Pairs:
    s_B2, n_B2, reference_B2 = (
        torch.as_tensor(value, dtype=torch.float64).reshape(-1, 2) for value in (s, n, reference)
    )
    return Pairs(s_B2, n_B2, reference_B2, torch.as_tensor(margin, dtype=torch.float64).expand(len(s_B2)))


SOME = pairs_of(
    [[-3.0, -7.5], [-20.0, -11.0], [-0.4, -0.3]],
    [[3, 9], [14, 5], [1, 2]],
    [[-4.0, -6.0], [-19.0, -13.0], [-0.5, -0.2]],
)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(loss: str, s: Any, n: Any, ref: Any, o: Prefer) -> float:
    """The formulas of docs/guide/preferences.md, written out."""
    (sc, sj), (nc, nj), (pc, pj) = s, n, ref
    b, e, m, a = o.beta, o.label_smoothing, o.margin, o.length * (nc - nj)
    x = b * ((sc - pc) - (sj - pj)) - m - a
    odds = [math.exp(one / num) / (1 - math.exp(one / num)) for one, num in ((sc, nc), (sj, nj))]
    found = {
        "dpo": -(1 - e) * math.log(sigma(x)) - e * math.log(sigma(-x)),
        "robust": (-(1 - e) * math.log(sigma(x)) + e * math.log(sigma(-x))) / (1 - 2 * e),
        "hinge": max(0.0, 1 - x),
        "ipo": ((sc - pc) / nc - (sj - pj) / nj - 1 / (2 * b)) ** 2,
        "dpo_norm": -math.log(sigma(b * ((sc - pc) / nc - (sj - pj) / nj) - m - a)),
        "apo_zero": 1 - sigma(b * (sc - pc)) + sigma(b * (sj - pj)),
        "simpo": -math.log(sigma(b * (sc / nc - sj / nj) - m - a)),
        "cpo": -math.log(sigma(b * (sc - sj) - m - a)),
        "orpo": -b * math.log(sigma(math.log(odds[0]) - math.log(odds[1]))),
    }[loss]
    return found + o.nll * -sc / nc


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize(
    "more", [{}, {"nll": 0.7, "beta": 0.4}, {"label_smoothing": 0.2}, {"length": 0.05, "margin": 0.3}]
)
def test_every_loss_is_its_formula(loss, more):
    try:
        options = Prefer(loss=loss, **more).filled()
    except ValidationError:
        assert set(more) & {"label_smoothing", "length", "margin"}
        return
    found, _ = pair_losses(SOME, options)
    expected = [
        by_hand(loss, *row, options)
        for row in zip(*(of.tolist() for of in (SOME.s_B2, SOME.n_B2, SOME.reference_B2)), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


# trap: P9
@pytest.mark.parametrize("loss", PEER["losses"])
def test_every_loss_is_that_of_trl(loss):
    s = [[sum(side) for side in pair["logps"]] for pair in PEER["pairs"]]
    n = [[len(side) for side in pair["logps"]] for pair in PEER["pairs"]]
    pairs = pairs_of(s, n, [pair["reference"] for pair in PEER["pairs"]])
    options = Prefer(loss=loss, label_smoothing=0.2 if loss == "robust" else 0.0)
    found, _ = pair_losses(pairs, options)
    assert found.tolist() == pytest.approx(PEER["losses"][loss], rel=1e-6)
    # Sums where means are meant, or the reverse, or a reference that moved would be seen.
    other = pairs_of(s, [[size + 1 for size in pair] for pair in n], pairs.reference_B2 + torch.tensor([0.1, 0]))
    broken, _ = pair_losses(other, options)
    with pytest.raises(AssertionError):
        assert broken.tolist() == pytest.approx(PEER["losses"][loss], rel=1e-6)


@pytest.mark.slow
def test_the_numbers_of_trl_are_made_anew(tmp_path):
    python = ROOT / ".peers" / "trl" / "bin" / "python"
    if not python.exists():
        pytest.skip("TRL is not installed: make peers")
    made = subprocess.run([python, Path(__file__).parent / "trl_losses.py"], check=True, capture_output=True, text=True)
    found = json.loads(made.stdout)
    assert found["losses"].keys() == PEER["losses"].keys()
    for loss, values in found["losses"].items():
        assert values == pytest.approx(PEER["losses"][loss], rel=1e-9), loss
    for task in ("kto", "reward"):
        values, kept = ([case["loss"] for case in of[task]] for of in (found, PEER))
        assert values == pytest.approx(kept, rel=1e-9), task


def test_the_margin_of_a_row_adds_to_that_of_the_recipe():
    some = pairs_of(SOME.s_B2, SOME.n_B2, SOME.reference_B2, [0.5, 0.0, 0.0])
    both, _ = pair_losses(some, Prefer(margin=0.2))
    first, _ = pair_losses(SOME, Prefer(margin=0.7))
    rest, _ = pair_losses(SOME, Prefer(margin=0.2))
    assert both.tolist() == pytest.approx([first[0].item(), *rest[1:].tolist()])


@pytest.mark.parametrize("loss", ["robust", "ipo", "apo_zero", "orpo"])
def test_a_margin_of_a_row_does_not_reach_losses_that_have_none(loss):  # trap: P29
    assert_a_margin_is_not_used(loss)


def assert_a_margin_is_not_used(loss: str) -> None:
    rows = pairs_of(SOME.s_B2, SOME.n_B2, SOME.reference_B2, [0.0, 1.0, 3.0])
    options = Prefer(loss=loss, label_smoothing=0.1 if loss == "robust" else 0)
    for ours, theirs in zip(pair_losses(rows, options), pair_losses(SOME, options), strict=True):
        assert ours.tolist() == theirs.tolist()


def test_a_margin_in_every_loss_would_be_seen(monkeypatch):
    monkeypatch.setattr(Prefer, "has_margin", True)
    for loss in ("robust", "ipo", "orpo"):
        with pytest.raises(AssertionError):
            assert_a_margin_is_not_used(loss)


@pytest.mark.parametrize("loss", [loss for loss in OBJECTIVES if Prefer(loss=loss).has_margin])
def test_a_margin_that_a_recipe_may_name_is_one_that_a_row_may_have(loss):
    rows = pairs_of(SOME.s_B2, SOME.n_B2, SOME.reference_B2, [0.3, 0.3, 0.3])
    start = Prefer(loss=loss).filled().margin or 0.0
    expected = pair_losses(SOME, Prefer(loss=loss, margin=start + 0.3))[0].tolist()
    assert pair_losses(rows, Prefer(loss=loss, margin=start))[0].tolist() == pytest.approx(expected)


# trap: P19
@pytest.mark.parametrize("mean", [-1e-8, -1e-3, -0.6931, -50.0])
def test_odds_keep_their_digits(mean):
    assert_odds_keep_their_digits(mean)


def test_odds_in_one_form_would_be_seen(monkeypatch):
    def plain(pairs: Pairs) -> torch.Tensor:
        mean_B2 = pairs.s_B2 / pairs.n_B2
        return mean_B2 - torch.log(1 - mean_B2.exp())

    monkeypatch.setitem(OBJECTIVES, "orpo", (plain, OBJECTIVES["orpo"][1]))
    with pytest.raises(AssertionError):
        assert_odds_keep_their_digits(-1e-8)


def assert_odds_keep_their_digits(mean: float) -> None:
    """log(1 − p): near p = 1 by log(−expm1), far from it by log1p(−exp)."""
    pairs = pairs_of([[mean, -1.0]], [[1, 1]], [[0, 0]])
    pairs.s_B2.requires_grad_()
    loss, scaled = pair_losses(pairs, Prefer(loss="orpo", nll=0, beta=1))
    exact = mean - (math.log(-math.expm1(mean)) if mean > -0.5 else math.log1p(-math.exp(mean)))
    other = -1.0 - math.log1p(-math.exp(-1.0))
    assert scaled.item() == pytest.approx(exact - other, rel=1e-12)
    loss.sum().backward()
    assert torch.isfinite(pairs.s_B2.grad).all()


# trap: P20
def test_sums_of_long_answers_keep_their_digits(monkeypatch):
    """Float32 sums of 4,096 tokens would lose the difference of two answers that differ in the last one."""
    values = np.random.default_rng(0).uniform(-3, 0, 4096).astype(np.float32)
    monkeypatch.setattr("tunesmith.models.forward.hidden_at_targets", lambda model, batch: torch.zeros(4096, 1))
    output: Any = SimpleNamespace(belongs_to=lambda model: True, log_probs=lambda *_: torch.tensor(values))

    def assert_exact(dtype: torch.dtype) -> None:
        whole = torch.arange(4096)
        batch: Any = SimpleNamespace(predict_N=whole, targets_N=whole, line_of_N=whole * 0, lengths=(4097,),
                                     values_BV=torch.zeros(1, 3, dtype=dtype))  # fmt: skip
        s_L, n_L = line_logps(torch.nn.Identity(), batch, output)
        assert abs(Fraction(s_L.item()) - sum(map(Fraction, values.tolist()))) < Fraction(1, 10**9)
        assert n_L.tolist() == [4096]

    assert_exact(torch.float64)
    with pytest.raises(AssertionError):
        assert_exact(torch.float32)


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(loss):
    start = SOME.s_B2.clone().requires_grad_()

    def total(s_B2: torch.Tensor) -> torch.Tensor:
        return pair_losses(Pairs(s_B2, SOME.n_B2, SOME.reference_B2, SOME.margin_B), Prefer(loss=loss, nll=0.3))[
            0
        ].sum()

    assert torch.autograd.gradcheck(total, start, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("trained", [False, True])
def test_log_probabilities_in_pieces_are_those_of_the_logits(trained, cap, monkeypatch):
    """Also where each target weighs otherwise; of a frozen layer the gradient is made in the forward pass."""
    model = tiny_model("llama", vocab_size=97)
    output = find_output_layer(model)
    assert output is not None
    output = replace(output, cap=cap)
    monkeypatch.setattr(type(output), "chunk_size", lambda self, trained: 5)
    weight = output.layer.weight.requires_grad_(trained)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, weight.shape[1], generator=draw, requires_grad=True)
    targets = torch.randint(0, 97, (17,), generator=draw)
    factors = torch.randn(17, generator=draw)
    wanted = [hidden, weight] if trained else [hidden]
    ours = output.log_probs(hidden, targets)
    grads = torch.autograd.grad((ours * factors).sum(), wanted)
    theirs = F.log_softmax(output.logits(hidden), -1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((theirs * factors).sum(), wanted)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def draft(ids: list[int], first: int) -> Draft:
    return Draft(np.array(ids, np.int32), np.arange(len(ids)) >= first)


@pytest.mark.parametrize(
    ("chosen", "rejected", "stem"),
    [
        (([*range(10), 50, 51], 10), ([*range(10), 60], 10), 10),
        (([*range(10), 50, 51], 10), ([*range(10), 50, 61], 10), 10),  # answers that begin alike
        ((list(range(12)), 10), ([*range(9), 99, 98], 9), 9),  # the shorter prompt ends the stem
        (([1, 2, 50], 2), ([1, 2, 60], 2), 0),  # too short to be computed apart
    ],
)
def test_lines_of_a_row_are_the_drafts_it_was_made_of(chosen, rejected, stem):
    made = join([draft(*chosen), draft(*rejected)], (0.0,))
    row = Row(made.ids_T, made.trained_T, Source("a", 1), branches=made.branches, values=made.values)
    assert len(row.ids) == len(chosen[0]) + len(rejected[0]) - stem
    assert line_tokens(row) == len(chosen[0]) + len(rejected[0])
    for line, (ids, first) in zip(lines_of(row), (chosen, rejected), strict=True):
        assert line.ids.tolist() == ids
        assert line.trained.tolist() == [i >= first for i in range(len(ids))]


def test_another_loss_brings_its_own_defaults_wherever_it_is_named():
    """A recipe that is written out and changed keeps null, which means another number for another loss."""
    again = Prefer(**{**Prefer().model_dump(), "loss": "simpo"}).filled()
    assert (again.beta, again.margin, again.nll) == (2.0, 1.0, 0.0)
    kept = Prefer(loss="simpo", beta=4, margin=0.5).filled()
    assert (kept.beta, kept.margin) == (4.0, 0.5)
    assert Prefer(loss="orpo").filled().nll == 1.0
