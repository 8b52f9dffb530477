"""Whether a model answers the same for rows packed end to end as for each row alone."""

# L tokens of one row, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.models.attention import Segments, Trace, UnsupportedAttentionError, ragged_pass, use_ragged
from tunesmith.models.modes import evaluating
from tunesmith.types import Row

PROBE_TOKENS = 128
"""Tokens of a row that are compared: enough to see another row shine through, cheap enough for every start."""

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest mean error of a row. SmolLM2-135M in bfloat16 has 0.05 from rounding, and 1.1 to 2.3 where rows read each
other; in float32 0 and 1.7."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the comparison found."""

    ok: bool
    max_difference: float
    """Between two logits of the same token, packed and alone."""
    error: float
    """Of the worst row: the mean over its positions of (root mean square of the differences / spread of the logits)."""
    reason: str
    """Why not, in words; empty if ok."""


def ragged_agrees(model: PreTrainedModel, rows: Sequence[Row]) -> Agreement:
    """Compare the logits of a few real rows, packed, with those of the model's own attention, one row at a time.

    The model is left as it was.
    """
    own = model.config._attn_implementation
    pieces = _pieces(rows, model.device)
    with evaluating(model):
        alone = [model(input_ids=ids_L[None], use_cache=False).logits[0].float() for ids_L in pieces]
        try:
            packed, trace = _packed_logits(model, pieces)
        except (UnsupportedAttentionError, NotImplementedError, RuntimeError, TypeError, ValueError, KeyError) as error:
            # Whatever a foreign model says when it is called this way, the answer is the padded layout.
            return Agreement(False, float("nan"), float("nan"), str(error) or type(error).__name__)
        finally:
            model.set_attn_implementation(own)
    return _judge(alone, packed, trace, model.dtype)


def _pieces(rows: Sequence[Row], device: torch.device) -> list[Tensor]:
    """Two rows or more, some of equal length and some not, longest first as in a real pass."""
    capped = [row.ids[:PROBE_TOKENS] for row in rows]
    shortest = min(map(len, capped))
    capped += [capped[0][-shortest:], capped[0][: max(1, shortest // 2)]]
    capped.sort(key=len, reverse=True)
    return [torch.tensor(ids, dtype=torch.int64, device=device) for ids in capped]


def _packed_logits(model: PreTrainedModel, pieces: Sequence[Tensor]) -> tuple[list[Tensor], Trace]:
    lengths = [len(ids_L) for ids_L in pieces]
    use_ragged(model)
    with ragged_pass() as trace:
        logits_1TV = model(
            input_ids=torch.cat(list(pieces))[None],
            position_ids=torch.cat([torch.arange(length, device=model.device) for length in lengths])[None],
            use_cache=False,
            segments=Segments.of(lengths, device=model.device),
        ).logits
    return list(logits_1TV[0].float().split(lengths)), trace


def _judge(alone: Sequence[Tensor], packed: Sequence[Tensor], trace: Trace, dtype: torch.dtype) -> Agreement:
    differences = [packed_LV - alone_LV for packed_LV, alone_LV in zip(packed, alone, strict=True)]
    largest = max(float(difference_LV.abs().max()) for difference_LV in differences)
    error = max(
        float((difference_LV.square().mean(-1).sqrt() / alone_LV.std(-1)).mean())
        for difference_LV, alone_LV in zip(differences, alone, strict=True)
    )
    reason = ""
    if trace.calls == 0:
        reason = "its attention is its own and cannot be replaced"
    elif missing := trace.local_masks - trace.windows:
        reason = f"its attention is limited to {min(missing)} tokens by a mask alone"
    elif not error <= TOLERANCES[dtype]:
        reason = f"packed rows change its logits by up to {largest:.3g}"
    return Agreement(not reason, largest, error, reason)
