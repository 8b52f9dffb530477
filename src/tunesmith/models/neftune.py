"""NEFTune: noise on the embeddings, in training alone (Jain et al. 2023, arXiv 2310.05914, algorithm 1)."""

# B rows, T tokens of a line, L tokens of one row, D width

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.types import Batch

_SALT = 0x4E4546  # the loop seeds torch's own generator without it: dropout draws other numbers


@dataclass(frozen=True, slots=True)
class EmbeddingNoise:
    """Noise that depends on seed, step, row and copy alone: how a step is cut into micro-batches cannot change it."""

    alpha: float
    """0: no noise."""
    seed: int

    @contextmanager
    def on(self, model: PreTrainedModel, batch: Batch, step: int) -> Iterator[None]:
        """Add noise to the embeddings of every row of `batch`, scaled by its length; padding gets none."""
        if not self.alpha:
            yield
            return
        calls: list[bool] = []

        def add(module: Any, args: Any, output_BTD: Tensor) -> Tensor:
            calls.append(output_BTD.shape[:-1] == batch.ids_BT.shape)
            noise_BTD = self.noise(batch, step, width=output_BTD.shape[-1])
            return output_BTD + noise_BTD.to(output_BTD.dtype)

        with model.get_input_embeddings().register_forward_hook(add):
            yield
        if calls != [True]:
            raise ModelError(
                f"loss.neftune_alpha: {type(model).__name__} does not look its tokens up once a pass, so noise cannot "
                "be put on them. Leave it out."
            )

    def noise(self, batch: Batch, step: int, *, width: int) -> Tensor:
        """[B, T, D] float32, for each row uniform in ±alpha / √(L · D); 0 on padding and filling."""
        device = batch.ids_BT.device
        rows = [
            self._of_row(self._seed(step, index, copy), length, width, device)
            for index, copy, length in zip(
                batch.row_indices, batch.copies_B or (0,) * len(batch.lengths), batch.lengths, strict=True
            )
        ]
        if batch.layout == "packed":
            return torch.nn.functional.pad(torch.cat(rows), (0, 0, 0, batch.filling))[None]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _seed(self, step: int, index: int, copy: int) -> int:
        parts = (self.seed * 1_000_003, step * 0x9E3779B97F4A7C15, (index + 1) * 0xBF58476D1CE4E5B9, _SALT)
        return (sum(parts) + copy * 0x94D049BB133111EB) % 2**63

    def _of_row(self, seed: int, length: int, width: int, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        bound = self.alpha / (length * width) ** 0.5
        return torch.empty(length, width, device=device).uniform_(-bound, bound, generator=generator)
