"""Predicted time: what a pass computes and moves, over what the machine reached a moment ago.

    seconds of a pass = Σ products, each as it was tried + bytes moved / bandwidth + bytes made anew / fresh
                        + number of operations · launch

A product that was not tried counts max(operations / reached, bytes / bandwidth), the roofline of Williams, Waterman &
Patterson 2009.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from tunesmith.planning.devices import Device
from tunesmith.planning.sketch import Kept
from tunesmith.planning.tracing import Product, Segment
from tunesmith.planning.trying import Tried

DECODE_LAUNCH = 20e-6
"""Seconds of one small operation while an answer is written."""
STARTING_S = 12.0
"""By formula, on a processor of two cores: the libraries and the tokenizer imported, rows found, the plan made."""
LOADED = 100e6
"""Bytes of weights a second that are read, unpacked and hashed, by formula."""
WRITTEN = 300e6
"""Bytes a second that are written for good, by formula."""
FINISHING_S = 4.0
"""By formula, on a processor of two cores: the libraries that draw imported, the report drawn, the process ended."""


@dataclass(frozen=True, slots=True)
class Looking:
    """Seconds of a pass that measures rows: those of its layers go by the token, those of its head by the target."""

    token: float
    target: float

    def price(self, targets: float, tokens: float) -> float:
        """Of a token of rows that have so many targets in so many tokens."""
        return self.token + self.target * targets / tokens if tokens else 0.0


def looking(
    segments: Sequence[Segment], device: Device, dtype: torch.dtype, tried: Tried | None, *, tokens: int, targets: int
) -> Looking:
    """Of the whole model's pass over so many tokens with so many targets."""
    last = max((i for i, segment in enumerate(segments) if segment.place[0] == "forward"), default=len(segments) - 1)
    body, head = segments[: last + 1], segments[last + 1 :]
    return Looking(
        token=pass_seconds(body, device, dtype, tried) / tokens,
        target=pass_seconds(head, device, dtype, tried) / max(1, targets),
    )


def pass_seconds(segments: Iterable[Segment], device: Device, dtype: torch.dtype, tried: Tried | None) -> float:
    """What one pass takes on a device whose products were measured in `dtype`; others take by the width. `tried`:
    products that were tried there."""

    def of(product: Product) -> float:
        if tried is not None and (seconds := tried.seconds(product)) is not None:
            return seconds
        reached = device.products * dtype.itemsize / product.dtype.itemsize
        return max(product.flops / reached, product.num_bytes / device.bandwidth)

    total = 0.0
    for segment in segments:
        total += sum(times * of(product) for product, times in segment.products.items())
        total += (segment.moved - segment.fresh) / device.bandwidth + segment.fresh / device.fresh
        total += segment.num_ops * device.launch
    return total


def word_seconds(segments: Iterable[Segment], kept: Kept, device: Device) -> float:
    """Of the next token of some answers: every weight is read, and every operation started."""
    return kept.weights / device.bandwidth + DECODE_LAUNCH * sum(segment.num_ops for segment in segments)


def update_seconds(kept: Kept, device: Device) -> float:
    """Gradient, weight and state read, weight and state written, and the copy that computes."""
    trained = 4 * kept.trained_parameters
    return (3 * trained + 2 * kept.optimizer + 1.5 * kept.masters) / device.bandwidth


def starting_seconds(kept: Kept) -> float:
    """Of the libraries, the plan and the weights."""
    return STARTING_S + kept.weights / LOADED


def finishing_seconds(result_bytes: int) -> float:
    """Of the result, which is written twice, and the report."""
    return FINISHING_S + 2 * result_bytes / WRITTEN
