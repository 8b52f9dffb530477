"""float32 masters of the weights that a model computes with.

bfloat16 loses an update of relative size 1e-3, since its neighbours are 2^-8 apart. So trained weights are
float32, and the model computes with a copy that is rounded once an update. A float32 tensor is its own master.

A bfloat16 value stands for a cell of float32 values that round to it. Masters that all start in the middle of
their cells would hide the first small updates of full tuning from the forward pass. So with `spread` they start
anywhere in their cells, uniformly at random: the model computes with the same bits, and of every update a
fitting share of weights crosses over. Rounding to nearest then loses nothing on average, like dither in signal
processing (Schuchman, "Dither Signals and Their Effect on Quantization Noise", IEEE Transactions on
Communication Technology 12(4), 1964).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class MasterWeights:
    """Masters of named parameters, in the order given."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, free_early: bool, spread: int | None = None) -> None:
        """`spread`: a seed for the start of each master in its cell; None: the middle. `free_early` moves every
        gradient to its master inside the backward, so that never all exist in both widths, as full tuning
        needs; for a few small tensors one sweep after the backward is cheaper."""
        self.trained: dict[str, Tensor] = {}
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        generators: dict[torch.device, torch.Generator] = {}
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            if parameter.dtype == torch.float32 and not is_split(parameter):
                self.trained[name] = parameter
                continue
            master = _own(parameter).detach().float()
            if spread is not None and parameter.dtype == torch.bfloat16 and not master.is_meta:
                device = master.device
                generator = generators.setdefault(device, torch.Generator(device).manual_seed(spread))
                spread_in_cells(master, generator)
            master.requires_grad_(True)
            self.trained[name] = master
            self._pairs.append((parameter, master))
            if free_early:
                hook = parameter.register_post_accumulate_grad_hook(_MoveGradient(master))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    def collect(self) -> None:
        """Add the gradients of the copies to the masters', in float32, and drop them."""
        if self._pairs and _in_one_call(self._pairs[0][1]):
            _add_in_two_calls([pair for pair in self._pairs if pair[0].grad is not None])
            return
        for parameter, master in self._pairs:
            _MoveGradient(master)(parameter)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the copies."""
        if self._pairs and _in_one_call(self._pairs[0][1]):
            copies = [_own(parameter) for parameter, _ in self._pairs]
            torch._foreach_copy_(copies, [master for _, master in self._pairs])
            return
        for parameter, master in self._pairs:
            _own(parameter).copy_(master)

    def release(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def is_split(tensor: Tensor) -> bool:
    """Whether this process has only a piece of a tensor, see `parallel.fsdp`."""
    return hasattr(tensor, "to_local")


def _own(tensor: Tensor) -> Tensor:
    """The piece of a tensor that this process has, sharing its memory; a whole one as it is."""
    local: Tensor = tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]
    return local


def _in_one_call(tensor: Tensor) -> bool:
    """Whether many small tensors are worth one call: on CUDA, where each call is a kernel to start."""
    return tensor.device.type == "cuda"


@torch.no_grad()
def _add_in_two_calls(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Add gradients to the masters': grouped additions know one type, so they are widened before, all at once.
    A master without a gradient takes them as they are then."""
    if not pairs:
        return
    wide = [torch.empty(master.shape, dtype=master.dtype, device=master.device) for _, master in pairs]
    torch._foreach_copy_(wide, [_own(parameter.grad) for parameter, _ in pairs if parameter.grad is not None])
    totals = [master.grad for _, master in pairs if master.grad is not None]
    if totals:
        more = [gradient for gradient, (_, master) in zip(wide, pairs, strict=True) if master.grad is not None]
        torch._foreach_add_(totals, more)
    for gradient, (parameter, master) in zip(wide, pairs, strict=True):
        master.grad = gradient if master.grad is None else master.grad
        parameter.grad = None


class _MoveGradient:
    def __init__(self, master: Tensor) -> None:
        self.master = master

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        gradient = _own(parameter.grad)
        if self.master.grad is None:
            self.master.grad = gradient.float()
        else:
            self.master.grad.add_(gradient)
        parameter.grad = None


def spread_in_cells(values: Tensor, generator: torch.Generator) -> None:
    """Move float32 `values` that bfloat16 has, in place, to random ones that bfloat16 rounds to the same.

    As integers, the bits of float32 grow with its size, and bfloat16 keeps the upper 16: a cell is everything
    less than 2^15 away. Zeros, whose neighbours are as close as float32 resolves, and values that are not
    finite stay.
    """
    offsets = torch.empty(values.shape, dtype=torch.int16, device=values.device)
    offsets.random_(-0x7FFF, 0x8000, generator=generator)
    offsets.masked_fill_((values == 0) | ~values.isfinite(), 0)
    values.view(torch.int32).add_(offsets)
