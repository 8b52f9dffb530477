"""Prompts to ids: rows of which nothing is learnt, since their answers are drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.data.chat import ChatEncoder
from tunesmith.data.drafts import Draft, Drafts
from tunesmith.data.renderer import ignore_cut
from tunesmith.errors import DataError
from tunesmith.types import Example, Problem

_OPENED = re.compile(r"<(?:think|thinking|thought|reason|reasoning|analysis|scratchpad)>\s*\Z", re.IGNORECASE)
LAST_TOKENS = 16
"""Tokens at the end of a prompt in which an opened tag is looked for."""


def begun_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """The tag of reasoning that a template opens at the end of a prompt, such as "<think>\\n": an answer goes on
    behind it and lacks it. "" where there is none."""
    opened = _OPENED.search(tokenizer.decode(list(ids[-LAST_TOKENS:])))
    return opened[0] if opened else ""


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
