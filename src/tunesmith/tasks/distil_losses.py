"""Losses by a teacher: at tokens of rows by its list of likely tokens, at drawn answers by all its logits."""

# N targets, B rows, V vocabulary, D hidden size of the teacher

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.errors import RunError
from tunesmith.recipe.distillation import Distil
from tunesmith.tasks.losses import target_losses, token_measure
from tunesmith.tasks.task import Losses, Terms
from tunesmith.types import Batch, Measured, required

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.models.fused_loss import OfPiece, OutputLayer


def listed_loss_sum(
    model: nn.Module, batch: Batch, *, options: Distil, vocabulary: int, output: OutputLayer | None = None
) -> Tensor:
    """Sum over the targets of the divergence from the teacher's list, a float32 scalar in nats."""
    from tunesmith.models.divergence import listed

    if batch.values_NC is None:
        raise RunError("task distil: no teacher has read these rows. Let tunesmith.train have them read.")
    of_piece = listed(batch.values_NC, vocabulary=vocabulary, temperature=options.temperature)
    return _summed(model, batch, of_piece, output, losses=batch.losses)


def reverse_loss_sum(
    model: nn.Module,
    batch: Batch,
    *,
    options: Distil,
    vocabulary: int,
    teacher: OutputLayer,
    output: OutputLayer | None = None,
) -> Tensor:
    """Sum over the targets of the reverse divergence from the teacher, whose hidden states [N, D] are in
    `values_NC`. The row of a loss is one of its step, so none is left in the batch."""
    from tunesmith.models.divergence import reverse

    hidden_ND = required(batch.values_NC).to(teacher.layer.weight)

    def teacher_of(here: slice) -> Tensor:
        return teacher.logits(hidden_ND[here])

    of_piece = reverse(teacher_of, vocabulary=vocabulary, temperature=options.temperature)
    return _summed(model, batch, of_piece, output, losses=None)


def _summed(
    model: nn.Module, batch: Batch, of_piece: OfPiece, output: OutputLayer | None, *, losses: list[Tensor] | None
) -> Tensor:
    from tunesmith.models.divergence import sum_of_logits
    from tunesmith.models.forward import hidden_at_targets, logits_at_targets

    if output is not None and output.belongs_to(model):
        return output.sum_of(hidden_at_targets(model, batch), of_piece, losses=losses).float()
    return sum_of_logits(logits_at_targets(model, batch), of_piece, losses).float()


def listed_measure(
    model: nn.Module, batch: Batch, *, options: Distil, vocabulary: int, output: OutputLayer | None = None
) -> Measured:
    """The divergence from the teacher's list, a row at a time, without gradient; what the row's
    tokens lose, and how many of the teacher's likeliest tokens are the model's. Of rows that no
    teacher has read the tokens are measured."""
    import torch

    from tunesmith.models.divergence import listed

    if batch.values_NC is None:
        return token_measure(model, batch, output)
    of_piece = listed(batch.values_NC, vocabulary=vocabulary, temperature=options.temperature)
    parts = []
    with torch.no_grad():
        for here, logits_NV in _pieces(model, batch, output):
            tokens_N = target_losses(logits_NV, batch.targets_N[here])
            agreed_N = logits_NV[:, :vocabulary].argmax(-1) == batch.values_NC[here, 0].long()
            losses_N, _ = of_piece(logits_NV.float(), here)  # which may write over the logits
            parts.append(torch.stack([losses_N, tokens_N.to(losses_N), agreed_N.to(losses_N)], 1))
        columns_N3 = torch.cat(parts)
        sums_B3 = columns_N3.new_zeros(len(batch.row_indices), 3).index_add(0, batch.row_of_N, columns_N3)
    results = tuple({"answers": lost, "agreed": round(agreed)} for _, lost, agreed in sums_B3.tolist())
    return Measured(sums_B3[:, 0], batch.targets_N[:0], results)


def _pieces(model: nn.Module, batch: Batch, output: OutputLayer | None) -> Iterator[tuple[slice, Tensor]]:
    """Logits of the targets, [N, V] a piece, and which these are."""
    from tunesmith.models.forward import hidden_at_targets, logits_at_targets

    if output is None or not output.belongs_to(model):
        yield slice(None), logits_at_targets(model, batch)
        return
    hidden_ND = hidden_at_targets(model, batch)
    for here in output.chunks(len(hidden_ND), trained=False):
        yield here, output.logits(hidden_ND[here])


def losses_of(terms: Terms) -> Losses:
    """Losses by a teacher; of a text its tokens are measured."""
    options, output = terms.recipe.distil, terms.output
    settings: dict[str, Any] = {"options": options, "vocabulary": terms.vocabulary, "output": output}
    return Losses(
        partial(listed_loss_sum, **settings),
        partial(listed_measure, **settings),
        text_measure=partial(token_measure, output=output),
    )
