"""Predicted time: what a pass computes and moves, over what the machine reached a moment ago.

    seconds of a pass = Σ products, each as it was tried + bytes moved / bandwidth + bytes made anew / fresh
                        + number of operations · launch

A product that was not tried counts max(operations / reached, bytes / bandwidth), the roofline of Williams, Waterman &
Patterson 2009.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tunesmith.planning.devices import Device
from tunesmith.planning.sketch import Kept
from tunesmith.planning.tracing import Product, Segment
from tunesmith.planning.trying import Tried

DECODE_LAUNCH = 20e-6
"""Seconds of one small operation while an answer is written."""
SPREAD = 0.3
"""Of a total by formula alone, either way."""


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds."""

    step: float
    """Of a mean step."""
    training: float
    """All steps."""
    looking: float
    """Measuring held-out rows before and after, and on the way; looking for surprising rows; the general text."""
    answering: float = 0.0
    """Prompts before and after, where every answer is as long as it may be."""
    saving: float = 0.0
    """Checkpoints. By formula: nothing."""
    starting: float = 0.0
    """Loading the model, and asking it what it can do. By formula: nothing."""
    look: float = 0.0
    """Of the pass over held-out rows that has most targets."""
    words: int = 0
    """Tokens that are written one after the other in `answering`."""
    saves: int = 0
    """Checkpoints."""
    spread: float = SPREAD
    """Share by which the truth may be off either way."""

    @property
    def total(self) -> float:
        return self.training + self.looking + self.answering + self.saving + self.starting


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
