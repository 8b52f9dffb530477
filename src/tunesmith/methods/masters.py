"""float32 masters of the tensors that a model computes with.

An update of relative size 1e-3 is lost in bfloat16, whose neighbours lie 2^-8 apart, so what is trained lives in
float32 and the model computes with a copy that is rounded once an update. A tensor that is float32 already is its own
master: nothing is copied.

Where in its cell a master begins. A value of bfloat16 stands for a cell of float32 values that round to it. If all
masters began in the middle of their cells, the first updates of full tuning, whose rates are small, would be
invisible to the forward pass: none is half a cell. So they begin anywhere in their cells, drawn evenly. The model
computes with the same bits as before, and from then on a fitting share of weights crosses over with every update:
rounding to the nearest loses nothing on average, as with the dither of signal processing (Schuchman, "Dither Signals
and Their Effect on Quantization Noise", IEEE Transactions on Communication Technology 12(4), 1964).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake


class Masters:
    """The float32 side of named parameters, in the order given."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, free_early: bool, spread: int | None = None) -> None:
        """`spread`: the seed of where in its cell each master begins; None: in the middle.
        `free_early` takes every gradient off its parameter inside the backward, so that never all of them exist in
        both widths: what full tuning needs; for a few small tensors one sweep after the backward is cheaper."""
        self.trained: dict[str, Tensor] = {}
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        draws: dict[torch.device, torch.Generator] = {}
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            if parameter.dtype == torch.float32:
                self.trained[name] = parameter
                continue
            master = parameter.detach().float()
            if spread is not None and not is_fake(master):
                device = master.device
                spread_in_cells(master, draws.setdefault(device, torch.Generator(device).manual_seed(spread)))
            master.requires_grad_(True)
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


def spread_in_cells(values: Tensor, generator: torch.Generator) -> None:
    """Move float32 `values`, each one that bfloat16 has, in place to anywhere that bfloat16 rounds to the same value.

    The bits of a float32, read as a whole number, grow with its size; bfloat16 keeps the upper 16 of them, so a cell is
    all that lies less than 2^15 away. Zeros stay: their neighbours are as close as float32 can tell;
    so does what is not finite.
    """
    offsets = torch.empty(values.shape, dtype=torch.int16, device=values.device)
    offsets.random_(-0x7FFF, 0x8000, generator=generator)
    offsets.masked_fill_((values == 0) | ~values.isfinite(), 0)
    values.view(torch.int32).add_(offsets)


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
