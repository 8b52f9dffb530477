"""Prompt and prefix tuning: trained vectors before the tokens of every row, inside a model that hides them.

The model is called with T tokens and answers at T positions, so nothing outside of it knows the P virtual ones:

    embedded   P vectors before the embeddings [B, P + T, D]; their P outputs are cut off again
               (Lester et al. 2021, arXiv 2104.08691; Liu et al. 2021, arXiv 2103.10385)
    cached     keys and values of P tokens for every layer, as if they had been read before
               (Li & Liang 2021, arXiv 2101.00190)

Positions count the virtual tokens first, then the row's own tokens whatever padding precedes them.
"""

# B rows, T tokens, P virtual tokens, D width

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.models.segments import UnsupportedAttentionError


class VirtualTokens:
    """Hooks on the body of a causal model, whose outputs the output layer reads."""

    def __init__(self, body: nn.Module, *, num: int, prompt: Callable[[int], Any], is_cached: bool) -> None:
        """`prompt`: number of rows → vectors [B, P, D], or with `is_cached` a cache of transformers."""
        self.num = num
        self.active = True
        self._prompt = prompt
        self._is_cached = is_cached
        self._parameters = inspect.signature(type(body).forward).parameters
        self._added = False
        body.register_forward_pre_hook(self._enter, with_kwargs=True)
        body.register_forward_hook(self._leave)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the model without them inside the block."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def _enter(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._added = False
        if not self.active:
            return None
        given = {**dict(zip(self._parameters, (None, *args), strict=False)), **kwargs}
        given.pop("self", None)
        if given.get("segments") is not None or given.get("layout") is not None:
            raise UnsupportedAttentionError("virtual tokens precede each row, and packed rows have none")
        name = "cache" if "cache" in self._parameters else "past_key_values"
        cache, mask, positions = given.get(name), given.get("attention_mask"), given.get("position_ids")
        past = int(cache.get_seq_length()) if cache is not None else 0
        tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        num_rows, num_tokens = tokens.shape[:2]
        if positions is None and mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
        self._added = past == 0 and not self._is_cached
        if past == 0 and self._is_cached:
            given[name] = _joined(cache, self._prompt(num_rows))
        elif past == 0:
            embeds_BTD = given.get("inputs_embeds")
            if embeds_BTD is None:
                embeds_BTD = body.get_input_embeddings()(given.pop("input_ids"))  # type: ignore[operator]
            prompt_BPD = self._prompt(num_rows).to(embeds_BTD.dtype)
            given["inputs_embeds"] = torch.cat([prompt_BPD, embeds_BTD], dim=1)
        if mask is not None:
            given["attention_mask"] = torch.cat([mask.new_ones(num_rows, self.num), mask], dim=1)
        if positions is not None and "position_ids" in self._parameters:
            positions = positions + self.num
            if self._added:
                first_P = torch.arange(self.num, device=positions.device).expand(len(positions), -1)
                positions = torch.cat([first_P, positions], dim=1)
            given["position_ids"] = positions
        return (), given

    def _leave(self, body: nn.Module, args: Any, output: Any) -> Any:
        if not self._added:
            return None
        self._added = False
        hidden_BTD: Tensor = output[0]
        output[next(iter(output))] = hidden_BTD[:, self.num :]
        return output


def _joined(cache: Any, prompt: Any) -> Any:
    """The prompt's keys and values at the beginning of an empty cache; alone where there is none."""
    if cache is None:
        return prompt
    for index, layer in enumerate(prompt.layers):
        cache.update(layer.keys, layer.values, index)
    return cache
