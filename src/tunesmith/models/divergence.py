"""Divergence of a model from a teacher at each target, with its gradient, a piece of the targets at a time.

    p, q    probabilities of teacher and learner, softmax(logits / T) over the common vocabulary
    listed  Σ_K p log(p / q) + p_rest log(p_rest / q_rest): KL(p ‖ q) of the teacher's K likeliest tokens and one event
            for all others, by which it is at most the whole one. Gradient by the logits: q − p at a listed
            token, q − p_rest q / q_rest at another, over T
    reverse Σ q log(q / p), KL(q ‖ p). Gradient: q (log(q / p) − KL), over T

Agarwal et al. 2023, "On-Policy Distillation of Language Models", arXiv 2306.13649, section 3. Nothing is
multiplied by T², and a list is neither normalised again nor cut: the rest is computed, not 1 − Σ.
"""

# N targets, V vocabulary, K listed tokens, C numbers of a target, D hidden size

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.models.fused_loss import OfPiece

LOGITS_BYTES = 32 * 2**20
"""Bytes of logits whose divergences are computed together."""


def listed(values_NC: Tensor, *, vocabulary: int, temperature: float) -> OfPiece:
    """The divergence from the lists of all targets, see `data.teacher_rows.columns`, in pieces."""
    top = (values_NC.shape[1] - 1) // 2

    def of_part(logits_NV: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        numbers_NC = values_NC[here].to(logits_NV.dtype)
        ids_NK, logp_NK, rest_N = numbers_NC[:, :top].long(), numbers_NC[:, top:-1], numbers_NC[:, -1]
        scaled_NV = logits_NV[:, :vocabulary] / temperature
        lse_N1 = scaled_NV.logsumexp(-1, keepdim=True)
        logq_NK = scaled_NV.gather(1, ids_NK) - lse_N1
        others_NV = scaled_NV.scatter(1, ids_NK, float("-inf"))
        logq_rest_N = others_NV.logsumexp(-1) - lse_N1[:, 0]
        p_NK, p_rest_N = logp_NK.exp(), rest_N.exp()
        losses_N = _weighed(p_NK, logp_NK - logq_NK).sum(-1) + _weighed(p_rest_N, rest_N - logq_rest_N)
        total_N1 = (p_NK.sum(-1) + p_rest_N)[:, None]
        gradient_NV = total_N1 * (scaled_NV - lse_N1).exp() - p_rest_N[:, None] * others_NV.softmax(-1)
        gradient_NV.scatter_add_(1, ids_NK, -p_NK)
        return losses_N, _whole(gradient_NV / temperature, logits_NV)

    return partial(_in_parts, of_part=of_part)


def reverse(teacher_of: Callable[[slice], Tensor], *, vocabulary: int, temperature: float) -> OfPiece:
    """The reverse divergence from all of the teacher's logits, [N, V] of a piece, in pieces."""

    def of_part(logits_NV: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        teacher_NV = teacher_of(here)[:, :vocabulary].to(logits_NV.dtype)
        logq_NV = (logits_NV[:, :vocabulary] / temperature).log_softmax(-1)
        ratio_NV = logq_NV - (teacher_NV / temperature).log_softmax(-1)
        q_NV = logq_NV.exp()
        losses_N = (q_NV * ratio_NV).sum(-1)
        return losses_N, _whole(q_NV * (ratio_NV - losses_N[:, None]) / temperature, logits_NV)

    return partial(_in_parts, of_part=of_part)


def _weighed(p: Tensor, logs: Tensor) -> Tensor:
    """p · logs, 0 where p is."""
    return torch.where(p > 0, p * logs, torch.zeros_like(p))


def _whole(gradient_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """A gradient of the common vocabulary with zeros for what pads a model's own."""
    missing = logits_NV.shape[1] - gradient_NV.shape[1]
    return torch.nn.functional.pad(gradient_NV, (0, missing)) if missing else gradient_NV


def sum_of_logits(logits_NV: Tensor, of_piece: OfPiece, losses: list[Tensor] | None = None) -> Tensor:
    """The sum of the targets' losses, where logits are there whole; a float32 scalar with gradient."""
    total, losses_N = _OfLogits.apply(logits_NV, of_piece)  # type: ignore[no-untyped-call]
    if losses is not None:
        losses.append(losses_N)
    return total  # type: ignore[no-any-return]


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, of_piece: OfPiece) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        losses_N, gradient_NV = of_piece(logits_NV.to(wide, copy=True), slice(None))
        ctx.save_for_backward(gradient_NV.to(logits_NV.dtype))
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        (gradient_NV,) = ctx.saved_tensors
        return (gradient_NV * grad).to(gradient_NV.dtype), None


def _in_parts(logits_NV: Tensor, here: slice, *, of_part: OfPiece) -> tuple[Tensor, Tensor]:
    """A piece in parts, whose gradients take the place of the logits: each needs
    several times its own memory."""
    start, losses_N = here.start or 0, logits_NV.new_empty(len(logits_NV))
    size = max(1, LOGITS_BYTES // (logits_NV.element_size() * logits_NV.shape[1]))
    for begin in range(0, len(logits_NV), size):
        part = slice(begin, min(begin + size, len(logits_NV)))
        losses_N[part], logits_NV[part] = of_part(logits_NV[part], slice(start + part.start, start + part.stop))
    return losses_N, logits_NV
