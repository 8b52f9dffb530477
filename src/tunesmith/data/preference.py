"""Preferences to token ids: each side is encoded as an answer in a chat, or to a plain prompt, and both are one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tunesmith.data.branches import join
from tunesmith.data.chat import ChatEncoder
from tunesmith.data.completion import CompletionEncoder
from tunesmith.data.drafts import Draft, Drafts, LengthLimit, OnCut, RowEncoder, ignore_cut
from tunesmith.data.formats.preference import SIDES
from tunesmith.data.tokenizer import FastTokenizer
from tunesmith.types import Example, Part, Problem


def side_encoder(tokenizer: Any, fast: FastTokenizer, limit: LengthLimit, date: str | None) -> RowEncoder:
    """The encoder of one answer with its prompt: in the chat template if the tokenizer has one."""
    if getattr(tokenizer, "chat_template", None):
        return ChatEncoder(tokenizer, fast, limit, date)
    return CompletionEncoder(tokenizer, fast, limit)


class PreferenceEncoder(RowEncoder):
    """Encodes both sides with every check of training on answers, in the chat template if the tokenizer has one.

    Raises `ModelError` for a tokenizer or template that cannot be trained with.
    """

    def __init__(self, tokenizer: Any, fast: FastTokenizer, limit: LengthLimit, date: str | None) -> None:
        self._side = side_encoder(tokenizer, fast, limit, date)
        self.control = self._side.control
        self.template_text = self._side.template_text
        self.stop_ids = self._side.stop_ids

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        sides = [
            replace(example, parts=(*example.parts, *branch), branches=())
            for example in examples
            for branch in example.branches
        ]
        drafted = iter(self._side.encode(sides))
        return [self._row(example, [next(drafted) for _ in example.branches]) for example in examples]

    def prompt_ids(
        self,
        parts: Sequence[Part],
        tools: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        on_cut: OnCut = ignore_cut,
    ) -> list[int]:
        """The ids that serving feeds, see `RowEncoder.prompt_ids`."""
        return self._side.prompt_ids(parts, tools, max_tokens=max_tokens, on_cut=on_cut)

    def _row(self, example: Example, sides: Sequence[Drafts]) -> Drafts:
        if not sides:
            fix = "Give it chosen and rejected, or a label, true or false; to learn from answers alone, use task: chat."
            return Problem(example.source, "no_preference", "it compares no answers.", fix)
        drafts: list[Draft] = []
        names = [f"{name}: " for name in SIDES] if len(sides) > 1 else [""]
        for name, side in zip(names, sides, strict=True):
            if isinstance(side, Problem):
                return replace(side, message=f"{name}{side.message}")
            draft = side[0]
            draft.warnings = [replace(one, message=f"{name}{one.message}") for one in draft.warnings]
            drafts.append(draft)
        if len(drafts) > 1 and np.array_equal(drafts[0].ids_T, drafts[1].ids_T):
            message = "chosen and rejected are the same tokens, as the model reads them."
            return Problem(example.source, "identical_sides", message, "Remove the row.")
        return [join(drafts, example.values)]
