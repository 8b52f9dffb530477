"""A card that is not there: the functions of torch.cuda that `gpu_acceptance` calls, so that a processor walks through
every check of a card. It shows that the checks run and see what they look for, and nothing of a card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tunesmith.training import step

GIB = 2**30
TOKEN = 2**20
"""Bytes that a token of a micro-batch takes on the card that is not there."""


class FakeCard:
    """80 GiB, 1 of them held by a model; an earlier measurement took 3."""

    total, held = 80 * GIB, 1 * GIB

    def __init__(self) -> None:
        self.peak, self.share = 3 * GIB, 1.0

    def take(self, tokens: int) -> None:
        """Raises OutOfMemoryError where a micro-batch needs more than this process may have."""
        needed = self.held + tokens * TOKEN
        if needed > self.share * self.total:
            raise torch.OutOfMemoryError("CUDA out of memory, on a card that is not there.")
        self.peak = max(self.peak, needed)

    def functions(self) -> dict[str, Any]:
        """By name, as torch.cuda has them."""

        def reset(device: Any = None) -> None:
            self.peak = self.held

        def limit(share: float, device: Any = None) -> None:
            self.share = share

        def nothing(*given: Any, **how: Any) -> None:
            return

        found = SimpleNamespace(name="none (walked on a processor)", total_memory=self.total, uuid="")
        numbers: dict[str, Any] = {
            "max_memory_allocated": lambda: self.peak,
            "max_memory_reserved": lambda: self.peak,
            "memory_allocated": lambda: self.held,
            "get_device_name": lambda: found.name,
            "get_device_capability": lambda: (9, 0),
            "get_device_properties": lambda: found,
        }
        how = {name: lambda device=None, number=number: number() for name, number in numbers.items()}
        how |= {"reset_peak_memory_stats": reset, "set_per_process_memory_fraction": limit}
        return how | dict.fromkeys(("synchronize", "empty_cache", "set_sync_debug_mode"), nothing)


@contextmanager
def walking(device: str) -> Iterator[None]:
    """A block in which torch.cuda is that of a fake card, unless `device` is a card."""
    if device.startswith("cuda"):
        yield
        return
    card, compute = FakeCard(), step._pass

    def within_memory(state: Any, batch: Any, *given: Any) -> Any:
        card.take(batch.num_computed)
        return compute(state, batch, *given)

    with patch.multiple(torch.cuda, **card.functions()), patch.object(step, "_pass", within_memory):
        yield
