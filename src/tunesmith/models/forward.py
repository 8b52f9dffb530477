"""Logits where something is predicted, whichever way the rows of a batch are laid out."""

# B rows, T tokens, N targets, U columns that hold a target, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.models.attention import Segments, ragged_pass
from tunesmith.types import Batch


def logits_at_targets(model: nn.Module, batch: Batch) -> Tensor:
    """[N, V] in the model's dtype: row n predicts batch.targets_N[n]. No other position meets the output layer.

    A ragged batch needs a model that was given to `attention.use_ragged`.
    """
    return _ragged(model, batch) if batch.layout == "ragged" else _padded(model, batch)


def _ragged(model: nn.Module, batch: Batch) -> Tensor:
    segments = Segments.of(batch.lengths, device=batch.ids_BT.device)
    with ragged_pass():
        logits_1TV: Tensor = model(
            input_ids=batch.ids_BT,
            position_ids=batch.positions_BT,
            use_cache=False,
            logits_to_keep=batch.predict_N,
            segments=segments,
        ).logits
    # A model that does not know logits_to_keep answers at all T positions; there are always fewer targets than tokens.
    return logits_1TV[0] if logits_1TV.shape[1] == batch.num_targets else logits_1TV[0, batch.predict_N]


def _padded(model: nn.Module, batch: Batch) -> Tensor:
    longest = batch.ids_BT.shape[1]
    columns_U, place_N = torch.unique(batch.predict_N % longest, return_inverse=True)
    logits_BUV: Tensor = model(
        input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False, logits_to_keep=columns_U
    ).logits
    if logits_BUV.shape[1] != len(columns_U):
        place_N = columns_U[place_N]
    return logits_BUV[batch.predict_N // longest, place_N]
