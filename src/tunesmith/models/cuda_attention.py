"""Attention over packed rows on a CUDA device: kernels in order of preference, and which computes a call.

A kernel is taken only if a probe on this device, of rows like those of a run, gives the answer and the
gradients of attention that is spelled out in float32. None of them is called once a row, and none makes a mask
of all tokens of a micro-batch by all its keys.

- varlen: torch's variable-length flash attention, causal or both ways, in half precision from Ampere on; on
  Hopper by FlashAttention 3 (Shah et al. 2024, arXiv 2407.08608) where its package is installed.
- padded: rows of similar length as one padded batch of torch's scaled_dot_product_attention: all the rest.
"""

# H heads, T tokens, D head size, K keys, G groups of heads that share keys, S rows of a block, L its longest
# row, N places of all blocks

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.errors import is_out_of_memory
from tunesmith.models.card import exact_products
from tunesmith.models.machine import to_device
from tunesmith.models.segments import (
    AttentionOptions,
    Segments,
    UnsupportedAttentionError,
    equal_rows,
    explicit_attention,
)
from tunesmith.runs.background import in_background
from tunesmith.types import Segment

HALF = (torch.bfloat16, torch.float16)
KERNEL_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
"""Largest error of an answer or gradient, as a share of its norm. Rounding gives 2e-6, 7e-3 and 1e-3; a token
read by mistake 0.1 and more."""
SHORT = 32
"""Rows up to this many keys share a padded block; longer ones with rows of more than half their keys."""
_DROPPING: set[torch.device] = set()
"""Cards on which a model drops weights of attention."""
FLASH_3, HOPPER = "flash_attn_interface", 9
"""Module of FlashAttention 3, and the major capability of the cards that it is for."""
PROBE_WINDOW, PROBE_SOFTCAP = 16, 2.0
PROBE_PIECES = (Segment(70), Segment(33), Segment(33), Segment(1), Segment(128), Segment(5))
PROBE_SHARING = (Segment(70), Segment(33, ((0, 70),)), Segment(1, ((0, 70), (70, 33))), Segment(128), Segment(5))

Run = Callable[[Tensor, Tensor, Tensor, Segments, AttentionOptions], Tensor]


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Properties of a call that decide which kernels can compute it."""

    dtype: torch.dtype
    heads: int
    groups: int
    head_size: int
    value_size: int
    causal: bool
    window: bool
    softcap: bool
    dropout: bool
    shared: bool
    """Whether pieces have prefixes."""

    @classmethod
    def of(
        cls, query_1HTD: Tensor, key_1GKD: Tensor, value_1GKD: Tensor, segments: Segments, options: AttentionOptions
    ) -> AttentionCase:
        return cls(
            dtype=query_1HTD.dtype,
            heads=query_1HTD.shape[1],
            groups=key_1GKD.shape[1],
            head_size=query_1HTD.shape[-1],
            value_size=value_1GKD.shape[-1],
            causal=options.causal,
            window=options.window is not None,
            softcap=options.softcap is not None,
            dropout=options.dropout > 0,
            shared=segments.shared is not None,
        )


USUAL_CASE = AttentionCase(
    torch.bfloat16, 8, 2, 128, 128, causal=True, window=False, softcap=False, dropout=False, shared=False
)
"""The case of most models."""


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """One way to compute attention over packed rows."""

    name: str
    supports: Callable[[AttentionCase, tuple[int, int]], bool]
    """(case, CUDA capability) → whether it is worth a probe."""
    run: Run
    """(query [1, H, T, D], key and value [1, G, K, D], segments, options) → [1, T, H, D]."""


@cache
def choose_kernel(case: AttentionCase, device: torch.device) -> AttentionKernel:
    """The first kernel that passes its probe. Raises UnsupportedAttentionError where none does."""
    capability = torch.cuda.get_device_capability(device)
    refusals = []
    if case.dropout and device not in _DROPPING:
        _DROPPING.add(device)
        if newest_flash(device):  # as it was found before
            _leave_newest_flash()
            choose_kernel.cache_clear()
        newest_flash.cache_clear()
    newest = newest_flash(device)
    for kernel in KERNELS:
        if kernel.supports(case, capability):
            # In a thread of its own, where no hook of a recomputed layer sees the tensors of the probe.
            reason = in_background(partial(probe, kernel, case, device)).result()
            if not reason:
                return replace(kernel, name=newest) if newest and kernel.run is varlen else kernel
            refusals.append(f"{kernel.name}: {reason}")
    raise UnsupportedAttentionError(f"no attention kernel gives the right answer here ({'; '.join(refusals)})")


@cache
def newest_flash(device: torch.device) -> str:
    """Let torch's flash attention be FlashAttention 3 in this process; its name, and "" where it is not taken.

    Taken on Hopper where the package is installed and right. It has no mode that repeats bit for bit, and
    refuses dropout in every call of the process, the model's own too.
    """
    is_hopper = torch.cuda.get_device_capability(device)[0] == HOPPER
    is_free = not torch.are_deterministic_algorithms_enabled() and device not in _DROPPING
    if not (is_hopper and is_free) or find_spec(FLASH_3) is None:
        return ""
    attention: Any = importlib.import_module("torch.nn.attention")
    try:
        attention.activate_flash_attention_impl("FA3")
        reason = in_background(partial(probe, KERNELS[0], USUAL_CASE, device)).result()
    except Exception as error:  # of a package of another version: torch's own is there
        if is_out_of_memory(error):
            raise
        reason = type(error).__name__
    if reason:
        _leave_newest_flash()
    return "" if reason else "varlen by FlashAttention 3"


def _leave_newest_flash() -> None:
    attention: Any = importlib.import_module("torch.nn.attention")
    getattr(attention, "restore_flash_attention_impl", lambda: None)()


def probe(kernel: AttentionKernel, case: AttentionCase, device: torch.device) -> str:
    """Why a kernel cannot compute a case; "" if answer and gradients are right. No random number is consumed.

    Dropout is tried, and its answers must be finite; they are compared without it.
    """
    is_cuda = device.type == "cuda"
    here = torch.cuda.device(device) if is_cuda else nullcontext()  # a new thread begins with the first one
    with here, exact_products(), torch.random.fork_rng([device] if is_cuda else []):
        try:
            expected = _answers(_by_piece, case, device, torch.float32)
            computed = _answers(kernel.run, replace(case, dropout=False), device, case.dtype)
            if case.dropout and not all(x.isfinite().all() for x in _answers(kernel.run, case, device, case.dtype)):
                return "not finite with dropout"
        except Exception as error:  # a compiler's, a driver's: whatever it is, another kernel is taken
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for name, ours, right in zip(("answers", "queries", "keys", "values"), computed, expected, strict=True):
        away = float((ours - right).norm() / right.norm())
        if not away <= KERNEL_TOLERANCES[case.dtype]:
            return f"{name} are off by {away:.2g}"
    return ""


def _answers(run: Run, case: AttentionCase, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The answer and the gradients of queries, keys and values, float32; drawn in its dtype from one seed."""
    segments = Segments.sharing(PROBE_SHARING if case.shared else PROBE_PIECES, device=device)
    draw = torch.Generator().manual_seed(0)
    tokens, keys = (sum(sizes) for sizes in zip(*segments.sizes, strict=True))
    shapes = (
        (1, case.heads, tokens, case.head_size),
        (1, case.groups, keys, case.head_size),
        (1, case.groups, keys, case.value_size),
    )
    query, key, value = inputs = [
        torch.randn(shape, generator=draw).to(case.dtype).to(device, dtype).requires_grad_() for shape in shapes
    ]
    options = AttentionOptions(
        causal=case.causal,
        dropout=0.5 if case.dropout and dtype == case.dtype else 0.0,
        scaling=None,
        window=PROBE_WINDOW if case.window else None,
        softcap=PROBE_SOFTCAP if case.softcap else None,
    )
    with torch.enable_grad():
        out = run(query, key, value, segments, options)
        weights = torch.randn(out.shape, generator=draw).to(case.dtype).to(out)
        gradients = torch.autograd.grad(out, inputs, weights)
    return [tensor.detach().float() for tensor in (out, *gradients)]


def _by_piece(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: AttentionOptions) -> Tensor:
    """Each piece by itself, spelled out."""
    queries, keys = map(list, zip(*segments.sizes, strict=True))
    options = replace(options, dropout=0.0)
    out = []
    parts = torch.split(query, queries, 2), torch.split(key, keys, 2), torch.split(value, keys, 2)
    for q, k, v in zip(*parts, strict=True):
        window = options.window or k.shape[2]
        mask = segments.band(q.shape[2], k.shape[2], window) if options.causal else None
        out.append(explicit_attention(q, k, v, mask, options))
    return torch.cat(out, 2).transpose(1, 2)


@cache
def _varlen_attn() -> Any:
    """torch's variable-length flash attention; None if without windows or grouped heads (torch 2.10)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)
    return varlen_attn if known else None


def _supports_varlen(case: AttentionCase, capability: tuple[int, int]) -> bool:
    return (
        case.dtype in HALF
        and case.head_size == case.value_size <= 256
        and case.head_size % 8 == 0
        and not (case.dropout or case.softcap)
        and capability >= (8, 0)
        and _varlen_attn() is not None
    )


def varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: AttentionOptions) -> Tensor:
    """[1, T, H, D]. A window counts the token itself; the kernel's counts those to its left, 0 to its right.

    Where a piece has more keys than queries, the last query reads to the last key (Dao 2023, FlashAttention-2).
    """
    q_THD, k_KGD, v_KGD = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    left = -1 if options.window is None else options.window - 1
    out_THD: Tensor = _varlen_attn()(
        q_THD,
        k_KGD,
        v_KGD,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        max(queries for queries, _ in segments.sizes),
        max(keys for _, keys in segments.sizes),
        scale=options.scaling,
        window_size=(left, 0) if options.causal else (-1, -1),
        enable_gqa=q_THD.shape[1] != k_KGD.shape[1],
    )
    return out_THD[None]


@dataclass(frozen=True, slots=True)
class PaddedLayout:
    """Places of queries and keys in padded blocks of rows of similar length."""

    blocks: tuple[tuple[int, int], ...]
    """(S, L) of each."""
    place_T: Tensor
    """int64, the place of each query, the same as its own key's."""
    place_K: Tensor
    masks: tuple[Tensor | None, ...]
    """bool [S, 1, 1, L] for each block, keys that exist; None: a causal query reads no others, or all exist.
    """

    @classmethod
    def of(cls, segments: Segments, *, causal: bool) -> PaddedLayout:
        sizes = segments.sizes
        by_block: dict[int, list[int]] = {}
        for i, (_, keys) in enumerate(sizes):
            by_block.setdefault((max(keys, SHORT) - 1).bit_length(), []).append(i)
        first_K = [0, *accumulate(keys for _, keys in sizes)]
        place_K = np.empty(first_K[-1], np.int64)
        blocks, masks = list[tuple[int, int]](), list[Tensor | None]()
        first = 0
        for members in by_block.values():
            longest = max(sizes[i][1] for i in members)
            for i in members:
                place_K[first_K[i] : first_K[i + 1]] = np.arange(first, first + sizes[i][1])
                first += longest
            blocks.append((len(members), longest))
            keys_S1 = np.array([sizes[i][1] for i in members])[:, None]
            is_needed = not causal and int(keys_S1.min()) < longest
            mask_SL = torch.from_numpy(np.arange(longest) < keys_S1)[:, None, None] if is_needed else None
            masks.append(None if mask_SL is None else to_device(mask_SL, segments.device))
        own = [np.arange(end - num, end) for end, (num, _) in zip(first_K[1:], sizes, strict=True)]
        places = place_K[np.concatenate(own)], place_K
        place_of_T, place_of_K = (to_device(torch.from_numpy(one), segments.device) for one in places)
        return cls(tuple(blocks), place_of_T, place_of_K, tuple(masks))


def padded(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: AttentionOptions) -> Tensor:
    """[1, T, H, D]: one call for all rows of similar length, at most one for each power of two.

    Keys are repeated for the heads that share them: with grouped heads torch knows only a kernel
    that keeps all scores, unless flash attention takes the call. A query lies at the place of its
    own key, so that causal rows need no mask.
    """
    name = ("padded", options.causal)
    if name not in segments.layouts:
        segments.layouts[name] = PaddedLayout.of(segments, causal=options.causal)
    layout: PaddedLayout = segments.layouts[name]
    num_places = sum(rows * longest for rows, longest in layout.blocks)

    def spread(tensor: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        flat = tensor[0].transpose(0, 1)
        flat = flat.repeat_interleave(query.shape[1] // flat.shape[1], 1)
        filled = flat.new_zeros(num_places, *flat.shape[1:]).index_copy(0, place, flat)
        parts = torch.split(filled, [rows * longest for rows, longest in layout.blocks])
        return tuple(
            torch.unflatten(part, 0, (rows, longest)).transpose(1, 2)
            for part, (rows, longest) in zip(parts, layout.blocks, strict=True)
        )

    inputs = spread(query, layout.place_T), spread(key, layout.place_K), spread(value, layout.place_K)
    out = [
        equal_rows(q, k, v, segments, options, keys_there=mask).transpose(1, 2).flatten(0, 1)
        for q, k, v, mask in zip(*inputs, layout.masks, strict=True)
    ]
    return torch.cat(out).index_select(0, layout.place_T)[None]


KERNELS = (
    AttentionKernel("varlen", _supports_varlen, varlen),
    AttentionKernel("padded", lambda case, capability: True, padded),
)
"""In order of preference."""
