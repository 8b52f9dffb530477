"""Losses of preferences, from the log-probabilities of answers.

    s   log-probability of an answer's trained tokens, summed     n   their number
    r   s minus the reference's, the model of step 1              Δ   r of the chosen minus r of the rejected answer
    z₀  of kto: mean over the rows of a step of r of the answer of another row, whose prompt it does not answer; 0 or
        more, without gradient. It estimates how far the model has moved from its reference

A loss is the sum over the rows of a micro-batch, and the step divides it once by its rows. Sums over tokens are
float64: the log-probabilities of long answers are large, and their difference is small.
"""

# B rows, N targets, L lines; the last axis of [B, 2] holds chosen, rejected, or of kto the row's answer, its partner's

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.recipe.objectives import Prefer
from tunesmith.tasks.losses import token_measure
from tunesmith.tasks.task import Losses, Terms
from tunesmith.types import Batch, Measured, Record, required

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.models.fused_loss import OutputLayer
    from tunesmith.parallel.world import World

USUAL_PREFER = Prefer()


@dataclass(frozen=True, slots=True)
class Pairs:
    """Log-probabilities of answers, their numbers of tokens, and the reference's log-probabilities; float64."""

    s_B2: Tensor
    n_B2: Tensor
    reference_B2: Tensor
    margin_B: Tensor
    """The number that comes with each row: its margin, or of kto whether its answer is wanted."""

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


def _log_sigmoid(pairs: Pairs, logit_B: Tensor, options: Prefer) -> Tensor:
    """−log σ, smoothed as in Mitchell 2023, "A note on DPO with noisy preferences"; of `robust` as in Chowdhury
    et al. 2024, arXiv 2403.00409: unbiased where a share of the labels is flipped."""
    from torch.nn import functional as F

    e = options.label_smoothing
    right_B, wrong_B = -F.logsigmoid(logit_B), -F.logsigmoid(-logit_B)
    if options.loss == "robust":
        return ((1 - e) * right_B - e * wrong_B) / (1 - 2 * e)
    return (1 - e) * right_B + e * wrong_B


def _ipo(pairs: Pairs, logit_B: Tensor, options: Prefer) -> Tensor:
    beta = required(options.beta)
    return (logit_B / beta - 1 / (2 * beta)).square()


def _apo_zero(pairs: Pairs, logit_B: Tensor, options: Prefer) -> Tensor:
    return 1 - difference((required(options.beta) * pairs.r_B2).sigmoid())


def _orpo(pairs: Pairs, logit_B: Tensor, options: Prefer) -> Tensor:
    """The odds weigh β, the likelihood of the chosen answer `prefer.nll`."""
    beta = required(options.beta)
    return beta * _log_sigmoid(pairs, logit_B / beta, options)


OBJECTIVES: dict[str, tuple[Callable[[Pairs], Tensor], Callable[[Pairs, Tensor, Prefer], Tensor]]] = {
    "dpo": (lambda pairs: pairs.r_B2, _log_sigmoid),  # Rafailov et al. 2023, arXiv 2305.18290, eq. 7
    "robust": (lambda pairs: pairs.r_B2, _log_sigmoid),
    # Zhao et al. 2023, arXiv 2305.10425; Liu et al. 2023, arXiv 2309.06657
    "hinge": (lambda pairs: pairs.r_B2, lambda pairs, logit_B, options: (1 - logit_B).clamp(min=0)),
    "ipo": (lambda pairs: pairs.r_B2 / pairs.n_B2, _ipo),  # Azar et al. 2023, 2310.12036, eq. 17, by the token
    "dpo_norm": (lambda pairs: pairs.r_B2 / pairs.n_B2, _log_sigmoid),  # Lambert et al. 2024, 2411.15124
    "apo_zero": (lambda pairs: pairs.r_B2, _apo_zero),  # D'Oosterlinck et al. 2024, 2408.06266, eq. 7
    "simpo": (lambda pairs: pairs.s_B2 / pairs.n_B2, _log_sigmoid),  # Meng et al. 2024, 2405.14734, eq. 6
    "cpo": (lambda pairs: pairs.s_B2, _log_sigmoid),  # Xu et al. 2024, 2401.08417
    "orpo": (_log_odds, _orpo),  # Hong et al. 2024, 2403.07691, eq. 6 and 7
}
"""By the values of `prefer.loss`: [B, 2] what the loss compares, and the loss of each pair by β times the
difference of both minus the margin, of losses that have one. kto is none of pairs: see `kto_losses`."""


def pair_losses(pairs: Pairs, options: Prefer) -> tuple[Tensor, Tensor]:
    """[B] the loss of each pair, and [B] β times the difference that it compares."""
    options = options.filled()
    compared, objective = OBJECTIVES[options.loss]
    scaled_B = required(options.beta) * difference(compared(pairs))
    logit_B = scaled_B - options.length * difference(pairs.n_B2)
    # Of ipo, divided by β, it would be another target; TRL has none in any other loss either.
    if options.has_margin:
        logit_B = logit_B - required(options.margin) - pairs.margin_B
    losses_B = objective(pairs, logit_B, options)
    if options.nll:
        losses_B = losses_B - options.nll * pairs.s_B2[:, 0] / pairs.n_B2[:, 0]
    return losses_B, scaled_B


def kto_losses(r_B: Tensor, wanted_B: Tensor, z0: float, options: Prefer) -> Tensor:
    """[B], λ (1 − σ(±β (r − z₀))), plus where the answer is wanted: Ethayarajh et
    al. 2024, arXiv 2402.01306, eq. 7."""
    options = options.filled()
    gained_B = required(options.beta) * (r_B - z0)
    weights_B = wanted_B * required(options.desirable) + ~wanted_B * required(options.undesirable)
    return weights_B * (1 - (wanted_B * gained_B - ~wanted_B * gained_B).sigmoid())


def line_logps(model: nn.Module, batch: Batch, output: OutputLayer | None) -> tuple[Tensor, Tensor]:
    """[L] the log-probability of the trained tokens of each line, with gradient, and
    [L] their number; float64."""
    import torch

    from tunesmith.models.forward import hidden_at_targets, logits_at_targets
    from tunesmith.models.pooling import count_each
    from tunesmith.tasks.losses import target_losses

    if output is not None and output.belongs_to(model):
        logp_N = output.log_probs(hidden_at_targets(model, batch), batch.targets_N)
    else:
        logp_N = -target_losses(logits_at_targets(model, batch), batch.targets_N)
    assert batch.line_of_N is not None, "rows of preferences have branches"
    wide = values_of(batch).dtype
    s_L = torch.zeros(len(batch.lengths), dtype=wide, device=logp_N.device)
    s_L = s_L.index_add(0, batch.line_of_N, logp_N.to(wide))
    return s_L, count_each(batch.line_of_N, len(s_L)).to(wide)


def values_of(batch: Batch) -> Tensor:
    """[B, V], the numbers of each row."""
    assert batch.values_BV is not None, "its rows have branches"
    return batch.values_BV


def pairs_of(model: nn.Module, batch: Batch, output: OutputLayer | None) -> Pairs:
    """The log-probabilities of both answers of each row, with gradient."""
    s_L, n_L = line_logps(model, batch, output)
    return Pairs(s_L.view(-1, 2), n_L.view(-1, 2), values_of(batch)[:, 1:], values_of(batch)[:, 0])


def preference_loss_sum(
    model: nn.Module, batch: Batch, *, options: Prefer = USUAL_PREFER, output: OutputLayer | None = None
) -> Tensor:
    """Sum of the pairs' losses, float32."""
    return pair_losses(pairs_of(model, batch, output), options)[0].sum().float()


def kto_loss_sum(model: nn.Module, batch: Batch, *, options: Prefer, output: OutputLayer | None, z0: float) -> Tensor:
    """Sum of the losses of the rows' own answers, float32."""
    s_B, _ = line_logps(model, batch, output)
    values_BV = values_of(batch)
    return kto_losses(s_B - values_BV[:, 1], values_BV[:, 0] > 0, z0, options).sum().float()


def kto_prepass(
    model: nn.Module, batches: Iterable[Batch], world: World, *, options: Prefer, output: OutputLayer | None
) -> partial[Tensor]:
    """`kto_loss_sum` with z₀ of a step, whose lines hold the answers of partners."""
    moved = [line_logps(model, batch, output)[0] - values_of(batch)[:, 2] for batch in batches]
    import torch

    of_rank = [math.fsum(torch.cat(moved).tolist() if moved else ()), sum(map(len, moved))]  # read once
    total, num = (math.fsum(column) for column in zip(*world.gather_values(of_rank), strict=True))
    return partial(kto_loss_sum, options=options, output=output, z0=max(0.0, total / num))


def preference_measure(
    model: nn.Module, batch: Batch, *, options: Prefer = USUAL_PREFER, output: OutputLayer | None = None
) -> Measured:
    """The loss of each row and what was found of it, without gradient. Losses of kto
    follow from all rows: `settle`."""
    import torch

    with torch.no_grad():
        pairs = pairs_of(model, batch, output)
        columns = {"logps": pairs.s_B2, "reference": pairs.reference_B2, "lengths": pairs.n_B2.long()}
        if options.loss == "kto":
            losses_B, columns["wanted"] = torch.zeros_like(pairs.margin_B), pairs.margin_B > 0
            columns["margin"] = required(options.filled().beta) * pairs.r_B2[:, 0]
        else:
            losses_B, columns["margin"] = pair_losses(pairs, options)
    return measured(losses_B, {key: values.tolist() for key, values in columns.items()})


def settle(results: Sequence[Record], options: Prefer) -> list[float]:
    """The loss of kto of each row measured, with z₀ of all of them."""
    import torch

    columns = ([row[key] for row in results] for key in ("logps", "reference"))
    r_B2 = torch.sub(*(torch.tensor(column, dtype=torch.float64) for column in columns))
    wanted_B = torch.tensor([row["wanted"] for row in results])
    return list(map(float, kto_losses(r_B2[:, 0], wanted_B, max(0.0, float(r_B2[:, 1].mean())), options)))


def measured(losses_B: Tensor, columns: Mapping[str, Iterable[Any]]) -> Measured:
    """The losses of rows, and what was found of each by name."""
    results = tuple(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return Measured(losses_N=losses_B.float(), outputs_N=losses_B.new_empty(0), results=results)


def losses_of(terms: Terms) -> Losses:
    """Losses of compared answers, and of their tokens."""
    options, output = terms.recipe.prefer, terms.output
    return Losses(
        partial(preference_loss_sum, options=options, output=output),
        partial(preference_measure, options=options, output=output),
        partial(kto_prepass, options=options, output=output) if options.loss == "kto" else None,
        partial(token_measure, output=output),
    )
