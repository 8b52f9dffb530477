"""Answers from a model: prompts rendered by the code that rendered the training rows, greedy unless asked otherwise."""

# B prompts, T tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from tunesmith.data.render import Renderer
from tunesmith.models import rope
from tunesmith.models.modes import evaluating
from tunesmith.tasks import TASKS


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy: the most likely token."""
    top_p: float = 1.0

    def config(self, *, stop_ids: Sequence[int], pad_id: int) -> GenerationConfig:
        """Everything said outright, so that nothing left in the model's own generation config can change an answer."""
        chosen: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=pad_id,
            use_cache=True,
            **chosen,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote, and whether it came to an end by itself."""

    text: str
    stopped: bool
    """False: cut off at max_new_tokens."""


def answer(model: PreTrainedModel, renderer: Renderer, prompts: Sequence[Sequence[int]], how: Sampling) -> list[Answer]:
    """One answer a prompt, all decoded together and each equal to its answer alone.

    Prompts end at the same place, where the answer goes on; an encoder–decoder writes apart from them, so its sources
    begin at the same place, where BART and its like begin to count.
    """
    longest = max(map(len, prompts))
    if len(prompts) > 1 and rope.why(model.config, longest + how.max_new_tokens):
        return [one for prompt in prompts for one in answer(model, renderer, [prompt], how)]
    apart = model.config.is_encoder_decoder
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if apart else slice(longest - len(prompt), longest)
        ids_BT[b, place] = torch.tensor(prompt)
        mask_BT[b, place] = 1
    out_BT = _generate(model, renderer, how, ids_BT, mask_BT)
    return [
        read_answer(renderer, [] if apart else prompt, row[1 if apart else longest :].tolist())
        for prompt, row in zip(prompts, out_BT, strict=True)
    ]


def _generate(model: PreTrainedModel, renderer: Renderer, how: Sampling, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Prompt and answer, [B, T]; of an encoder–decoder its start token and the answer."""
    # Padding follows an end only: where nothing ends an answer, no answer is padded, whatever its id.
    config = how.config(stop_ids=renderer.stop_ids, pad_id=(*renderer.stop_ids, 0)[0])
    config.decoder_start_token_id = getattr(model.config, "decoder_start_token_id", None)
    with evaluating(model), _without_own_config(model), _head_reads_rows(model):
        out_BT: Tensor = model.generate(
            ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), generation_config=config
        )
    return out_BT


@contextmanager
def _head_reads_rows(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the output layer is given the last tokens of prompts as a matrix of their own.

    They are a slice of all tokens, and for a slice torch's matmul copies the layer's weights once for each prompt:
    54 MiB each for SmolLM2, a GiB for 128,256 tokens of size 4,096.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _without_own_config(model: PreTrainedModel) -> Iterator[None]:
    # transformers fills what a config leaves open from the model's own: a repetition penalty would not be greedy.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def as_answer(renderer: Renderer, text: str) -> str:
    """What was written, as it is given: white space around a completion is its own, around other answers it is not."""
    return text if TASKS[renderer.task_name].raw_text else text.strip()


def read_answer(renderer: Renderer, before: Sequence[int], ids: list[int]) -> Answer:
    """Tokens that were written, as text. `before`: what the answer goes on from, of which some tokenizers make the
    white space that it begins with."""
    end = next((i for i, token_id in enumerate(ids) if token_id in renderer.stop_ids), None)
    asked, whole = (
        renderer.tokenizer.decode([*before, *written], skip_special_tokens=True) for written in ([], ids[:end])
    )
    if not whole.startswith(asked):
        asked, whole = "", renderer.tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Answer(text=as_answer(renderer, whole[len(asked) :]), stopped=end is not None)
