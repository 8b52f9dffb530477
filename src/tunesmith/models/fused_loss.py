"""The output layer and the cross-entropy of its tokens in one autograd node, a chunk of the targets at a time.

    l = cap · tanh(scale (h Wᵀ + b) / cap),  loss = Σ_N (1 − ε) (lse − l_target) + ε (lse − mean_V l) + z lse²
    dl = p (1 + 2 z lse) − ε / V − (1 − ε) at the target,  lse = log Σ_V exp l,  p = exp(l − lse)

The gradient of a chunk's logits is formed while they are there, on a processor in their place, so the logits of
all targets never exist at once: a number of float32 (on a card two) for every target of a chunk and token of
the vocabulary and one of the model's precision, instead of some five for every target. Kept for the backward:
the gradient of h, D numbers a target, and W's where it is trained. Logits are rounded as the model rounds them;
the softmax and its logarithm are float32.

The gradient in the forward: Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989, section 3.2. It is used only
where the output layer as the model's config describes it gives the model's own logits.
"""

# N targets, V vocabulary, D hidden size

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from tunesmith.models.forward import has_cache
from tunesmith.models.heads import head_of
from tunesmith.models.modes import eval_mode

CHUNK_BYTES = {"cpu": 16 * 2**20}
"""Bytes of float32 logits of a chunk. On a CPU small chunks are faster, since they stay in its caches."""
CHUNK_BYTES_ELSEWHERE, CHUNK_BYTES_SMALL = 512 * 2**20, 128 * 2**20
SMALL_CARD = 17 * 10**9
"""Bytes of memory of a card up to which chunks are small: T4, and others of 16 GB."""
CHUNK_BYTES_TRAINED = 64 * 2**20
"""At least, where the layer is trained: every chunk goes through its gradient once more."""
CHUNK_TARGETS = 128
"""At least: every chunk reads the layer's weights, which takes as long as the products with some 60 targets."""
LOSS_PROBE_TOKENS = 8
OfPiece = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(logits [N, V] of a piece of the targets, float32, which may be written over; which targets these are) → (the
loss of each, the gradient by the logits)."""


@dataclass(frozen=True, slots=True)
class OutputLayer:
    """Turns hidden states into logits."""

    layer: nn.Linear
    scale: float
    divides: bool
    """Divide logits by `scale` instead of multiplying: rounding differs."""
    cap: float | None

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether it is this model's layer: a task that is bound to another one computes the logits whole."""
        return isinstance(model, PreTrainedModel) and model.get_output_embeddings() is self.layer

    def chunks(self, targets: int, *, trained: bool) -> Iterator[slice]:
        """Chunks of these targets, all of about one size: a small last chunk would read the weights for
        little."""
        num = -(-targets // self.chunk_size(trained=trained))
        yield from (slice(targets * i // num, targets * (i + 1) // num) for i in range(num))

    def chunk_size(self, *, trained: bool) -> int:
        """Targets of a chunk, at most."""
        weight = self.layer.weight
        kind = weight.device.type
        size = CHUNK_BYTES[kind] if kind in CHUNK_BYTES else chunk_on_card(_memory_of(weight.device))
        if trained:
            return max(1, max(size, CHUNK_BYTES_TRAINED) // (4 * len(weight)))
        return max(CHUNK_TARGETS, size // (4 * len(weight)))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] from [N, D], as the model computes them."""
        logits_NV = F.linear(hidden_ND, self.layer.weight, self.layer.bias)
        if self.scale != 1:
            logits_NV = logits_NV / self.scale if self.divides else logits_NV * self.scale
        return logits_NV if self.cap is None else torch.tanh(logits_NV / self.cap) * self.cap

    def loss_sum(
        self, hidden_ND: Tensor, targets_N: Tensor, *, smoothing: float, z: float, losses: list[Tensor] | None = None
    ) -> Tensor:
        """The sum of the targets' losses, a float32 scalar. `losses`: gets each target's loss appended, [N]."""

        def of_piece(logits_NV: Tensor, here: slice) -> tuple[Tensor, Tensor]:
            return _losses_and_gradient(logits_NV, targets_N[here], smoothing=smoothing, z=z)

        return self.sum_of(hidden_ND, of_piece, losses=losses)

    def sum_of(self, hidden_ND: Tensor, of_piece: OfPiece, *, losses: list[Tensor] | None = None) -> Tensor:
        """The sum of any losses of the targets that follow from their logits, see `OfPiece`."""
        out, losses_N = _LossSum.apply(hidden_ND, self.layer.weight, self.layer.bias, self, of_piece)  # type: ignore[no-untyped-call]
        if losses is not None:
            losses.append(losses_N)
        return out  # type: ignore[no-any-return]

    def log_probs(self, hidden_ND: Tensor, targets_N: Tensor, *, temperature: float = 1.0) -> Tensor:
        """[N] float32, the log-probability of each target. Their weights are known only after the pass: its
        gradient is scaled then; where the layer is trained, the logits of a chunk are computed again for it.
        `temperature` divides the rounded logits."""
        weight, bias = self.layer.weight, self.layer.bias
        out: Tensor = _LogProbs.apply(hidden_ND, weight, bias, targets_N, self, temperature)  # type: ignore[no-untyped-call]
        return out


def chunk_on_card(memory: int) -> int:
    """Bytes of float32 logits of a chunk on a device of so much memory."""
    return CHUNK_BYTES_SMALL if memory <= SMALL_CARD else CHUNK_BYTES_ELSEWHERE


@cache
def _memory_of(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else sys.maxsize


def output_layer_of(model: PreTrainedModel) -> OutputLayer | None:
    """The output layer of a causal model as its config describes it; None unless it is a plain linear layer.

    A layer whose forward a method has replaced is not plain: rows of new tokens have gradients of their own.
    """
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    if head_of(model) != "next_token" or config.is_encoder_decoder or type(layer) is not nn.Linear:
        return None
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    multiplied, divided = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return OutputLayer(
        layer,
        scale=float(divided or multiplied or 1.0),
        divides=bool(divided),
        cap=getattr(config, "final_logit_softcapping", None),
    )


@torch.no_grad()
def find_output_layer(model: PreTrainedModel) -> OutputLayer | None:
    """`output_layer_of` the model, if it gives the model's own logits on a few tokens."""
    output = output_layer_of(model)
    if output is None or model.base_model is model:  # Llama 4's base has another name than its class says
        return None
    ids_1T = torch.arange(LOSS_PROBE_TOKENS, device=model.device)[None] % output.layer.weight.shape[0]
    cache = {"use_cache": False} if has_cache(type(model).forward) else {}
    with eval_mode(model):
        expected = model(input_ids=ids_1T, **cache).logits[0]
        hidden_TD = model.base_model(input_ids=ids_1T, **cache).last_hidden_state[0]
    ours = output.logits(hidden_TD)
    tolerance = 4 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    # A model of values that are not numbers has no such layer: its losses then say so.
    if ours.shape != expected.shape or not bool(((ours - expected).abs() <= tolerance).all()):
        return None
    return output


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 — autograd.Function takes positional arguments only
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        output: OutputLayer,
        of_piece: OfPiece,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        total, found_N = hidden_ND.new_zeros((), dtype=wide), hidden_ND.new_empty(len(hidden_ND), dtype=wide)
        ghidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        gweight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        gbias_V = weight_VD.new_zeros(len(weight_VD), dtype=wide) if needs_bias else None
        for here in output.chunks(len(hidden_ND), trained=needs_weight):
            losses_N, glogits_NV = _of_chunk(hidden_ND[here], here, output, of_piece)
            total += losses_N.sum()
            found_N[here] = losses_N
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            if ghidden_ND is not None:
                torch.mm(glogits_NV, weight_VD, out=ghidden_ND[here])
            if gweight_VD is not None:
                gweight_VD += _summed(glogits_NV, hidden_ND[here])
            if gbias_V is not None:
                gbias_V += glogits_NV.sum(0, dtype=wide)
        # Of the layer in float16, whose largest number 65,504 sums some thousand targets: rounded when scaled.
        of_layer = wide if hidden_ND.dtype == torch.float16 else hidden_ND.dtype
        ctx.dtype = hidden_ND.dtype
        kept = ((ghidden_ND, hidden_ND.dtype), (gweight_VD, of_layer), (gbias_V, of_layer))
        ctx.save_for_backward(*(None if grad is None else grad.to(dtype) for grad, dtype in kept))
        ctx.mark_non_differentiable(found_N)
        return total, found_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        found = (None if saved is None else _times(saved, grad).to(ctx.dtype) for saved in ctx.saved_tensors)
        return *found, None, None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 — autograd.Function takes positional arguments only
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        output: OutputLayer,
        temperature: float,
    ) -> Tensor:
        ctx.output, ctx.needs, ctx.temperature = output, ctx.needs_input_grad[:3], temperature
        needs_hidden, *needs_layer = ctx.needs
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        found_N = hidden_ND.new_empty(len(targets_N), dtype=wide)
        ghidden_ND = torch.empty_like(hidden_ND) if needs_hidden and not any(needs_layer) else None

        def of_piece(logits_NV: Tensor, here: slice) -> tuple[Tensor, Tensor]:
            return _losses_and_gradient(logits_NV, targets_N[here], smoothing=0, z=0)

        for here in output.chunks(len(targets_N), trained=False):
            losses_N, glogits_NV = _of_chunk(hidden_ND[here], here, output, of_piece, temperature=temperature)
            found_N[here] = -losses_N
            if ghidden_ND is not None:
                torch.mm(glogits_NV, weight_VD, out=ghidden_ND[here])
        kept = (hidden_ND, weight_VD, targets_N) if any(needs_layer) else (ghidden_ND, None, None)
        ctx.save_for_backward(*kept)
        return found_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> Any:
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        output, (needs_hidden, needs_weight, needs_bias) = ctx.output, ctx.needs
        if weight_VD is None:  # what is kept is the gradient of each target's loss
            return (hidden_ND * -grad_N[:, None]).to(hidden_ND.dtype), None, None, None, None, None
        ghidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        gweight_VD = torch.zeros_like(weight_VD, dtype=grad_N.dtype) if needs_weight else None
        gbias_V = grad_N.new_zeros(len(weight_VD)) if needs_bias else None
        for here in output.chunks(len(targets_N), trained=needs_weight):
            logits_NV = output.logits(hidden_ND[here])
            glogits_NV = torch.softmax(logits_NV.to(grad_N.dtype) / ctx.temperature, -1).mul_(-grad_N[here, None])
            glogits_NV.scatter_add_(1, targets_N[here, None], grad_N[here, None])
            glogits_NV = glogits_NV if ctx.temperature == 1 else glogits_NV / ctx.temperature
            glogits_NV = _before_scale(glogits_NV.to(hidden_ND.dtype), logits_NV, output)
            if ghidden_ND is not None:
                torch.mm(glogits_NV, weight_VD, out=ghidden_ND[here])
            if gweight_VD is not None:
                gweight_VD += _summed(glogits_NV, hidden_ND[here])
            if gbias_V is not None:
                gbias_V += glogits_NV.sum(0)
        gweight_VD = None if gweight_VD is None else gweight_VD.to(weight_VD.dtype)
        return ghidden_ND, gweight_VD, None if gbias_V is None else gbias_V.to(weight_VD.dtype), None, None, None


def _summed(glogits_NV: Tensor, hidden_ND: Tensor) -> Tensor:
    """[V, D], the sum over the targets of a chunk; in float16 divided by their number before it is rounded."""
    if hidden_ND.dtype != torch.float16:
        return glogits_NV.t() @ hidden_ND
    mean_VD = torch.addmm(hidden_ND.new_zeros(()), glogits_NV.t(), hidden_ND, beta=0, alpha=1 / len(hidden_ND))
    return mean_VD.float() * len(hidden_ND)


def _times(saved: Tensor, factor: Tensor) -> Tensor:
    """saved · factor in float32, rounded once: a factor in bfloat16 would scale all gradients by up to 2^-9."""
    if factor.device.type == "cpu":  # torch's products with one number on a processor do just that
        return saved * factor
    return (saved.to(factor) * factor).to(saved.dtype)


def _of_chunk(
    hidden_ND: Tensor, here: slice, output: OutputLayer, of_piece: OfPiece, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """[N], the losses of the targets `here`, and [N, V], the gradient of the linear layer's
    output, in `hidden_ND`'s precision."""
    logits_NV = output.logits(hidden_ND)
    capped_NV = None if output.cap is None else logits_NV
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32), copy=capped_NV is not None)
    logits_NV = logits_NV if temperature == 1 else logits_NV / temperature
    losses_N, glogits_NV = of_piece(logits_NV, here)
    glogits_NV = glogits_NV if temperature == 1 else glogits_NV / temperature
    return losses_N, _before_scale(glogits_NV.to(hidden_ND.dtype), capped_NV, output)


def _losses_and_gradient(logits_NV: Tensor, targets_N: Tensor, *, smoothing: float, z: float) -> tuple[Tensor, Tensor]:
    """[N], the losses, and [N, V], the gradient of each; on a processor in the memory of the logits."""
    picked_N1 = targets_N[:, None]
    largest_N = logits_NV.amax(-1)
    at_target_N = logits_NV.gather(1, picked_N1)[:, 0]
    mean_N = logits_NV.mean(-1) if smoothing else 0
    p_NV = torch.softmax(logits_NV, -1, out=logits_NV if logits_NV.device.type == "cpu" else None)
    # The largest p is exp(largest − lse), at least 1 / V: its logarithm loses nothing.
    lse_N = largest_N - p_NV.amax(-1).log()
    losses_N = lse_N - at_target_N
    if smoothing:
        losses_N = (1 - smoothing) * losses_N + smoothing * (lse_N - mean_N)
    if z:
        losses_N = losses_N + z * lse_N.square()
        p_NV.mul_(1 + 2 * z * lse_N[:, None])
    if smoothing:
        p_NV.sub_(smoothing / p_NV.shape[1])
    p_NV.scatter_add_(1, picked_N1, torch.full_like(at_target_N, smoothing - 1)[:, None])
    return losses_N, p_NV


def _before_scale(glogits_NV: Tensor, logits_NV: Tensor | None, output: OutputLayer) -> Tensor:
    """The gradient of the linear layer's output, from the logits' own, which are needed if they are capped."""
    if output.cap is not None and logits_NV is not None:
        glogits_NV = glogits_NV * (1 - (logits_NV / output.cap).square())
    if output.scale != 1:
        glogits_NV = glogits_NV / output.scale if output.divides else glogits_NV * output.scale
    return glogits_NV
