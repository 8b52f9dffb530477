"""Held-out prompts that a run or an evaluation answers, and how long prompts and answers may be.

Prompts are rendered by the code that renders training rows; what writes the answers is in `generation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.renderer import Renderer
from tunesmith.generation.padded import GeneratedAnswer
from tunesmith.phrases import plural
from tunesmith.types import Example, ImageRef, JsonObject, images_of

FEW_ANSWERS = 16
"""Prompts answered before and after a run for a person to read."""
SHORT_TOKENS, SHORT_LIMIT, MOST_SHORT = 8, 16, 256
"""Answers of at most 8 tokens, as a class, a name or a date, are right or wrong as a whole: 256 of those are
answered and counted, with 16 tokens at most."""
MOSTLY = 0.9
PREFIX_TOKENS = 48
"""Tokens of a document that are given as the prompt of a sample."""


def has_short_answers(targets_I: NDArray[np.integer[Any]]) -> bool:
    """Whether most rows have so few targets that their answers are right or wrong as a whole."""
    return len(targets_I) > 0 and bool(np.mean(targets_I <= SHORT_TOKENS) >= MOSTLY)


def new_tokens_for(targets_I: NDArray[np.integer[Any]], most: int) -> int:
    """Most tokens of an answer to the prompts of rows with `targets_I` targets."""
    return min(most, SHORT_LIMIT) if has_short_answers(targets_I) else most


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A held-out row up to its last answer."""

    ids: tuple[int, ...]
    prompt: str
    """The last turn before the answer, for a person to read."""
    reference: str
    source: str
    cut: int = 0
    """Tokens of its end that were left out to fit."""
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """The longest prompts: for samples of a run, of an evaluation, and rows to predict."""

    max_tokens: int
    """Longest of any kind."""
    cut_to: int
    """Length to which prompts that can be cut are cut, as they were in training."""

    @classmethod
    def of(cls, renderer: Renderer, *, model_tokens: int, new_tokens: int) -> PromptLimit:
        """The limit with room for an answer of `new_tokens` where a model can attend to `model_tokens`.

        An encoder–decoder keeps its answer apart from the prompt.
        """
        left = model_tokens if renderer.kind == "encoder_decoder" else model_tokens - new_tokens
        return cls(left, left if renderer.max_tokens is None else min(left, renderer.max_tokens))

    def encode(self, renderer: Renderer, example: Example) -> tuple[list[int], int]:
        """The prompt ids of an example's parts, and how many tokens were cut off. Raises DataError."""
        cuts: list[int] = []
        ids = renderer.prompt_ids(example.parts, example.tools, max_tokens=self.cut_to, on_cut=cuts.append)
        return ids, sum(cuts)

    def limit(self, cut: int) -> int:
        """The longest prompt of which `cut` tokens were cut off."""
        return self.cut_to if cut else self.max_tokens


def sample_prompts(
    renderer: Renderer, examples: Sequence[Example], *, limit: PromptLimit, new_tokens: int
) -> list[SamplePrompt]:
    """The prompt of each example that has one within the limit: everything before its last trained part.

    The prompt of a document is its first tokens, and the reference is the `new_tokens` that follow.
    """
    made = [
        _document_prompt(renderer, example, new_tokens)
        if example.shape == "text"
        else _prompt(renderer, example, limit)
        for example in examples
    ]
    return [prompt for prompt in made if prompt is not None and 0 < len(prompt.ids) <= limit.limit(prompt.cut)]


def sample_notes(prompts: Sequence[SamplePrompt], *, num_rows: int) -> list[str]:
    """Notes on the prompts that could be made of `num_rows` rows."""
    num_cut, left_out = sum(prompt.cut > 0 for prompt in prompts), num_rows - len(prompts)
    verb = "has" if left_out == 1 else "have"
    was = "was" if num_cut == 1 else "were"
    cut = f"{num_cut} of {plural(len(prompts), 'sample prompt')} {was} cut at the end, to the limit of training rows"
    return [
        *([cut] if num_cut else []),
        *([f"{plural(left_out, 'held-out row')} {verb} no prompt to answer: empty or too long"] if left_out else []),
    ]


def _prompt(renderer: Renderer, example: Example, limit: PromptLimit) -> SamplePrompt | None:
    before = example.last_prompt
    if not before:
        return None
    ids, cut = limit.encode(renderer, replace(example, parts=before))
    reference = example.first_line[len(before)].text
    text, source, images = before[-1].text, str(example.source), images_of(before)
    return SamplePrompt(tuple(ids), text, reference=reference, source=source, cut=cut, images=images)


def _document_prompt(renderer: Renderer, example: Example, new_tokens: int) -> SamplePrompt | None:
    ids = tuple(renderer.prompt_ids(example.parts, ()))
    if len(ids) <= PREFIX_TOKENS:
        return None
    prefix, rest = ids[:PREFIX_TOKENS], ids[PREFIX_TOKENS : PREFIX_TOKENS + new_tokens]
    prompt, reference = (renderer.tokenizer.decode(part, skip_special_tokens=True) for part in (prefix, rest))
    return SamplePrompt(prefix, prompt, reference=reference, source=str(example.source))


def sample_values(sample: SamplePrompt, given: GeneratedAnswer) -> JsonObject:
    """The values of the "sample" event of a prompt and its answer."""
    return {
        "prompt": sample.prompt,
        "reference": sample.reference,
        "answer": given.text,
        "stopped": given.stopped,
        "source": sample.source,
    }
