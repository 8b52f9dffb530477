"""A model as the proof asks it, whoever computes it: what follows at the targets of a batch, and the greedy answers."""

# N targets, V vocabulary or classes

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.data.render import Renderer
from tunesmith.evaluation.generate import ANSWER_BATCH, Sampling, generate, read_answer
from tunesmith.inference.load import has_token_types
from tunesmith.models.forward import hidden_states, logits_at_targets, sequence_logits, token_logits
from tunesmith.models.load import model_kind
from tunesmith.models.modes import eval_mode
from tunesmith.models.pooling import PoolingKind, pool
from tunesmith.models.resolve_model import ModelRef
from tunesmith.recipe.schema import Recipe
from tunesmith.types import Batch, HeadName, ModelKind

Asks: TypeAlias = HeadName | Literal["vector"]
"""What is asked: what a head says, or of an encoder without one the vector of a text."""
_FORWARD = {
    "next_token": logits_at_targets, "masked_token": logits_at_targets, "sequence": sequence_logits,
    "tokens": token_logits,
}  # fmt: skip


class Asked(Protocol):
    """One model."""

    @property
    def has_types(self) -> bool:
        """Whether it tells the two texts of a pair apart by token types."""
        ...

    @property
    def decoder_start(self) -> int | None:
        """What the decoder of an encoder–decoder begins with."""
        ...

    @property
    def device(self) -> torch.device:
        """Where a batch has to lie."""
        ...

    def logits(self, batch: Batch) -> Tensor:
        """[N, V] float32 on the CPU, for a batch of one padded row; of vectors [1, D]."""
        ...

    def answers(self, renderer: Renderer, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[str]:
        """What follows each prompt, always the likeliest token."""
        ...

    def split(self, renderer: Renderer, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of plain texts."""
        ...

    def read(self, renderer: Renderer, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The tokens that it makes of the text of prompts."""
        ...


class ByRenderer:
    """Whoever has no tokenizer of its own."""

    def split(self, renderer: Renderer, texts: Sequence[str]) -> list[list[int]]:
        backend = renderer.tokenizer.backend_tokenizer
        return [list(one.ids) for one in backend.encode_batch(list(texts), add_special_tokens=False)]

    def read(self, renderer: Renderer, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        return [list(prompt) for prompt in prompts]


@dataclass(frozen=True)
class TorchAsked(ByRenderer):
    """A model of transformers."""

    model: PreTrainedModel
    renderer: Renderer
    head: Asks
    pooling: PoolingKind = "mean"
    """Of vectors."""

    @property
    def has_types(self) -> bool:
        return has_token_types(self.model, self.renderer.tokenizer)

    @property
    def decoder_start(self) -> int | None:
        return getattr(self.model.config, "decoder_start_token_id", None)

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    def logits(self, batch: Batch) -> Tensor:
        with eval_mode(self.model):
            if self.head != "vector":
                return _FORWARD[self.head](self.model, batch).float().cpu()
            hidden_1TD = hidden_states(self.model, batch).float().cpu()[None]
            return pool(hidden_1TD, torch.ones(hidden_1TD.shape[:2]), self.pooling)  # one row: no padding

    def answers(self, renderer: Renderer, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[str]:
        how = Sampling(max_new_tokens=num_tokens)
        texts: list[str] = []
        for start in range(0, len(prompts), ANSWER_BATCH):
            texts += [
                given.text for given in generate(self.model, renderer, prompts[start : start + ANSWER_BATCH], how)
            ]
        return texts


@dataclass(frozen=True)
class Loaded:
    """What was exported, ready to be asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    located: ModelRef
    head: Asks
    by: str
    """Whose code loaded it."""
    is_plain: bool = True
    """Whether the weights are those of a plain model, without an adapter beside them."""

    @property
    def kind(self) -> ModelKind:
        return model_kind(self.located)

    def asked(self, renderer: Renderer) -> Asked:
        return TorchAsked(self.model, renderer, self.head)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its name in a plain model; none where adapters stand beside them."""
        if self.is_plain:
            yield from self.model.state_dict().items()


def dtype_of(recipe: Recipe) -> torch.dtype:
    """What the run computed in: a difference is then one of weights."""
    found: torch.dtype = getattr(torch, recipe.precision)
    return found


def greedy(next_V: Callable[[list[int]], Tensor], renderer: Renderer, prompt: Sequence[int], *, num_tokens: int) -> str:
    """The likeliest token after a text, again and again, until one ends the answer. `next_V`: tokens → logits [V]."""
    ids: list[int] = []
    while len(ids) < num_tokens and not (ids and ids[-1] in renderer.stop_ids):
        ids.append(int(torch.argmax(next_V([*prompt, *ids]))))
    return read_answer(renderer, prompt, ids).text
