"""float32 masters of the tensors that a model computes with.

An update of relative size 1e-3 is lost in bfloat16, whose neighbours lie 2^-8 apart, so what is trained lives in
float32 and the model computes with a copy that is rounded once an update. A tensor that is float32 already is its own
master: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class Masters:
    """The float32 side of named parameters, in the order given."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, free_early: bool) -> None:
        """`free_early` takes every gradient off its parameter inside the backward, so that never all of them exist in
        both widths: what full tuning needs; for a few small tensors one sweep after the backward is cheaper."""
        self.trained: dict[str, Tensor] = {}
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            if parameter.dtype == torch.float32:
                self.trained[name] = parameter
                continue
            master = parameter.detach().float().requires_grad_(True)
            self.trained[name] = master
            self._pairs.append((parameter, master))
            if free_early:
                hook = parameter.register_post_accumulate_grad_hook(_taking_into(master))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    def collect(self) -> None:
        """Add the gradients of the computing copies to those of the masters, in float32, and drop them."""
        for parameter, master in self._pairs:
            _take(parameter, master)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the computing copies."""
        for parameter, master in self._pairs:
            parameter.copy_(master)

    def release(self) -> None:
        """Take the hooks off: the parameters are on their own again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _taking_into(master: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        _take(parameter, master)

    return hook


def _take(parameter: Tensor, master: Tensor) -> None:
    if parameter.grad is None:
        return
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None
