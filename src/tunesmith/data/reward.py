"""Answers and documents to token ids for a model that scores them: each with its prompt or query, read at one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tunesmith.data.branches import join
from tunesmith.data.classification import ClassificationEncoder
from tunesmith.data.preference import side_encoder
from tunesmith.data.renderer import Draft, Drafts, LengthLimit, RowEncoder
from tunesmith.data.tokenizer import FastTokenizer
from tunesmith.types import Example, ModelKind, Part, Problem


class RewardEncoder(RowEncoder):
    """Causal models are read at the last token of prompt and answer, encoders, which read two texts, at the first.

    Raises `ModelError` for a tokenizer or template that cannot be trained with.
    """

    def __init__(
        self, tokenizer: Any, fast: FastTokenizer, limit: LengthLimit, kind: ModelKind, date: str | None
    ) -> None:
        self._is_causal = kind == "causal"
        self._side: RowEncoder = (
            side_encoder(tokenizer, fast, limit, date)
            if self._is_causal
            else ClassificationEncoder(tokenizer, fast, limit, kind)
        )
        self.control = self._side.control
        self.template_text = self._side.template_text

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        sides = [
            self._line(replace(example, parts=(*example.parts, *branch), branches=()), score)
            for example in examples
            for branch, score in zip(example.branches or ((),), _scores(example), strict=True)
        ]
        drafted = iter(zip(sides, self._side.encode(sides), strict=True))
        return [self._row(example, [next(drafted) for _ in example.branches or ((),)]) for example in examples]

    def _line(self, example: Example, score: str) -> Example:
        """One answer with its prompt."""
        if self._is_causal:
            return replace(example, labels=(score,))
        prompt, answer = ([part.text for part in example.parts if part.trained == is_answer] for is_answer in (0, 1))
        parts = (Part("prompt", "\n".join(prompt), False), Part("answer", "\n".join(answer), True))
        return replace(example, parts=parts, labels=(score,))

    def _row(self, example: Example, sides: Sequence[tuple[Example, Drafts]]) -> Drafts:
        drafts: list[Draft] = []
        for number, (line, side) in enumerate(sides, start=1):
            if isinstance(side, Problem):
                return side if len(sides) == 1 else replace(side, message=f"answer {number}: {side.message}")
            (draft,) = side
            draft.trained_T = np.zeros(len(draft.ids_T), np.bool_)
            draft.trained_T[-1 if self._is_causal else 0] = True
            draft.classes_N = line.labels
            drafts.append(draft)
        if len(drafts) > 1 and len({draft.ids_T.tobytes() for draft in drafts}) < 2:
            message = "its answers are the same tokens, as the model reads them."
            return Problem(example.source, "identical_sides", message, "Remove the row.")
        return [join(drafts, example.values)] if example.branches else drafts


def _scores(example: Example) -> tuple[str, ...]:
    return example.labels or (("1", "0") if example.branches else ("0",))


class RankingEncoder(RewardEncoder):
    """Query and document as the two texts that the model knows; where both are too long the document is cut."""

    def __init__(self, tokenizer: Any, fast: FastTokenizer, limit: LengthLimit, kind: ModelKind) -> None:
        self._is_causal, self._fast, self._limit = kind == "causal", fast, limit
        self._side = ClassificationEncoder(tokenizer, fast, limit, kind)
        self._frame = fast.causal_frame(closed=False) if self._is_causal else fast.frame(2)
        self.control, self.template_text = self._side.control, ""

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        found = super().encode(examples)
        queries = self._fast.ids([example.parts[0].text for example in examples])
        for i, (drafts, query) in enumerate(zip(found, queries, strict=True)):
            if isinstance(drafts, Problem):
                continue
            drafts[0].values = (float(len(self._frame.before_ids) + len(query)),)  # where its documents begin
            if self._limit.excess(2 * len(query) + self._frame.num_added(2)):
                message = f"the {len(query)} tokens of its query are more than half of data.max_tokens."
                found[i] = Problem(examples[i].source, "too_long", message, "Shorten it, or raise the limit.")
        return found

    def _line(self, example: Example, score: str) -> Example:
        return replace(example, labels=(score,))
