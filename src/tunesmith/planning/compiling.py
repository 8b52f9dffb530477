"""What a processor's libraries compile and keep of matrix products, in bytes and in seconds.

In bfloat16 every product of a new shape is compiled, and kept by two caches. In float32 nothing is,
but operands are copied into buffers that stay. Measured in docs/EXPERIMENTS.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.sampler import MicroBatch, StepSampler, padded_size
from tunesmith.planning.tracing import Segment

COMPILED = 650 * 1024
"""Bytes that are kept of each product."""
COMPILE_SECONDS = 3e-3
"""To compile one, and to fetch its code for the first time."""
MOST_KEPT = 1024
"""Products that are kept where the environment does not say."""
MOST_COPIED = 64 * 2**20
"""Bytes of the buffers for operands in float32, at most."""
FEW_STEPS = 5
MANY_STEPS = 64
"""After which every cache is full."""
PASSES_BEFORE = 5
"""In which a run asks the model, before the first step, whether rows can be packed and products computed together."""


@dataclass(frozen=True, slots=True)
class Compiling:
    """Over a run."""

    kept: int
    """Bytes, at the most."""
    seconds: float = 0.0
    """Of a mean step."""
    later: int = 0
    """Of `kept`, what comes after the first FEW_STEPS steps, which a probe takes too."""


def in_bfloat16(
    plan: StepSampler,
    steps: int,
    segments: Iterable[Segment],
    looking: Iterable[Segment],
    *,
    lengths_R: NDArray[np.int32],
) -> Compiling:
    """For a run of which one pass of training rows and one of held-out rows is known. `lengths_R`: of the former.

    Products of matrices are compiled once for each number of tokens that a pass has, and attention for each length of
    rows, if all that is needed between is kept so long. Numbers of tokens come again where passes are filled up.
    """
    matrices, attention = _counts(segments)
    attention_a_length = attention / len(np.unique(lengths_R))
    passes = [plan.step(number) for number in range(1, min(steps, MANY_STEPS) + 1)]
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    most = max(int(os.environ.get(name, MOST_KEPT)) for name in names)
    looks = _counts(looking)[0] * PASSES_BEFORE

    def of_attention(first: int) -> float:
        seen = {length for rows in passes[:first] for one in rows for length in plan.lengths_of(one)}
        return attention_a_length * len(seen)

    sizes = [[_size(plan, rows) for rows in some] for some in passes]

    def kept(first: int) -> int:
        different = len({size for some in sizes[:first] for size in some})
        return int(COMPILED * min(most, matrices * different + of_attention(first) + looks))

    a_step = sum(map(len, passes)) / len(passes)
    every_length = of_attention(MANY_STEPS)
    anew = attention if every_length > most / 2 else min(attention, every_length / (a_step * steps))
    room = int(most / max(1, matrices + anew))
    new, again = _compiled([size for some in sizes for size in some], room)
    # Sizes that are not kept are met for the first time again and again, also behind the steps that were looked at.
    products = matrices * (new / (steps if new <= room else len(passes)) + again / len(passes)) + anew * a_step
    return Compiling(kept(MANY_STEPS), products * COMPILE_SECONDS, later=kept(MANY_STEPS) - kept(FEW_STEPS))


def _size(plan: StepSampler, rows: MicroBatch) -> int:
    num = plan.computed(rows)
    return padded_size(num) if plan.layout == "packed" else num


def _compiled(sizes: Sequence[int], room: int) -> tuple[int, int]:
    """(how many sizes there are, how often one comes again whose products are no longer kept), where those of `room`
    sizes are kept, the ones that were used last."""
    kept: list[int] = []
    seen: set[int] = set()
    again = 0
    for size in sizes:
        if size in kept:
            kept.remove(size)
        elif size in seen:
            again += 1
        seen.add(size)
        kept = [*kept, size][-max(1, room) :]
    return len(seen), again


def in_float32(segments: Iterable[Segment]) -> Compiling:
    """As much as the largest product reads and writes."""
    products = (one.num_bytes for segment in segments for one in segment.products if one.dtype == torch.float32)
    return Compiling(min(MOST_COPIED, max(products, default=0)))


def _counts(segments: Iterable[Segment]) -> tuple[int, int]:
    """What one pass has compiled: products of matrices, and those of attention to rows of a new length."""
    found = {one.call: one.kernels for segment in segments for one in segment.products if one.dtype == torch.bfloat16}
    return sum(num == 1 for num in found.values()), sum(num for num in found.values() if num > 1)
