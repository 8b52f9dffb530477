"""Losses of preferences: of each pair of answers, from the log-probabilities of both.

    s   log-probability of an answer's trained tokens, summed     n   their number
    r   s minus that of the reference, the model of step 1        Δ   r of the chosen minus r of the rejected answer

A loss is the sum over the pairs of a micro-batch, and the step divides it once by its pairs. Sums over tokens are
float64: the log-probabilities of long answers are large, and their difference is small.
"""

# B pairs, N targets, L lines; the last axis of [B, 2] holds chosen, rejected

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.recipe.objectives import Prefer
from tunesmith.types import Batch, Measured, required

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.models.fused_loss import OutputLayer


USUAL = Prefer()


@dataclass(frozen=True, slots=True)
class Pairs:
    """What a model and its reference find of some pairs, float64."""

    s_B2: Tensor
    n_B2: Tensor
    reference_B2: Tensor
    margin_B: Tensor
    """The margin that comes with each row."""

    @property
    def r_B2(self) -> Tensor:
        return self.s_B2 - self.reference_B2


def difference(values_B2: Tensor) -> Tensor:
    """[B], chosen minus rejected."""
    return values_B2[:, 0] - values_B2[:, 1]


def _log_odds(pairs: Pairs) -> Tensor:
    """[B, 2], log(p / (1 − p)) of p = exp(s / n), by the form that keeps digits on each side."""
    import torch

    mean_B2 = (pairs.s_B2 / pairs.n_B2).clamp(max=-1e-12)
    near_one = mean_B2 > -math.log(2)
    # Each branch sees only values that it is meant for, so that the gradient of the other is never infinite.
    close = torch.log(-torch.expm1(torch.where(near_one, mean_B2, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_one, -1.0, mean_B2)))
    return mean_B2 - torch.where(near_one, close, far)


def _dpo(pairs: Pairs, logit_B: Tensor, options: Prefer) -> Tensor:
    """Rafailov et al. 2023, arXiv 2305.18290, eq. 7; smoothed as in Mitchell 2023, "A note on DPO with noisy
    preferences"."""
    smoothing = options.label_smoothing
    return -(1 - smoothing) * _log_sigmoid(logit_B) - smoothing * _log_sigmoid(-logit_B)


def _robust(pairs: Pairs, logit_B: Tensor, options: Prefer) -> Tensor:
    """Chowdhury et al. 2024, arXiv 2403.00409: unbiased where a share of the labels is flipped."""
    e = options.label_smoothing
    return (-(1 - e) * _log_sigmoid(logit_B) + e * _log_sigmoid(-logit_B)) / (1 - 2 * e)


def _hinge(pairs: Pairs, logit_B: Tensor, options: Prefer) -> Tensor:
    """Zhao et al. 2023, arXiv 2305.10425; Liu et al. 2023, arXiv 2309.06657."""
    return (1 - logit_B).clamp(min=0)


def _ipo(pairs: Pairs, logit_B: Tensor, options: Prefer) -> Tensor:
    """Azar et al. 2023, arXiv 2310.12036, eq. 17, by the token. Its logit is β times the difference."""
    beta = required(options.beta)
    return (logit_B / beta - 1 / (2 * beta)).square()


def _apo_zero(pairs: Pairs, logit_B: Tensor, options: Prefer) -> Tensor:
    """D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7: the chosen answer up, the rejected one down, each alone."""
    sigmoids_B2 = (required(options.beta) * pairs.r_B2).sigmoid()
    return 1 - sigmoids_B2[:, 0] + sigmoids_B2[:, 1]


def _log_likelihood(pairs: Pairs, logit_B: Tensor, options: Prefer) -> Tensor:
    """−log σ: dpo_norm (Lambert et al. 2024, arXiv 2411.15124), SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6), CPO
    (Xu et al. 2024, arXiv 2401.08417)."""
    return -_log_sigmoid(logit_B)


def _orpo(pairs: Pairs, logit_B: Tensor, options: Prefer) -> Tensor:
    """Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7: the odds weigh β, the likelihood of the chosen answer
    `prefer.nll`."""
    return -required(options.beta) * _log_sigmoid(logit_B / required(options.beta))


def _log_sigmoid(logit_B: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.logsigmoid(logit_B)


OBJECTIVES: dict[str, tuple[Callable[[Pairs], Tensor], Callable[[Pairs, Tensor, Prefer], Tensor]]] = {
    "dpo": (lambda pairs: pairs.r_B2, _dpo),
    "robust": (lambda pairs: pairs.r_B2, _robust),
    "hinge": (lambda pairs: pairs.r_B2, _hinge),
    "ipo": (lambda pairs: pairs.r_B2 / pairs.n_B2, _ipo),
    "dpo_norm": (lambda pairs: pairs.r_B2 / pairs.n_B2, _log_likelihood),
    "apo_zero": (lambda pairs: pairs.r_B2, _apo_zero),
    "simpo": (lambda pairs: pairs.s_B2 / pairs.n_B2, _log_likelihood),
    "cpo": (lambda pairs: pairs.s_B2, _log_likelihood),
    "orpo": (_log_odds, _orpo),
}
"""By the values of `prefer.loss`: [B, 2] what the loss compares, and the loss of each pair by β times the difference of
both minus the margin."""


def pair_losses(pairs: Pairs, options: Prefer) -> tuple[Tensor, Tensor]:
    """[B] the loss of each pair, and [B] β times the difference that it compares."""
    options = options.filled()
    compared, objective = OBJECTIVES[options.loss]
    scaled_B = required(options.beta) * difference(compared(pairs))
    logit_B = scaled_B - required(options.margin) - pairs.margin_B - options.length * difference(pairs.n_B2)
    losses_B = objective(pairs, logit_B, options)
    if options.nll:
        losses_B = losses_B - options.nll * pairs.s_B2[:, 0] / pairs.n_B2[:, 0]
    return losses_B, scaled_B


def line_logps(model: nn.Module, batch: Batch, output: OutputLayer | None) -> tuple[Tensor, Tensor]:
    """[L] the log-probability of the trained tokens of each line, with gradient, and [L] their number; float64."""
    import torch

    from tunesmith.models.forward import hidden_states, logits_at_targets
    from tunesmith.tasks.losses import target_losses

    if output is not None and output.belongs_to(model):
        logp_N = output.log_probs(hidden_states(model, batch)[batch.predict_N], batch.targets_N)
    else:
        logp_N = -target_losses(logits_at_targets(model, batch), batch.targets_N)
    assert batch.line_of_N is not None, "rows of preferences have branches"
    wide = values_of(batch).dtype
    s_L = torch.zeros(len(batch.lengths), dtype=wide, device=logp_N.device)
    s_L = s_L.index_add(0, batch.line_of_N, logp_N.to(wide))
    return s_L, torch.bincount(batch.line_of_N, minlength=len(s_L)).to(wide)


def values_of(batch: Batch) -> Tensor:
    """[B, V], the numbers of each row."""
    assert batch.values_BV is not None, "rows of preferences have branches"
    return batch.values_BV


def pairs_of(model: nn.Module, batch: Batch, output: OutputLayer | None) -> Pairs:
    """The log-probabilities of both answers of each row, with gradient."""
    s_L, n_L = line_logps(model, batch, output)
    return Pairs(s_L.view(-1, 2), n_L.view(-1, 2), values_of(batch)[:, 1:], values_of(batch)[:, 0])


def preference_loss_sum(
    model: nn.Module, batch: Batch, *, options: Prefer = USUAL, output: OutputLayer | None = None
) -> Tensor:
    """Sum of the pairs' losses, float32."""
    return pair_losses(pairs_of(model, batch, output), options)[0].sum().float()


def preference_measure(
    model: nn.Module, batch: Batch, *, options: Prefer = USUAL, output: OutputLayer | None = None
) -> Measured:
    """The loss of each pair and what was found of it, without gradient."""
    import torch

    with torch.no_grad():
        pairs = pairs_of(model, batch, output)
        losses_B, scaled_B = pair_losses(pairs, options)
    columns = {"logps": pairs.s_B2, "reference": pairs.reference_B2, "lengths": pairs.n_B2.long(), "margin": scaled_B}
    return measured(losses_B, columns)


def measured(losses_B: Tensor, columns: Mapping[str, Tensor]) -> Measured:
    """The losses of rows, and what was found of each by name."""
    rows = zip(*(values_B.tolist() for values_B in columns.values()), strict=True)
    results: tuple[dict[str, Any], ...] = tuple(dict(zip(columns, row, strict=True)) for row in rows)
    return Measured(losses_N=losses_B.float(), outputs_N=losses_B.new_empty(0), results=results)
