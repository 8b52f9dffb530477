"""A query and its documents to token ids: each document is a line with the query in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunesmith.data.classification import ClassificationEncoder
from tunesmith.data.drafts import Drafts, LengthLimit
from tunesmith.data.reward import RewardEncoder
from tunesmith.data.tokenizer import FastTokenizer
from tunesmith.types import Example, ModelKind, Problem


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
