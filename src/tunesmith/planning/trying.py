"""What the products of a pass take on this machine: each tried by itself, those that cost most first.

Peak figures say little of it: on one processor, in bfloat16, a product reaches from a fifth to all of what the best
shape does, and attention a tenth.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tunesmith.planning.tracing import Call, Operand, Product, Segment

BUDGET = 2.0
"""Seconds for all products of a plan; what is not tried by then counts by the roofline."""
TURNS, TURNS_S = 3, 0.1
"""Most turns of one product after the first, which may compile, and seconds after which none is begun."""
LARGEST = 2**30
"""Bytes of a product that is not tried: the memory is the run's."""


class Tried:
    """Seconds of products, kept for the plans that are made one after the other."""

    def __init__(self, device: str, *, threads: int) -> None:
        self._device, self._threads = device, threads
        self._left = BUDGET
        self._seconds: dict[Product, float] = {}
        self._untried: set[Product] = set()
        self.refused: set[str] = set()
        """Names of the operations that the device cannot run: their time is an estimate."""

    def look(self, segments: Iterable[Segment]) -> None:
        """Try what a pass consists of, as far as there is time."""
        times: Counter[Product] = sum((segment.products for segment in segments), Counter())
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            for product in sorted(times, key=lambda one: -one.flops * times[one]):
                is_done = product in self._seconds or product in self._untried
                if is_done or product.num_bytes > LARGEST or self._left <= 0:
                    continue
                begun = time.perf_counter()
                try:
                    self._seconds[product] = self._try(product.call)
                except RuntimeError:  # NotImplementedError is one: no kernel for this device, or no memory for it
                    self._untried.add(product)
                    self.refused.add(_name(product.call))
                self._left -= time.perf_counter() - begun
        finally:
            torch.set_num_threads(before)

    def seconds(self, product: Product) -> float | None:
        """None: it was not tried."""
        return self._seconds.get(product)

    @torch.no_grad()
    def _try(self, call: Call) -> float:
        args, kwargs = _placed(call.args, self._device), dict(_placed(call.kwargs, self._device))
        best, spent = float("inf"), 0.0
        call.func(*args, **kwargs)
        for _ in range(TURNS):
            took = stopwatch(lambda: call.func(*args, **kwargs), self._device)
            best, spent = min(best, took), spent + took
            if spent > TURNS_S:
                break
        return best


def _name(call: Call) -> str:
    """Without the word for the device that the operation was traced on."""
    packet = getattr(call.func, "overloadpacket", call.func)
    return str(getattr(packet, "__name__", packet)).strip("_").replace("_for_cpu", "")


def stopwatch(do: Callable[[], Any], device: str) -> float:
    """Seconds that go by. The best of several is what a machine can do whose other work comes and goes; time of the
    processor alone would leave out threads that wait for each other."""
    is_cpu = torch.device(device).type == "cpu"
    if not is_cpu:
        torch.accelerator.synchronize()
    begun = time.perf_counter()
    do()
    if not is_cpu:
        torch.accelerator.synchronize()
    return time.perf_counter() - begun


def _placed(spec: Any, device: str) -> Any:
    """What a call was given, with tensors of small numbers where it had some, and the device that is asked about."""
    if isinstance(spec, Operand):
        made = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=device)
        return made.fill_(0.01) if spec.dtype.is_floating_point else made.zero_()
    if isinstance(spec, torch.device):
        return torch.device(device)
    return [_placed(one, device) for one in spec] if isinstance(spec, tuple) else spec
