"""Preferences to token ids: each side is encoded as an answer in a chat, or to a plain prompt, and both are one row.

What a check says of them as a whole: pairs that are there both ways round, and which answers are longer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.branches import join
from tunesmith.data.chat import ChatEncoder
from tunesmith.data.completion import CompletionEncoder
from tunesmith.data.examples import hash_of
from tunesmith.data.formats.preference import SIDES
from tunesmith.data.hold_out import conflicts
from tunesmith.data.renderer import Draft, Drafts, LengthLimit, OnCut, RowEncoder, Tools
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

    def prompt_ids(self, parts: Sequence[Part], tools: Tools, max_tokens: int | None, on_cut: OnCut) -> list[int]:
        """The ids that serving feeds, see `RowEncoder.prompt_ids`."""
        return self._side.prompt_ids(parts, tools, max_tokens, on_cut)

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


MOSTLY = 0.8
"""Share of pairs from which the longer answer being the better one is worth a warning."""


class Preferences:
    """Facts kept of the usable preferences of one side: 24 bytes each."""

    def __init__(self) -> None:
        self._unordered, self._ordered = array("Q"), array("Q")
        self._chars = array("i")

    def add(self, example: Example) -> None:
        """Keep what is needed of a row; nothing of one that compares no answers."""
        if not example.branches:
            return
        prompt = [[part.role, part.text] for part in example.parts]
        ends = (example.branches[0], *example.branches[1:][-1:])
        sides = [[[part.role, part.text, part.fields] for part in branch] for branch in ends]
        hashes = [hash_of([prompt, side]) for side in sides]
        self._ordered.append(hash_of(hashes if len(ends) > 1 else [hashes, example.values]))
        self._unordered.append(hash_of(sorted(hashes)))
        if len(ends) > 1:
            self._chars.extend(sum(len(part.text) for part in branch if part.trained) for branch in ends)

    def flipped(self, num_rows: int) -> NDArray[np.int64]:
        """(row, the first row with the same two answers the other way round); none where rows of other shapes are."""
        if len(self._ordered) != num_rows:
            return np.empty((0, 2), np.int64)
        unordered_I, ordered_I = (np.frombuffer(of, np.uint64) for of in (self._unordered, self._ordered))
        return conflicts(unordered_I, ordered_I)

    def notes(self) -> Iterator[str]:
        """Lengths of chosen and rejected answers."""
        if not self._chars:
            return
        chars_I2 = np.frombuffer(self._chars, np.int32).reshape(-1, 2)
        longer = float((chars_I2[:, 0] > chars_I2[:, 1]).mean())
        chosen, rejected = np.median(chars_I2, axis=0)
        yield (
            f"the chosen answer is the longer one in {longer:.0%} of the pairs; the median of the chosen ones has "
            f"{chosen:,.0f} characters, that of the rejected ones {rejected:,.0f}"
        )
        if longer >= MOSTLY or longer <= 1 - MOSTLY:
            which = "longer" if longer > 0.5 else "shorter"
            yield f"the {which} answer is nearly always the chosen one: length alone may be learnt (see prefer.length)"


def flipped_message(there: object, *_: int) -> str:
    """The message about a pair that is there the other way round."""
    return f"the same is at {there} the other way round: one of both is likely wrong."
