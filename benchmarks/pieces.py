"""`python -m benchmarks.pieces`: small pieces of a step, as they are and in other ways that were tried.

Each way computes the same numbers, on random ones, forward and backward where that is said; medians of turns that the
ways of a piece take one after the other, in microseconds.
"""

# T tokens, H hidden size

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.measured import machine

Ways = Mapping[str, Callable[[], Any]]
WARM = 5


class Rotated(torch.autograd.Function):
    """x ∘ cos + half-turned x ∘ sin (Su et al. 2021, arXiv 2104.09864, equation 34) in one node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin, sign=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return turned(grad, *ctx.saved_tensors, sign=1), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=-sign)
    return out


def rotation(dtype: torch.dtype, tokens: int) -> Ways:
    """Of 9 query and 3 key heads of 64 numbers, forward and backward."""
    heads = [torch.randn(1, tokens, num, 64, dtype=dtype).transpose(1, 2).requires_grad_() for num in (9, 3)]
    grads = [torch.randn_like(head) for head in heads]
    angles = torch.randn(1, tokens, 32).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def own() -> list[Tensor]:
        return apply_rotary_pos_emb(*heads, cos, sin)

    def node() -> list[Tensor]:
        return [Rotated.apply(head, cos[:, None], sin[:, None]) for head in heads]

    return {
        name: lambda way=way: torch.autograd.grad(way(), heads, grads)
        for name, way in (("as it is", own), ("one node", node))
    }


def norm(dtype: torch.dtype, tokens: int) -> Ways:
    """The backward of an RMS norm of 576 numbers with regard to its input."""
    x, grad = (torch.randn(tokens, 576).to(dtype) for _ in range(2))
    weight_H, width = torch.rand(576).to(dtype), 576
    inverse_T1 = x.float().square().mean(-1, keepdim=True).add_(1e-5).rsqrt_()

    def through_normed() -> Tensor:
        normed, wide = x.to(torch.float32, copy=True).mul_(inverse_T1), (grad * weight_H).float()
        mean_T1 = torch.linalg.vecdot(wide, normed).unsqueeze(-1).div_(width)
        return (wide - normed.mul_(mean_T1)).mul_(inverse_T1).to(dtype)

    def by_coefficient() -> Tensor:
        wide_x, wide = x.to(torch.float32, copy=True), (grad * weight_H).to(torch.float32, copy=True)
        share_T1 = torch.linalg.vecdot(wide, wide_x).unsqueeze(-1).mul_(inverse_T1).mul_(inverse_T1).div_(-width)
        return wide.addcmul_(wide_x, share_T1).mul_(inverse_T1).to(dtype)

    return {"as it is": through_normed, "one coefficient a token": by_coefficient}


def softmax(dtype: torch.dtype, keys: int) -> Ways:
    """Of the scores of 2,880 queries."""
    scores = torch.randn(48, 60, keys).to(dtype)
    return {
        "as it is": lambda: torch.softmax(scores, -1),
        "in float32": lambda: torch.softmax(scores.float(), -1).to(dtype),
    }


def silu(dtype: torch.dtype, tokens: int) -> Ways:
    """SiLU and the gradient of its input, 1,536 numbers a token."""
    x, grad = (torch.randn(tokens, 1536).to(dtype) for _ in range(2))

    def one_sigmoid() -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x)
        value = x * gate
        return value, torch.addcmul(value, value, gate, value=-1).add_(gate).mul_(grad)

    return {
        "as it is": lambda: (F.silu(x), torch.ops.aten.silu_backward(grad, x)),
        "one sigmoid": one_sigmoid,
    }


PIECES: Mapping[str, Callable[[], Ways]] = {
    "rotation, bfloat16": lambda: rotation(torch.bfloat16, 640),
    "rotation, float32": lambda: rotation(torch.float32, 640),
    "RMS norm backward, bfloat16": lambda: norm(torch.bfloat16, 640),
    "softmax over 40 keys, bfloat16": lambda: softmax(torch.bfloat16, 40),
    "softmax over 64 keys, bfloat16": lambda: softmax(torch.bfloat16, 64),
    "SiLU and its gradient, bfloat16": lambda: silu(torch.bfloat16, 640),
}


def measure(ways: Ways, turns: int) -> dict[str, float]:
    """Median microseconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(WARM + turns):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn >= WARM:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) * 1e6 for name, found in seconds.items()}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pieces", description=__doc__)
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    print(f"{machine()['processor']}, {options.threads} threads, torch {torch.__version__.partition('+')[0]}\n")
    print("| piece | way | µs |\n|---|---|---:|")
    for piece, make in PIECES.items():
        for way, microseconds in measure(make(), options.turns).items():
            print(f"| {piece} | {way} | {microseconds:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
