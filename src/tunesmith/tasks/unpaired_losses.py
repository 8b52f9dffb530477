"""KTO: the loss of answers that are wanted or not, each by itself (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7, 8).

r    log-probability of an answer's trained tokens minus that of the reference
z₀   mean over the rows of a step of the same for the answer of another row, whose prompt it does not answer; 0 or
     more, without gradient. It estimates how far the model has moved from its reference.
"""

# B rows, L lines; the last axis of [B, 2] holds the row's own answer, that of its partner

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.recipe.objectives import Prefer
from tunesmith.tasks.preference_losses import line_logps, measured, values_of
from tunesmith.types import Batch, Measured, required

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.models.fused_loss import OutputLayer
    from tunesmith.parallel.world import World


def kto_losses(r_B: Tensor, wanted_B: Tensor, z0: float, options: Prefer) -> Tensor:
    """[B], λ (1 − σ(±β (r − z₀))), plus where the answer is wanted."""
    options = options.filled()
    gained_B = required(options.beta) * (r_B - z0)
    weights_B = wanted_B * required(options.desirable) + ~wanted_B * required(options.undesirable)
    return weights_B * (1 - (wanted_B * gained_B - ~wanted_B * gained_B).sigmoid())


def kto_loss_sum(
    model: nn.Module, batch: Batch, *, options: Prefer, output: OutputLayer | None = None, z0: float = 0.0
) -> Tensor:
    """Sum of the losses of the rows' own answers, float32."""
    s_B, _ = line_logps(model, batch, output)
    values_BV = values_of(batch)
    return kto_losses(s_B - values_BV[:, 1], values_BV[:, 0] > 0, z0, options).sum().float()


def look(model: nn.Module, batches: Iterable[Batch], world: World, **how: Any) -> Callable[..., Tensor]:
    """`kto_loss_sum` with z₀ of a step, whose lines hold the answers of partners."""
    moved = [line_logps(model, batch, how["output"])[0] - values_of(batch)[:, 2] for batch in batches]
    own = [math.fsum(value for one in moved for value in one.tolist()), sum(map(len, moved))]
    total, num = (math.fsum(column) for column in zip(*world.gather_values(own), strict=True))
    return partial(kto_loss_sum, **how, z0=max(0.0, total / num))


def kto_measure(model: nn.Module, batch: Batch, *, options: Prefer, output: OutputLayer | None = None) -> Measured:
    """Findings about each row's answer and its partner's, without gradient. Losses follow from all rows."""
    import torch

    with torch.no_grad():
        s_B2, n_B2 = (values_L.view(-1, 2) for values_L in line_logps(model, batch, output))
    values_BV = values_of(batch)
    columns = {"logps": s_B2, "reference": values_BV[:, 1:], "lengths": n_B2.long(), "wanted": values_BV[:, 0] > 0}
    moved_B = (s_B2 - values_BV[:, 1:])[:, 0]
    return measured(torch.zeros_like(moved_B), {**columns, "margin": required(options.filled().beta) * moved_B})


def settle(results: Sequence[Mapping[str, Any]], *, options: Prefer) -> list[float]:
    """The loss of each row measured, with z₀ of all of them."""
    import torch

    columns = ([row[key] for row in results] for key in ("logps", "reference"))
    r_B2 = torch.sub(*(torch.tensor(column, dtype=torch.float64) for column in columns))
    wanted_B = torch.tensor([row["wanted"] for row in results])
    return list(map(float, kto_losses(r_B2[:, 0], wanted_B, max(0.0, float(r_B2[:, 1].mean())), options)))
