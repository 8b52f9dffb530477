"""Losses of drawn answers against their formulas, and the divisor of a step against its own."""

import itertools
import math

import pytest
import torch

from tunesmith.planning.defaults import total_steps
from tunesmith.recipe.reinforcement import Reinforce
from tunesmith.recipe.schema import Train
from tunesmith.tasks.policy_losses import CLIPS, token_losses
from tunesmith.tasks.reinforce import advantages, divisor, epochs_of

ROWS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
"""Three answers, of 3, 2 and 4 tokens."""


def values(advantage, *, weight=1.0, drawn=None, old=None, reference=None) -> torch.Tensor:
    num = len(ROWS)
    nan = torch.full((num,), math.nan, dtype=torch.float64)
    columns = [torch.as_tensor(advantage, dtype=torch.float64).expand(num), torch.full((num,), weight).double()]
    columns += [nan if column is None else column for column in (drawn, old, reference)]
    return torch.stack(columns, dim=1)


def random_logps(seed: int) -> torch.Tensor:
    return -torch.rand(len(ROWS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(logp, table: torch.Tensor, options: Reinforce) -> torch.Tensor:
    """Token by token, in plain torch, as the papers write it."""
    advantage, _, drawn, old, reference = table.unbind(1)
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(ROWS.tolist()):
        ratio = torch.exp(logp[i] - old[i])
        low, high = CLIPS.get(options.loss, (0, 0))
        if options.loss == "cispo":
            loss = -min(ratio.item(), 5.0) * advantage[i] * logp[i]
        else:
            here = ratio
            if options.loss == "sequence":
                own = (row == ROWS).nonzero()[:, 0]
                here = torch.exp((logp[own] - old[own]).mean())
            loss = -torch.min(here * advantage[i], torch.clip(here, 1 - low, 1 + high) * advantage[i])
        if options.kl:
            u = reference[i] - logp[i]
            loss = loss + options.kl * ratio * (torch.exp(u) - u - 1)
        weight = 1.0 if options.correct is None else min(options.correct, (old[i] - drawn[i]).exp().item())
        total = total + weight * loss
    return total


@pytest.mark.parametrize("loss", ["clip", "cispo", "sequence"])
@pytest.mark.parametrize("kl", [0.0, 0.04])
@pytest.mark.parametrize("correct", [2.0, None])
def test_losses_and_gradients_are_those_of_the_formulas(loss, kl, correct):
    options = Reinforce(loss=loss, kl=kl, correct=correct)
    drawn, old, reference = (random_logps(seed) for seed in (1, 2, 3))
    advantage = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)[ROWS]
    found, expected = (random_logps(4).requires_grad_() for _ in range(2))
    table = values(advantage, drawn=drawn, old=old, reference=reference)
    ours = token_losses(found, table, ROWS, options)[0].sum()
    theirs = by_hand(expected, table, options)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    gradients = [torch.autograd.grad(total, leaf)[0] for total, leaf in ((ours, found), (theirs, expected))]
    assert torch.allclose(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", ["clip", "cispo"])
def test_answers_learnt_once_have_the_gradient_of_reinforce(loss):
    logp = random_logps(4).requires_grad_()
    table = values(torch.tensor([0.5, -1.0, 2.0])[ROWS], drawn=logp.detach())
    (gradient,) = torch.autograd.grad(token_losses(logp, table, ROWS, Reinforce(loss=loss))[0].sum(), logp)
    assert torch.allclose(gradient, -table[:, 0], atol=1e-12, rtol=0)


def test_gradient_of_the_divergence_is_the_divergences(monkeypatch):  # trap: G18
    """All answers of one token of five words: the expected gradient is that of KL(π ‖ π_ref)."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0, -1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.5, -0.3, 0.2, 0.1], dtype=torch.float64).log_softmax(-1)
    (exact,) = torch.autograd.grad((logits.softmax(-1) * (logits.log_softmax(-1) - reference)).sum(), logits)

    def expected(*, with_ratio: bool) -> torch.Tensor:
        total = torch.zeros(5, dtype=torch.float64)
        for word, chance in enumerate(logits.detach().softmax(-1)):
            logp = logits.log_softmax(-1)[word : word + 1]
            table = values(0.0)[:1].clone()
            table[:, 2], table[:, 4] = logp.detach(), reference[word]
            loss = token_losses(logp, table, torch.zeros(1, dtype=torch.int64), Reinforce(kl=1.0))[0].sum()
            if not with_ratio:
                u = reference[word] - logp[0]
                loss = u.exp() - u - 1
            total += chance * torch.autograd.grad(loss, logits, retain_graph=True)[0]
        return total

    assert torch.allclose(expected(with_ratio=True), exact, atol=1e-12, rtol=0)
    with pytest.raises(AssertionError):  # trap: G18 planted
        assert torch.allclose(expected(with_ratio=False), exact, atol=1e-3, rtol=0)


def test_divergence_is_of_each_token_whatever_the_loss():  # trap: G19
    drawn, old, reference = (random_logps(seed) for seed in (1, 2, 3))

    def gradient(options: Reinforce) -> torch.Tensor:
        logp = random_logps(4).requires_grad_()
        table = values(0.0, drawn=drawn, old=old, reference=reference)
        return torch.autograd.grad(token_losses(logp, table, ROWS, options)[0].sum(), logp)[0]

    assert torch.equal(gradient(Reinforce(kl=0.1)), gradient(Reinforce(kl=0.1, loss="sequence")))
    means = torch.stack([(random_logps(4) - old)[row == ROWS].mean() for row in range(3)]).exp()[ROWS]
    ratio = (random_logps(4) - old).exp()
    with pytest.raises(AssertionError):  # trap: G19 planted: the answer's ratio
        assert torch.allclose(gradient(Reinforce(kl=0.1)) * means / ratio, gradient(Reinforce(kl=0.1)))


def test_correction_is_of_each_token_and_bounded():  # trap: G20
    logp = torch.zeros(500, dtype=torch.float64)
    rows, table = torch.zeros(500, dtype=torch.int64), torch.zeros(500, 5, dtype=torch.float64)
    table[:, 0], table[:, 1], table[:, 2], table[:, 3] = 1.0, 1.0, -0.02, math.nan
    found = token_losses(logp, table, rows, Reinforce())[0]
    assert torch.allclose(found, torch.full_like(found, -math.exp(0.02)), atol=1e-12, rtol=0)
    with pytest.raises(AssertionError):  # trap: G20 planted: the weight of the whole answer
        assert float((logp - table[:, 2]).sum().exp()) < 1.03
    table[:, 2] = -5.0
    assert float(token_losses(logp, table, rows, Reinforce())[0][0]) == -2.0
    assert float(token_losses(logp, table, rows, Reinforce(correct=None))[0][0]) == -1.0


def test_divisors_are_of_all_answers_and_of_the_recipe():  # trap: G9, G12
    tokens = [3, 200, 1, 7]
    assert divisor(tokens, Reinforce()) == 211
    assert divisor(tokens, Reinforce(normalize="answers")) == 4
    assert divisor(tokens, Reinforce(normalize="constant", max_new_tokens=256)) == 4 * 256
    with pytest.raises(AssertionError):  # trap: G12 planted: the longest answer that is there
        assert len(tokens) * max(tokens) == divisor(tokens, Reinforce(normalize="constant", max_new_tokens=256))
    with pytest.raises(AssertionError):  # trap: G9 planted: without the answer that was cut
        assert sum(num for num in tokens if num != 200) == divisor(tokens, Reinforce())


GROUPS = [[1.0, 0.0, 0.5], [0.2, 0.2, 0.8, 0.4]]


def test_advantages_by_hand():
    assert advantages(GROUPS, Reinforce()) == [
        [0.5, -0.5, 0.0],
        pytest.approx([-0.2, -0.2, 0.4, 0.0]),
    ]
    left = advantages(GROUPS, Reinforce(baseline="leave_one_out"))
    assert left[0] == pytest.approx([1.0 - 0.25, 0.0 - 0.75, 0.5 - 0.5])
    scaled = advantages(GROUPS, Reinforce(scale="group"))
    assert scaled[0] == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001, 0.0])
    rewards = torch.tensor(list(itertools.chain(*GROUPS)), dtype=torch.float64)
    of_step = advantages(GROUPS, Reinforce(scale="step"))
    assert of_step[0][0] == pytest.approx(0.5 / (float(rewards.std()) + 1e-4))


@pytest.mark.parametrize("scale", ["none", "group", "step"])
def test_equal_rewards_are_worth_exactly_nothing(scale):  # trap: G14
    groups = [[0.1] * 8, [0.0, 1.0]]
    assert advantages(groups, Reinforce(scale=scale))[0] == [0.0] * 8
    rewards = next(row for num in range(3, 50) if (row := torch.full((num,), 0.1)).sum() / num != row[0])
    away = rewards - rewards.sum() / len(rewards)
    with pytest.raises(AssertionError):  # trap: G14 planted: rounding is taken for a spread
        assert bool((away / away.square().mean().sqrt() == 0).all())


def test_rewards_are_compared_once():  # trap: G15
    once = advantages([[3.0, 1.0]], Reinforce(baseline="leave_one_out"))
    assert once == [[2.0, -2.0]]
    with pytest.raises(AssertionError):  # trap: G15 planted
        assert advantages(once, Reinforce(baseline="leave_one_out")) == once


def test_a_group_that_lost_an_answer_leaves_others_as_they_are():  # trap: G10
    whole = advantages([[1.0, 0.0, 0.5, 0.2], [0.2, 0.8]], Reinforce())
    less = advantages([[1.0, 0.0, 0.5], [0.2, 0.8]], Reinforce())
    assert less[1] == whole[1]
    assert less[0] == [0.5, -0.5, 0.0]
    flat = [1.0, 0.0, 0.5, 0.2, 0.8]
    with pytest.raises(AssertionError):  # trap: G10 planted: groups cut from one row of rewards
        assert advantages([flat[:3], flat[2:]], Reinforce())[1] == whole[1]


def test_a_group_of_one_answer_teaches_nothing():
    assert advantages([[5.0], []], Reinforce(baseline="leave_one_out")) == [[0.0], []]


@pytest.mark.parametrize(
    ("per_step", "prompts", "steps"),
    [("auto", 9, 100), (64, 10, 100), ("auto", 150, 100), (8, 1_601, 201), ("auto", 100_000, 500), ("auto", 3, 100)],
)
def test_epochs_make_as_many_updates_as_are_said(per_step, prompts, steps):
    epochs, why = epochs_of(per_step, prompts)
    size = 8 if per_step == "auto" else per_step
    assert total_steps(Train(epochs=epochs), -(-prompts // size)) == steps
    assert why.startswith(f"{steps:,} updates of ")
