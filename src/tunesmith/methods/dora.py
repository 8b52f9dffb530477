"""DoRA: LoRA that turns each row of a weight, and a vector that says how long the row is.

    y = m / ‖V‖ ⊙ (x Vᵀ) + b,  V = W + s B A,  ‖V‖ the length of each row of V (of each output)

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equation 5. ‖V‖ is a constant to the
gradient, as in section 4.3, so it changes with the matrices alone: it is computed once an update.
"""

# I inputs, O outputs, R rank

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.methods.lora_layer import LoraLinear


class DoraLinear(LoraLinear):
    """A frozen linear layer with a low-rank path and a length for each output."""

    def __init__(self, base: nn.Module, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base, rank=rank, scale=scale, dropout=dropout)
        # In float32 whatever the model computes in: a length is near to its row's, which bfloat16 could not tell apart.
        self.lora_magnitude_vector = nn.Parameter(self._length_O())
        self.norm_O = self.lora_magnitude_vector.detach().clone()
        """‖V‖, float32, of the matrices that compute."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        out = super().forward(x)
        if not self.active:
            return out
        factor_O = self.lora_magnitude_vector / self.norm_O
        scaled = out * factor_O
        if self.bias_O is not None:
            # The bias went through the factor too. Added apart it would round otherwise than in the untouched layer.
            scaled = scaled + self.bias_O * (1.0 - factor_O)
        return scaled.to(out.dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        self.norm_O = self._length_O()

    @torch.no_grad()
    def measure(self) -> None:
        """Take the lengths that the rows have now for those to be trained: outputs are those of V alone."""
        self.refresh()
        self.lora_magnitude_vector.copy_(self.norm_O)

    def _length_O(self) -> Tensor:
        with torch.no_grad():
            return _length_O(super().merged_OI(self.lora_A, self.lora_B))

    def merged_OI(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """The weight that alone does what base, path and lengths do together, float32."""
        v_OI = super().merged_OI(a_RI, b_OR)
        return v_OI.mul_((self.lora_magnitude_vector.detach() / _length_O(v_OI))[:, None])


def _length_O(v_OI: Tensor) -> Tensor:
    length_O: Tensor = torch.linalg.vector_norm(v_OI, dim=1)
    return length_O
