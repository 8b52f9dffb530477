"""A prompt that peft loaded, asked by peft's own forward: what ours is held against."""

# B rows, T tokens, P virtual tokens, N targets, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.render import Renderer
from tunesmith.export.asked import Asked, Loaded, TorchAsked, greedy
from tunesmith.models.modes import eval_mode
from tunesmith.types import Batch


@dataclass(frozen=True)
class PromptAsked(TorchAsked):
    """peft's model around a model of transformers, which hands on what it says of the virtual tokens too."""

    wrapped: Any = None

    def logits(self, batch: Batch) -> Tensor:
        logits_BTV = self._logits(input_ids=batch.ids_BT, attention_mask=batch.mask_BT)
        num_tokens = batch.ids_BT.shape[1]
        return logits_BTV[:, -num_tokens:].flatten(0, 1)[batch.predict_N].float().cpu()

    def answers(self, renderer: Renderer, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[str]:
        def next_v(ids: list[int]) -> Tensor:
            ids_1t = torch.tensor([ids], device=self.device)
            return self._logits(input_ids=ids_1t, attention_mask=torch.ones_like(ids_1t))[0, -1]

        return [greedy(next_v, renderer, prompt, num_tokens=num_tokens) for prompt in prompts]

    def _logits(self, **given: Any) -> Tensor:
        with eval_mode(self.wrapped):
            logits: Tensor = self.wrapped(**given).logits
        return logits


@dataclass(frozen=True)
class PromptLoaded(Loaded):
    """A prompt on its base."""

    wrapped: Any = None

    def asked(self, renderer: Renderer) -> Asked:
        return PromptAsked(self.model, renderer, self.head, wrapped=self.wrapped)
