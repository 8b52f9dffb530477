"""Prompts to ids: rows of which nothing is learnt, since their answers are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.data.chat import ChatEncoder
from tunesmith.data.drafts import Draft, Drafts
from tunesmith.data.renderer import ignore_cut
from tunesmith.errors import DataError
from tunesmith.types import Example, Problem


class PromptEncoder(ChatEncoder):
    """The ids that serving feeds to have a prompt answered."""

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        return [self._draft_of(example) for example in examples]

    def _draft_of(self, example: Example) -> Drafts:
        if example.tools:
            why = "it has tools, and answers that call them are not graded in training."
            return Problem(example.source, "has_tools", why, "Leave the row out, or learn from answers: task chat.")
        try:
            ids = self.prompt_ids(example.parts, example.tools, None, ignore_cut)
        except DataError as error:
            return Problem(example.source, "template_error", f"{error}", "Change the row.")
        if self._limit.excess(len(ids)):
            message = (
                f"its prompt of {len(ids):,} tokens is longer than {self._limit.max_tokens:,}: data.max_tokens "
                "less reinforce.max_new_tokens, which its answers take."
            )
            fix = "Shorten it, lower reinforce.max_new_tokens, or set data.too_long: drop."
            return Problem(example.source, "too_long", message, fix)
        return [Draft(np.array(ids, np.int32), np.zeros(len(ids), np.bool_))]
