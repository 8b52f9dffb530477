"""Answers and documents to token ids for a model that scores them: each with its prompt or query, read at one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tunesmith.data.classification import ClassificationEncoder
from tunesmith.data.preference import BranchEncoder, side_encoder
from tunesmith.data.renderer import Draft, Drafts, LengthLimit
from tunesmith.data.tokenizer import FastTokenizer
from tunesmith.types import Example, ModelKind, Part, Problem


class RewardEncoder(BranchEncoder):
    """Causal models are read at the last token of prompt and answer, encoders, which read two texts, at the first.

    Raises `ModelError` for a tokenizer or template that cannot be trained with.
    """

    def __init__(
        self, tokenizer: Any, fast: FastTokenizer, limit: LengthLimit, kind: ModelKind, date: str | None
    ) -> None:
        self._read_at = -1 if kind == "causal" else 0
        of_texts = None if self._read_at else ClassificationEncoder(tokenizer, fast, limit, kind)
        super().__init__(of_texts or side_encoder(tokenizer, fast, limit, date))

    def lines(self, example: Example) -> list[Example]:
        lines = _with_scores(super().lines(example), example)
        return lines if self._read_at else [replace(line, parts=_two_texts(line)) for line in lines]

    def finish(self, draft: Draft, line: Example) -> None:
        draft.trained_T = np.zeros(len(draft.ids_T), np.bool_)
        draft.trained_T[self._read_at] = True
        draft.classes_N = line.labels


def _with_scores(lines: list[Example], example: Example) -> list[Example]:
    scores = example.labels or (("1", "0") if example.branches else ("0",))
    return [replace(line, labels=(score,)) for line, score in zip(lines, scores, strict=True)]


def _two_texts(line: Example) -> tuple[Part, ...]:
    prompt, answer = ([part.text for part in line.parts if part.trained == is_answer] for is_answer in (0, 1))
    return Part("prompt", "\n".join(prompt), False), Part("answer", "\n".join(answer), True)


class RankingEncoder(BranchEncoder):
    """Query and document as the two texts that the model knows; where both are too long the document is cut."""

    names = ()

    def __init__(self, tokenizer: Any, fast: FastTokenizer, limit: LengthLimit, kind: ModelKind) -> None:
        super().__init__(ClassificationEncoder(tokenizer, fast, limit, kind))
        self._fast, self._limit = fast, limit
        self._frame = fast.causal_frame(closed=False) if kind == "causal" else fast.frame(2)

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

    def lines(self, example: Example) -> list[Example]:
        return _with_scores(super().lines(example), example)
