"""Answers from a model: prompts rendered by the code that rendered the training rows, greedy unless asked otherwise."""

# B prompts, T tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from tunesmith.data.render import Renderer
from tunesmith.models.modes import evaluating
from tunesmith.types import Part


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
            eos_token_id=list(stop_ids),
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
    """One answer a prompt, all decoded together. Prompts are padded on the left, so each equals its answer alone."""
    longest = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        ids_BT[b, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[b, longest - len(prompt) :] = 1
    config = how.config(stop_ids=renderer.stop_ids, pad_id=renderer.stop_ids[0])
    with evaluating(model), _without_own_config(model):
        out_BT = model.generate(
            ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), generation_config=config
        )
    return [_answer(renderer, row[longest:].tolist()) for row in out_BT]


def stream(model: PreTrainedModel, renderer: Renderer, parts: Sequence[Part], how: Sampling) -> Iterator[str]:
    """The answer to a conversation, piece by piece as it is written. Closing the iterator ends the generation."""
    prompt = torch.tensor([renderer.prompt_ids(parts)], device=model.device)
    streamer = TextIteratorStreamer(renderer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    config = how.config(stop_ids=renderer.stop_ids, pad_id=renderer.stop_ids[0])
    left = _Left()

    def write() -> None:
        try:
            with evaluating(model), _without_own_config(model):
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([left]),
                )
        except BaseException as error:
            left.error = error
        finally:
            streamer.end()

    worker = Thread(target=write, daemon=True)
    worker.start()
    try:
        yield from streamer
    finally:
        left.asked = True
        worker.join()
    if left.error is not None:
        raise left.error


@contextmanager
def _without_own_config(model: PreTrainedModel) -> Iterator[None]:
    # transformers fills what a config leaves open from the model's own: a repetition penalty would not be greedy.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Left(StoppingCriteria):  # type: ignore[misc]
    """Stops the generation of a reader who has gone away, and carries what went wrong over to his thread."""

    def __init__(self) -> None:
        self.asked = False
        self.error: BaseException | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device)


def _answer(renderer: Renderer, ids: list[int]) -> Answer:
    end = next((i for i, token_id in enumerate(ids) if token_id in renderer.stop_ids), None)
    text = renderer.tokenizer.decode(ids if end is None else ids[:end], skip_special_tokens=True)
    return Answer(text=text.strip(), stopped=end is not None)
