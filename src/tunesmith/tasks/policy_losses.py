"""Losses of answers that the model drew itself, token by token.

    ρ   π / π_old, of the learner now and when the answers were drawn; 1 in the first step that learns from a draw
    w   min(C, π_old / μ), without gradient; μ is what drew the token: a correction of rounding (Yao et al. 2025)
    u   log π_ref − log π, π_ref the untouched model
    ℓ   of `clip` −min(ρA, clip(ρ) A): Shao et al. 2024, arXiv 2402.03300, eq. 3, with the bounds of Yu et al. 2025,
        arXiv 2503.14476, eq. 8; of `cispo` −sg(min(ρ, 5)) A log π: MiniMax 2025, arXiv
        2506.13585, eq. 4; of `sequence` as of clip with the geometric mean of an answer's ρ:
        Zheng et al. 2025, arXiv 2507.18071, eq. 5

    Σ c w (ℓ + β ρ (eᵘ − u − 1)),  c = 1, or 1 / n of an answer of n tokens

The step divides it once. With the factor ρ the last term has the gradient of the divergence, without it another
one's (DeepSeek-AI 2025, arXiv 2512.02556, section 3.1). It is of each token, in `sequence` too.
"""

# N targets, B rows, C columns

from __future__ import annotations

import math
from collections.abc import MutableMapping
from functools import partial
from typing import TYPE_CHECKING

from tunesmith.recipe.reinforcement import Reinforce
from tunesmith.tasks.losses import token_measure
from tunesmith.tasks.task import Losses, Terms
from tunesmith.types import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.models.fused_loss import OutputLayer

VALUE_COLUMNS = ("advantage", "weight", "drawn", "old", "reference")
"""Columns of `Batch.values_NC`: A, c, log μ, log π_old, log π_ref. NaN: π_old is the learner
itself, and there is no reference."""
CLIPS = {"clip": (0.2, 0.28), "sequence": (3e-4, 4e-4)}
MOST_RATIO = 5.0
STATS = ("tokens", "mismatch", "largest", "corrected", "clipped_low", "clipped_high", "kl")
"""Statistics of a row, in their order: sums over tokens, and the largest difference |log π_old − log μ|."""
Seen = MutableMapping[int, "Tensor"]
"""[STATS] by row: what the passes of a step found of it, where they are wanted."""


def log_probs(model: nn.Module, batch: Batch, temperature: float, output: OutputLayer | None) -> Tensor:
    """[N] float32, log π of each target, with gradient. As the sampler does, logits are divided by the
    temperature in float32, after the model has rounded them."""
    from tunesmith.models.forward import hidden_at_targets, logits_at_targets

    if output is not None and output.belongs_to(model):
        hidden_ND = hidden_at_targets(model, batch)
        return output.log_probs(hidden_ND, batch.targets_N, temperature=temperature)
    logits_NV = logits_at_targets(model, batch).float() / temperature
    return logits_NV.log_softmax(-1).gather(1, batch.targets_N[:, None])[:, 0]


def token_losses(logp_N: Tensor, values_NC: Tensor, row_of_N: Tensor, options: Reinforce) -> tuple[Tensor, Tensor]:
    """[N], c w (ℓ + β ρ (eᵘ − u − 1)), with gradient; and [N, STATS − 1] of each token, without."""
    import torch

    advantage_N, weight_N, drawn_N, old_N, reference_N = values_NC.unbind(1)
    now_N = logp_N.detach()
    old_N = torch.where(old_N.isnan(), now_N, old_N)
    log_ratio_N = logp_N - old_N
    ratio_N = log_ratio_N.exp()
    compared_N = ratio_N
    if options.loss == "sequence":
        num = int(row_of_N.max()) + 1
        sums_B, counts_B = (
            torch.zeros(num, dtype=logp_N.dtype, device=logp_N.device).index_add(0, row_of_N, values_N)
            for values_N in (log_ratio_N, torch.ones_like(now_N))
        )
        compared_N = (sums_B / counts_B.clamp(min=1)).exp()[row_of_N]
    if options.loss == "cispo":
        losses_N = -ratio_N.detach().clamp(max=MOST_RATIO) * advantage_N * logp_N
        low_N, high_N = torch.zeros_like(now_N), (ratio_N > MOST_RATIO).float()
    else:
        low, high = CLIPS[options.loss]
        clipped_N = compared_N.clamp(1 - low, 1 + high)
        losses_N = -torch.minimum(compared_N * advantage_N, clipped_N * advantage_N)
        low_N = ((compared_N < 1 - low) & (advantage_N < 0)).float()
        high_N = ((compared_N > 1 + high) & (advantage_N > 0)).float()
    divergence_N = torch.zeros_like(now_N)
    if options.kl:
        u_N = reference_N - logp_N
        divergence_N = ratio_N * (u_N.exp() - u_N - 1)
        losses_N = losses_N + options.kl * divergence_N
    most = math.inf if options.correct is None else options.correct
    off_N = old_N - drawn_N
    factor_N = torch.ones_like(now_N) if options.correct is None else off_N.exp().clamp(max=most)
    away_N = off_N.abs()
    stats = [torch.ones_like(now_N), away_N, away_N, (off_N > math.log(most)).float(), low_N, high_N]
    return weight_N * factor_N * losses_N, torch.stack([*stats, divergence_N.detach()], dim=1)


def policy_loss_sum(
    model: nn.Module,
    batch: Batch,
    *,
    options: Reinforce,
    output: OutputLayer | None = None,
    seen: Seen | None = None,
) -> Tensor:
    """Sum of the tokens' losses of drawn answers, float32. `seen`: gets what was found of each row."""
    import torch

    assert batch.values_NC is not None, "its rows are drawn answers"
    logp_N = log_probs(model, batch, options.temperature, output)
    losses_N, stats_NS = token_losses(logp_N, batch.values_NC, batch.row_of_N, options)
    if seen is not None:
        num, largest = len(batch.row_indices), STATS.index("largest")
        sums_BS = stats_NS.new_zeros(num, len(STATS)).index_add(0, batch.row_of_N, stats_NS)
        highest_B = stats_NS.new_zeros(num).scatter_reduce(0, batch.row_of_N, stats_NS[:, largest], "amax")
        sums_BS[:, largest] = highest_B
        seen.update(zip(batch.row_indices, torch.unbind(sums_BS), strict=True))
    return losses_N.sum()


def losses_of(terms: Terms) -> Losses:
    """Losses of drawn answers; of a text its tokens are measured."""
    return Losses(
        partial(policy_loss_sum, options=terms.recipe.reinforce, output=terms.output),
        partial(token_measure, output=terms.output),
    )
