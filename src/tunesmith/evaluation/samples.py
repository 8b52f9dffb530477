"""Held-out prompts, answered so that a person can see the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from tunesmith.data.render import Renderer
from tunesmith.generation import Sampling, answer
from tunesmith.types import Example

ANSWERED_TOGETHER = 8
BEGINNING_TOKENS = 48
"""Of a document that is given to be gone on with."""


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A held-out row up to its last answer."""

    ids: tuple[int, ...]
    prompt: str
    """What a person reads: the last turn before the answer."""
    reference: str
    source: str


def sample_prompts(
    renderer: Renderer, examples: Sequence[Example], *, max_tokens: int, new_tokens: int
) -> list[SamplePrompt]:
    """The prompt of each example that has one of at most `max_tokens`: everything before its last trained part.

    Of a document that is its beginning, and the reference is how it goes on for `new_tokens`.
    """
    made = [
        _begun(renderer, example, new_tokens) if example.shape == "text" else _asked(renderer, example, max_tokens)
        for example in examples
    ]
    return [prompt for prompt in made if prompt is not None and 0 < len(prompt.ids) <= max_tokens]


def _asked(renderer: Renderer, example: Example, max_tokens: int) -> SamplePrompt | None:
    last = max((i for i, part in enumerate(example.parts) if part.trained), default=0)
    if last == 0:
        return None
    before = example.parts[:last]
    ids = tuple(renderer.prompt_ids(before, example.tools, max_tokens=max_tokens))
    return SamplePrompt(ids, before[-1].text, reference=example.parts[last].text, source=str(example.source))


def _begun(renderer: Renderer, example: Example, new_tokens: int) -> SamplePrompt | None:
    ids = tuple(renderer.prompt_ids(example.parts, ()))
    if len(ids) <= BEGINNING_TOKENS:
        return None
    begin, rest = ids[:BEGINNING_TOKENS], ids[BEGINNING_TOKENS : BEGINNING_TOKENS + new_tokens]
    begun, reference = (renderer.tokenizer.decode(some, skip_special_tokens=True) for some in (begin, rest))
    return SamplePrompt(begin, begun, reference=reference, source=str(example.source))


def answer_samples(
    model: PreTrainedModel,
    renderer: Renderer,
    prompts: Sequence[SamplePrompt],
    how: Sampling,
    tick: Callable[[str, int, int], None],
) -> Iterator[dict[str, Any]]:
    """The values of one "sample" event a prompt, in order."""
    for start in range(0, len(prompts), ANSWERED_TOGETHER):
        some = prompts[start : start + ANSWERED_TOGETHER]
        for sample, given in zip(some, answer(model, renderer, [s.ids for s in some], how), strict=True):
            yield {
                "prompt": sample.prompt,
                "reference": sample.reference,
                "answer": given.text,
                "stopped": given.stopped,
                "source": sample.source,
            }
        tick("answer", min(start + ANSWERED_TOGETHER, len(prompts)), len(prompts))
