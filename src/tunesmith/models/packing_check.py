"""A check that a model answers the same for rows packed end to end as for each row alone."""

# T tokens, N and K positions that are compared, V vocabulary, classes or hidden size

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import nan

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.models.attention import AttentionTrace, packed_forward, use_packed_attention
from tunesmith.models.forward import hidden_at_targets, logits_at_targets, sequence_logits
from tunesmith.models.heads import head_of
from tunesmith.models.modes import eval_mode, silence_transformers
from tunesmith.models.segments import UnsupportedAttentionError
from tunesmith.types import Batch, BatchImage, Layout, ModelKind, Row

ImagesOf = Callable[[Row], Sequence[BatchImage]]

PROBE_TOKENS = 128
"""Tokens of a row that are run: enough to see another row leak into it, cheap enough for every start."""
PROBE_POSITIONS = 32
"""Positions of a row whose logits are compared: logits of all would be gigabytes with a large vocabulary."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest error of a row. SmolLM2-135M in bfloat16 has 0.05 from rounding, and 1.1 to 2.3 where rows read each
other; in float32 0 and 1.7."""
LEAKS = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.01}
"""Largest error between a row's first tokens behind one row and behind another of the same length: the shapes
are equal, so a sound model gives the same bits. Hybrids with recurrent layers have 0.1 to 0.3."""
LEAK_TOKENS = 8
_REFUSALS = (UnsupportedAttentionError, NotImplementedError, RuntimeError, TypeError, ValueError, KeyError)
"""Errors of a foreign model that is called with packed rows; they are padded then."""

_STATEFUL_LAYERS = re.compile(r"conv|linear_attention|mamba|recurrent|rwkv|hybrid|lightning|retention|ssm|delta")
"""Types of layers, as configs name them."""
_STATEFUL_MODULES = re.compile(
    r"Mamba|Recurrent(?!Gemma)|RgLru|GatedDelta|Lightning|LinearAttention|Rwkv|Retention|ShortConv"
)
_STATES = ("A_log", "dt_bias", "time_decay")
"""Names of parameters of state spaces."""


@dataclass(frozen=True, slots=True)
class PackingCheck:
    """The result of the comparison."""

    reason: str
    """Why not, in words; empty if the answers are the same."""
    error: float = nan
    """`normalized_error` of the worst row."""
    kernels: tuple[str, ...] = ()
    """Kernels of `cuda_attention` that computed the packed rows."""

    @property
    def ok(self) -> bool:
        return not self.reason


def layouts_of(kind: ModelKind) -> tuple[Layout, ...]:
    """The layouts of a batch of such a model: the first that it can run is taken, the last always runs."""
    return ("encoder_decoder",) if kind == "encoder_decoder" else ("packed", "padded")


def check_packing(
    model: PreTrainedModel, kind: ModelKind, rows: Sequence[Row], *, has_types: bool = False, plain: bool = False,
    images_of: ImagesOf = lambda row: (),
) -> PackingCheck:  # fmt: skip
    """Compare the model's answers for a few real rows, packed, with its own attention's for one row at a time.

    The answers are logits; of a causal model with a head the hidden states that the head reads, since there may
    be one class only. `has_types`: token types tell the two texts of a pair apart; `images_of`: the images of a
    row, which is then read whole. The model stays as it was.
    """
    if kind == "encoder_decoder":
        return PackingCheck("an encoder–decoder reads its sources and targets apart")
    if reason := recurrent_layer(model):
        return PackingCheck(reason)
    probe = _probe(rows)
    answers = partial(_answers, model, causal=kind == "causal", has_types=has_types, images_of=images_of)
    implementation = model.config._attn_implementation
    other = _other(probe[0], getattr(model.config, "image_token_id", None))
    with eval_mode(model), silence_transformers():
        try:
            alone = [answers([row], "padded")[0] for row in probe]
            use_packed_attention(model, plain=plain)
            with packed_forward() as trace:
                trace.looks_at_masks = any(row.images for row in probe)
                packed = answers(probe, "packed")
                before = (probe[0], other) if kind == "causal" else ()
                behind = [answers([row, probe[-1]], "packed")[1][:LEAK_TOKENS] for row in before]
        except _REFUSALS as refusal:
            # Of split layers (FSDP): a raising forward leaves their state undefined.
            for module in model.modules():
                getattr(module, "reset_iter_state", lambda: None)()
            return PackingCheck(str(refusal) or type(refusal).__name__)
        finally:
            model.set_attn_implementation(implementation)
    if not has_windows(model):
        trace.local_masks.clear()
    if trace.reads_ahead:  # in bfloat16 the difference would pass for rounding
        return PackingCheck("it reads the tokens of an image in both directions")
    result = _compare(alone, packed, trace, model.dtype, by_row=kind == "causal")
    if behind and result.ok and not (leak := normalized_error(*behind)) <= leak_tolerance(model):
        return replace(result, reason=f"the row before changes a row's logits, by {leak:.2g} of their spread")
    return result


def has_windows(model: PreTrainedModel) -> bool:
    """Whether some layer may attend to near tokens only, as far as the config knows its layers: models make the
    mask of a window for all kinds of layers that they could have."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "use_sliding_window", True) and (kinds is None or set(kinds) != {"full_attention"})


def leak_tolerance(model: PreTrainedModel) -> float:
    """Largest change of a row with its neighbours. Experts round by the number of tokens that choose them."""
    has_experts = any("expert" in type(module).__name__.lower() for module in model.modules())
    return TOLERANCES[model.dtype] if has_experts else LEAKS[model.dtype]


def normalized_error(found_KV: Tensor, expected_KV: Tensor) -> float:
    """The mean over positions of (root mean square of the differences / spread of the logits)."""
    return float(((found_KV - expected_KV).square().mean(-1).sqrt() / expected_KV.std(-1)).mean())


def recurrent_layer(model: PreTrainedModel) -> str:
    """Why rows cannot be packed, or texts decoded without a layer's state; "" if tokens meet in attention only.

    Decided by config and modules: a leak of a tenth of the logits' spread would pass for rounding in bfloat16.
    """
    config = model.config.get_text_config()
    for name in ("layer_types", "layers_block_type", "block_types"):
        for kind in getattr(config, name, None) or ():
            if _STATEFUL_LAYERS.search(str(kind)):
                return _carries(f"{kind} layers")
    for module in model.modules():
        is_wide = isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1
        holds_state = any(name in _STATES for name, _ in module.named_parameters(recurse=False))
        if is_wide or holds_state or _STATEFUL_MODULES.search(type(module).__name__):
            return _carries(type(module).__name__)
    return ""


def _carries(what: str) -> str:
    return f"{what}: they carry a state from token to token, which the next row would find"


def _probe(rows: Sequence[Row]) -> list[Row]:
    """Three rows or more, some of equal length and some not, longest first as in a real pass."""
    shortest = min(*(len(row.ids) for row in rows), PROBE_TOKENS)
    capped = [_cut(row, PROBE_TOKENS) for row in rows]
    capped += [_cut(rows[0], shortest), _cut(rows[0], max(1, shortest // 2))]
    return sorted(capped, key=lambda row: -len(row.ids))


def _cut(row: Row, num_tokens: int) -> Row:
    """The beginning of a row; an image is never cut."""
    if row.images:
        return row
    return replace(row, ids=row.ids[:num_tokens], trained=row.trained[:num_tokens], labels=None)


def _other(row: Row, image_token: int | None) -> Row:
    """As many tokens in another order and shifted, so that none is where it was; images stay in their
    places."""
    is_text_T = row.ids != image_token if row.images else np.ones(len(row.ids), np.bool_)
    text_T = row.ids[is_text_T]
    ids_T = row.ids.copy()
    ids_T[is_text_T] = np.roll(text_T, 1) if row.images else (text_T[::-1] + 1) % (int(text_T.max()) + 1)
    return replace(row, ids=ids_T)


def _answers(
    model: PreTrainedModel, rows: Sequence[Row], layout: Layout, *, causal: bool, has_types: bool, images_of: ImagesOf
) -> list[Tensor]:
    """float32 [K, V] for each row."""
    lengths = [len(row.ids) for row in rows]
    starts = [0, *accumulate(lengths)]
    places = [
        start + torch.linspace(0, length - 1, min(length, PROBE_POSITIONS)).round().long()
        for start, length in zip(starts, lengths, strict=False)
    ]
    head = head_of(model)
    per_row = head == "sequence" and not causal
    if per_row:
        places = [torch.tensor([start]) for start in starts[:-1]]
    predict_N = torch.cat(places).to(model.device)
    types = [int(0 < row.second <= t) for row in rows for t in range(len(row.ids))]

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor([values], dtype=torch.int64, device=model.device)

    batch = Batch(
        layout=layout,
        ids_BT=tensor([int(token) for row in rows for token in row.ids]),
        positions_BT=tensor([t for length in lengths for t in range(length)]),
        mask_BT=None if layout == "packed" else tensor([1] * starts[-1]),
        lengths=tuple(lengths),
        predict_N=predict_N,
        targets_N=predict_N,
        row_of_N=predict_N,
        row_indices=tuple(range(len(rows))),
        types_BT=tensor(types) if has_types else None,
        images=tuple(image for row in rows for image in images_of(row)),
    )
    if per_row:
        found_NV = sequence_logits(model, batch)
    elif head == "vector" or (causal and head != "next_token"):
        found_NV = hidden_at_targets(model, batch)
    else:
        found_NV = logits_at_targets(model, batch)
    if len(found_NV) != len(predict_N):
        raise UnsupportedAttentionError("its head does not read the first token of each row")
    return list(torch.split(found_NV.float(), [len(of_row) for of_row in places]))


def _compare(
    alone: Sequence[Tensor], packed: Sequence[Tensor], trace: AttentionTrace, dtype: torch.dtype, *, by_row: bool
) -> PackingCheck:
    """`by_row`: the error of the worst row; else of all rows, by the spread of the answers among positions and
    rows, since a head may have one class or two."""
    pairs = list(zip(packed, alone, strict=True))
    largest = max(float((packed_KV - alone_KV).abs().max()) for packed_KV, alone_KV in pairs)
    if by_row:
        error = max(normalized_error(*pair) for pair in pairs)
    else:
        alone_NV = torch.cat(list(alone))
        spread = (alone_NV - alone_NV.mean(0)).square().mean().sqrt().clamp_min(1e-12)
        error = float((torch.cat(list(packed)) - alone_NV).square().mean().sqrt() / spread)
    reason = ""
    if trace.calls == 0:
        reason = "its attention is its own and cannot be replaced"
    elif missing := trace.local_masks - trace.windows:
        reason = f"its attention is limited to {min(missing)} tokens by a mask alone"
    elif not error <= TOLERANCES[dtype]:
        reason = f"packed rows change its logits by up to {largest:.3g}"
    return PackingCheck(reason, error, tuple(sorted(trace.kernels)))
