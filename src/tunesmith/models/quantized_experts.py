"""Experts of a mixture kept in 4 bits, of which one is unpacked at a time.

The format is as in `quantized`, for each expert by itself: its blocks, the scales of
its blocks, and their mean.
"""

# E experts, O outputs, I inputs

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.models.experts import ExpertMatrix, ExpertParts
from tunesmith.models.quantized import BLOCK, pack, unpack


class QuantizedExperts(nn.Module):
    """Replaces the tensor of one product of all experts, see `experts.put_expert_layer`."""

    def __init__(self, base: ExpertMatrix, *, device: str | torch.device) -> None:
        """`base` stays as it is; each expert is packed on `device` and kept there. See `fits`."""
        super().__init__()
        weight = base.weight.detach()
        self.is_transposed = base.is_transposed
        self.shape_EOI = base.shape_EOI
        self.weight_shape, self.dtype = weight.shape, weight.dtype
        packed = [pack(matrix.to(device)) for matrix in weight]
        for name in packed[0]:
            self.register_buffer(name, torch.stack([of_expert[name] for of_expert in packed]))

    @property
    def device(self) -> torch.device:
        return self.get_buffer("packed").device

    @property
    def num_bytes(self) -> int:
        """Size of the packed experts and their scales."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def parts(self) -> ExpertParts:
        return ExpertParts(self)

    def matrix_OI(self, expert: int) -> Tensor:
        """One expert's matrix, in the precision of the original."""
        of_expert = {name: buffer[expert] for name, buffer in self.named_buffers()}
        matrix = unpack(of_expert, shape=self.weight_shape[1:], dtype=self.dtype)
        return matrix.t() if self.is_transposed else matrix

    @property
    def weight(self) -> Tensor:
        """All of them unpacked, in the shape of the original tensor."""
        weight_EOI = torch.stack([self.matrix_OI(expert) for expert in range(self.weight_shape[0])])
        return weight_EOI.mT if self.is_transposed else weight_EOI

    def unpacked(self) -> ExpertMatrix:
        """The plain layer, with the weight as it is now."""
        return ExpertMatrix(nn.Parameter(self.weight, requires_grad=False), is_transposed=self.is_transposed)


def fits(layer: ExpertMatrix) -> bool:
    """Whether the experts can be packed one by one: no block of scales reaches from one into the next."""
    return layer.weight[0].numel() % BLOCK == 0
