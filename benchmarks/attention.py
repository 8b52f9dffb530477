"""`python -m benchmarks.attention`: ways of attending to short rows on CPU, forward and backward, in milliseconds.

All ways take turns in every round, so that a machine that slows down hits all alike. Printed is the median.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from torch import Tensor

from benchmarks.measured import machine, versions
from tunesmith.models import attention, grouped
from tunesmith.models.segments import Segments

LENGTHS = (16, 32, 64, 128, 256, 320, 384, 448, 512, 768, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--groups", type=int, default=3, help="heads of keys and values")
    parser.add_argument("--size", type=int, default=64, help="numbers a head")
    parser.add_argument("--tokens", type=int, default=1400, help="of all rows of a pass")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine()}; {', '.join(f'{name} {version}' for name, version in versions().items())}")
    print(f"{options}\n\n| rows × tokens | torch's kernel | grouped products | ratio |\n|---|---:|---:|---:|")
    for length in LENGTHS:
        rows = max(1, options.tokens // length)
        kernel, products = _times(rows, length, options)
        print(
            f"| {rows} × {length} | {kernel * 1e3:.1f} | {products * 1e3:.1f} | {kernel / products:.2f} |", flush=True
        )


def _times(rows: int, length: int, options: argparse.Namespace) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> Tensor:
        flat = torch.randn(1, rows * length, heads, options.size, generator=generator).bfloat16()
        return flat.transpose(1, 2).requires_grad_()

    qkv = drawn(options.heads), drawn(options.groups), drawn(options.groups)
    segments = Segments.of([length] * rows, device=torch.device("cpu"))
    seconds: dict[int, list[float]] = {0: [], length: []}
    """By the length up to which products are used."""
    for _ in range(options.rounds):
        for grouped.LONGEST, times in seconds.items():
            begun = time.perf_counter()
            out, _none = attention.ragged_attention(torch.nn.Module(), *qkv, None, segments=segments, is_causal=True)
            torch.autograd.grad(out, qkv, torch.ones_like(out))
            times.append(time.perf_counter() - begun)
    return median(seconds[0]), median(seconds[length])


if __name__ == "__main__":
    main()
