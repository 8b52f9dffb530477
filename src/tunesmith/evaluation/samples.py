"""Held-out prompts, answered so that a person can see the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tunesmith.data.render import Renderer
from tunesmith.evaluation.generation import Sampling, answer
from tunesmith.formatting import plural
from tunesmith.types import Example

ANSWERED_TOGETHER = 8
FEW_ANSWERS = 16
"""Prompts answered before and after a run so that a person can look."""
SHORT_TOKENS, SHORT_ROOM, MOST_SHORT = 8, 16, 256
"""Answers of at most 8 tokens, as a class, a name or a date, are right or wrong as a whole: 256 of those are answered
and counted, with 16 tokens at most."""
MOSTLY = 0.9
BEGINNING_TOKENS = 48
"""Of a document that is given to be gone on with."""


def teach_short_answers(targets_I: NDArray[np.integer[Any]]) -> bool:
    """Whether most rows teach so few tokens that their answers are right or wrong as a whole."""
    return len(targets_I) > 0 and bool(np.mean(targets_I <= SHORT_TOKENS) >= MOSTLY)


def new_tokens_for(targets_I: NDArray[np.integer[Any]], most: int) -> int:
    """Tokens of an answer at most, to prompts of rows that teach so many tokens."""
    return min(most, SHORT_ROOM) if teach_short_answers(targets_I) else most


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A held-out row up to its last answer."""

    ids: tuple[int, ...]
    prompt: str
    """What a person reads: the last turn before the answer."""
    reference: str
    source: str
    cut: int = 0
    """Tokens of its end that were left out to fit."""


@dataclass(frozen=True, slots=True)
class PromptRoom:
    """How long prompts may be, for all that are asked: samples of a run, of an evaluation, rows to predict.

    `max_tokens` is the longest of any kind; what can be cut is cut to `cut_to`, as it was in training.
    """

    max_tokens: int
    cut_to: int

    @classmethod
    def of(cls, renderer: Renderer, *, model_tokens: int, new_tokens: int) -> PromptRoom:
        """What is left beside an answer of `new_tokens` where a model can attend to `model_tokens`.

        An encoder reads apart from what its decoder writes.
        """
        left = model_tokens if renderer.kind == "encoder_decoder" else model_tokens - new_tokens
        return cls(left, left if renderer.max_tokens is None else min(left, renderer.max_tokens))

    def ask(self, renderer: Renderer, example: Example) -> tuple[list[int], int]:
        """The ids that have an example's parts answered, and how many tokens were cut off. Raises `DataError`."""
        cuts: list[int] = []
        ids = renderer.prompt_ids(example.parts, example.tools, max_tokens=self.cut_to, on_cut=cuts.append)
        return ids, sum(cuts)

    def limit(self, cut: int) -> int:
        """The longest prompt of which `cut` tokens were cut off: too long without its document, it asks nothing."""
        return self.cut_to if cut else self.max_tokens


def sample_prompts(
    renderer: Renderer, examples: Sequence[Example], *, room: PromptRoom, new_tokens: int
) -> list[SamplePrompt]:
    """The prompt of each example that has one with enough room: everything before its last trained part.

    Of a document that is its beginning, and the reference is how it goes on for `new_tokens`.
    """
    made = [
        _begun(renderer, example, new_tokens) if example.shape == "text" else _asked(renderer, example, room)
        for example in examples
    ]
    return [prompt for prompt in made if prompt is not None and 0 < len(prompt.ids) <= room.limit(prompt.cut)]


def remarks_on(prompts: Sequence[SamplePrompt], *, num_rows: int) -> list[str]:
    """What to say of the prompts that could be made of so many rows."""
    num_cut, left_out = sum(prompt.cut > 0 for prompt in prompts), num_rows - len(prompts)
    verb = "has" if left_out == 1 else "have"
    was = "was" if num_cut == 1 else "were"
    cut = f"{num_cut} of {plural(len(prompts), 'sample prompt')} {was} cut at the end, to the limit of training rows"
    return [
        *([cut] if num_cut else []),
        *([f"{plural(left_out, 'held-out row')} {verb} no prompt to answer: empty or too long"] if left_out else []),
    ]


def _asked(renderer: Renderer, example: Example, room: PromptRoom) -> SamplePrompt | None:
    last = max((i for i, part in enumerate(example.parts) if part.trained), default=0)
    if last == 0:
        return None
    before = example.parts[:last]
    ids, cut = room.ask(renderer, replace(example, parts=before))
    reference = example.parts[last].text
    return SamplePrompt(tuple(ids), before[-1].text, reference=reference, source=str(example.source), cut=cut)


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
