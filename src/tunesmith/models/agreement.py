"""Whether a model answers the same for rows packed end to end as for each row alone."""

# L tokens of one row, T of all rows, N and K positions that are compared, V vocabulary, D hidden size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.models import recurrent
from tunesmith.models.attention import Trace, UnsupportedAttentionError, ragged_pass, use_ragged
from tunesmith.models.forward import logits_at_targets, sequence_logits
from tunesmith.models.heads import head_of
from tunesmith.models.modes import evaluating
from tunesmith.models.quiet import quiet
from tunesmith.models.segments import Segments
from tunesmith.types import Batch, Layout, Row

PROBE_TOKENS = 128
"""Tokens of a row that are run: enough to see another row shine through, cheap enough for every start."""
PROBE_POSITIONS = 32
"""Positions of a row whose logits are compared: those of all would be gigabytes with a large vocabulary."""

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest mean error of a row. SmolLM2-135M in bfloat16 has 0.05 from rounding, and 1.1 to 2.3 where rows read each
other; in float32 0 and 1.7."""


LEAKS = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.01}
"""Largest mean error of the first tokens of a row between two rows of one length that it stands behind: of the same
shapes, so that a sound model gives the same bits. Hybrids with recurrent layers have 0.1 to 0.3."""
LEAK_TOKENS = 8

Found = TypeVar("Found")

_REFUSALS = (UnsupportedAttentionError, NotImplementedError, RuntimeError, TypeError, ValueError, KeyError)
"""Whatever a foreign model says when it is called this way, the answer is the padded layout."""


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


def ragged_agrees(model: PreTrainedModel, rows: Sequence[Row], *, plain: bool = False) -> Agreement:
    """Compare the logits of a few real rows, packed, with those of the model's own attention, one row at a time.

    The model is left as it was.
    """
    pieces = _pieces(rows, model.device)
    last, neighbours = pieces[-1], (pieces[0], _others(pieces[0]))
    with evaluating(model):
        alone = [_logits(model, ids_L[None], _positions(len(ids_L))) for ids_L in pieces]
        packed = _packed(model, lambda: _packed_logits(model, pieces), plain=plain)
        behind = _packed(model, lambda: [_first_behind(model, ids_L, last) for ids_L in neighbours], plain=plain)
    if isinstance(packed, Agreement):
        return packed
    if isinstance(behind, Agreement):
        return behind
    found = _judge(alone, *packed, model.dtype)
    if found.ok and not (leak := spread_error(*behind[0])) <= leak_allowed(model):
        return replace(found, ok=False, reason=f"the row before changes a row's logits, by {leak:.2g} of their spread")
    return found


def _first_behind(model: PreTrainedModel, before_L: Tensor, ids_L: Tensor) -> Tensor:
    """[K, V], of the first tokens of a row that stands behind another."""
    return _packed_logits(model, [before_L, ids_L])[1][:LEAK_TOKENS]


def _others(ids_L: Tensor) -> Tensor:
    """As many tokens, in another order and shifted, so that none is where it was."""
    return (ids_L.flip(0) + 1) % (int(ids_L.max()) + 1)


def leak_allowed(model: PreTrainedModel) -> float:
    """What a row may change with the rows beside it. Experts compute as many tokens as choose them, and round so."""
    has_experts = any("expert" in type(module).__name__.lower() for module in model.modules())
    return TOLERANCES[model.dtype] if has_experts else LEAKS[model.dtype]


def encoder_agrees(model: PreTrainedModel, rows: Sequence[Row], *, has_types: bool, plain: bool = False) -> Agreement:
    """The same for an encoder, by what its own head answers: of each row, or of each of its tokens."""
    rows = [*rows, rows[0]]  # two of equal length
    with evaluating(model):
        alone = torch.cat([_answers(model, [row], "padded", has_types=has_types) for row in rows])
        found = _packed(model, lambda: _answers(model, rows, "ragged", has_types=has_types), plain=plain)
    if isinstance(found, Agreement):
        return found
    packed, trace = found
    if packed.shape != alone.shape:
        return Agreement(False, float("nan"), float("nan"), "its head does not read the first token of each row")
    difference = packed - alone
    spread = alone - alone.mean(0)
    error = float(difference.square().mean().sqrt() / spread.square().mean().sqrt().clamp_min(1e-12))
    reason = (
        "" if error <= TOLERANCES[model.dtype] else f"packed rows change its answers by {error:.3g} of their spread"
    )
    if trace.calls == 0:
        reason = "its attention is its own and cannot be replaced"
    return Agreement(not reason, float(difference.abs().max()), error, reason)


def _packed(model: PreTrainedModel, answer: Callable[[], Found], *, plain: bool) -> tuple[Found, Trace] | Agreement:
    """What packed rows are answered, and what was asked for meanwhile; or why the model does not take them."""
    if reason := recurrent.why(model):
        return Agreement(False, float("nan"), float("nan"), reason)
    own = model.config._attn_implementation
    try:
        # transformers warns of attention that cannot be replaced; here that is an answer.
        with quiet():
            use_ragged(model, plain=plain)
            with ragged_pass() as trace:
                return answer(), trace
    except _REFUSALS as refusal:
        return Agreement(False, float("nan"), float("nan"), str(refusal) or type(refusal).__name__)
    finally:
        with quiet():
            model.set_attn_implementation(own)


def _answers(model: PreTrainedModel, rows: Sequence[Row], layout: Layout, *, has_types: bool) -> Tensor:
    """[rows, C], or [all tokens, C or V], float32."""
    lengths = [min(len(row.ids), PROBE_TOKENS) for row in rows]
    starts = [0, *accumulate(lengths)]
    types = [[int(0 < row.second <= t) for t in range(n)] for row, n in zip(rows, lengths, strict=True)]
    per_row = head_of(model) == "sequence"
    places = starts[:-1] if per_row else range(starts[-1])
    ids = [int(token) for row, n in zip(rows, lengths, strict=True) for token in row.ids[:n]]

    def tensor(values: Sequence[Any]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=model.device)

    batch = Batch(
        layout=layout,
        ids_BT=tensor(ids)[None],
        positions_BT=torch.cat([torch.arange(n, device=model.device) for n in lengths])[None],
        mask_BT=None if layout == "ragged" else torch.ones(1, len(ids), dtype=torch.int64, device=model.device),
        lengths=tuple(lengths),
        predict_N=tensor(places),
        targets_N=tensor(places),
        row_of_N=tensor(places),
        row_indices=tuple(range(len(rows))),
        types_BT=tensor([t for some in types for t in some])[None] if has_types else None,
    )
    return (sequence_logits if per_row else logits_at_targets)(model, batch).float()


def _pieces(rows: Sequence[Row], device: torch.device) -> list[Tensor]:
    """Two rows or more, some of equal length and some not, longest first as in a real pass."""
    capped = [row.ids[:PROBE_TOKENS] for row in rows]
    shortest = min(map(len, capped))
    capped += [capped[0][-shortest:], capped[0][: max(1, shortest // 2)]]
    capped.sort(key=len, reverse=True)
    return [torch.tensor(ids, dtype=torch.int64, device=device) for ids in capped]


def _positions(length: int) -> Tensor:
    """[K], spread over a row from its first to its last."""
    return torch.linspace(0, length - 1, min(length, PROBE_POSITIONS)).round().long()


def _logits(model: PreTrainedModel, ids_1T: Tensor, positions_K: Tensor, **how: Any) -> Tensor:
    """[K, V] in float32; of a model that answers with classes what its head reads, [K, D]: there may be one class."""
    positions_K = positions_K.to(model.device)
    if head_of(model) != "next_token":
        hidden_TD: Tensor = model.base_model(input_ids=ids_1T, use_cache=False, **how).last_hidden_state[0]
        return hidden_TD[positions_K].float()
    logits_KV: Tensor = model(input_ids=ids_1T, use_cache=False, logits_to_keep=positions_K, **how).logits[0]
    # Of a model that does not know logits_to_keep, those of all T come back.
    return (logits_KV if len(logits_KV) == len(positions_K) else logits_KV[positions_K]).float()


def _packed_logits(model: PreTrainedModel, pieces: Sequence[Tensor]) -> tuple[Tensor, ...]:
    lengths = [len(ids_L) for ids_L in pieces]
    starts = [0, *accumulate(lengths)]
    positions = [start + _positions(length) for start, length in zip(starts, lengths, strict=False)]
    logits_KV = _logits(
        model,
        torch.cat(list(pieces))[None],
        torch.cat(positions),
        position_ids=torch.cat([torch.arange(length, device=model.device) for length in lengths])[None],
        segments=Segments.of(lengths, device=model.device),
    )
    return torch.split(logits_KV, [len(positions_K) for positions_K in positions])


def spread_error(found_KV: Tensor, expected_KV: Tensor) -> float:
    """The mean over positions of (root mean square of the differences / spread of the logits)."""
    return float(((found_KV - expected_KV).square().mean(-1).sqrt() / expected_KV.std(-1)).mean())


def _judge(alone: Sequence[Tensor], packed: Sequence[Tensor], trace: Trace, dtype: torch.dtype) -> Agreement:
    differences = [packed_KV - alone_KV for packed_KV, alone_KV in zip(packed, alone, strict=True)]
    largest = max(float(difference_KV.abs().max()) for difference_KV in differences)
    error = max(spread_error(packed_KV, alone_KV) for packed_KV, alone_KV in zip(packed, alone, strict=True))
    reason = ""
    if trace.calls == 0:
        reason = "its attention is its own and cannot be replaced"
    elif missing := trace.local_masks - trace.windows:
        reason = f"its attention is limited to {min(missing)} tokens by a mask alone"
    elif not error <= TOLERANCES[dtype]:
        reason = f"packed rows change its logits by up to {largest:.3g}"
    return Agreement(not reason, largest, error, reason)
