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


class BranchEncoder(RowEncoder):
    """Encodes each branch behind its stem as a row of its own, by the encoder of a side, and joins them to one row."""

    names: tuple[str, ...] = SIDES
    """Names of so many lines in messages."""
    compares = True
    """Lines that are all the same teach nothing."""

    def __init__(self, side: RowEncoder) -> None:
        self._side, self.control, self.template_text = side, side.control, side.template_text

    def encode(self, examples: Sequence[Example]) -> list[Drafts]:
        lines = [self.lines(example) for example in examples]
        drafts = iter(self._side.encode([line for of_row in lines for line in of_row]))
        return [self.row(one, [(line, next(drafts)) for line in of]) for one, of in zip(examples, lines, strict=True)]

    def lines(self, example: Example) -> list[Example]:
        """Each branch behind the stem; an example without branches as it is."""
        return [replace(example, parts=(*example.parts, *one), branches=()) for one in example.branches or ((),)]

    def row(self, example: Example, sides: Sequence[tuple[Example, Drafts]]) -> Drafts:
        """The row of all lines and their drafts, or what is wrong with one of them."""
        drafts: list[Draft] = []
        for number, (line, side) in enumerate(sides):
            name = self.names[number] if len(sides) == len(self.names) else f"text {number + 1}"
            name = f"{name}: " if len(sides) > 1 else ""
            if isinstance(side, Problem):
                return replace(side, message=f"{name}{side.message}")
            (draft,) = side
            draft.warnings = [replace(one, message=f"{name}{one.message}") for one in draft.warnings]
            self.finish(draft, line)
            drafts.append(draft)
        if self.compares and len(drafts) > 1 and len({draft.ids_T.tobytes() for draft in drafts}) < 2:
            message = "its answers are the same tokens, as the model reads them."
            return Problem(example.source, "identical_sides", message, "Remove the row.")
        return [join(drafts, example.values)] if example.branches else drafts

    def finish(self, draft: Draft, line: Example) -> None:
        """Change the draft of one line before it is joined."""


class PreferenceEncoder(BranchEncoder):
    """Encodes both sides with every check of training on answers, in the chat template if the tokenizer has one.

    Raises `ModelError` for a tokenizer or template that cannot be trained with.
    """

    def __init__(self, tokenizer: Any, fast: FastTokenizer, limit: LengthLimit, date: str | None) -> None:
        super().__init__(side_encoder(tokenizer, fast, limit, date))
        self.stop_ids = self._side.stop_ids

    def prompt_ids(self, parts: Sequence[Part], tools: Tools, max_tokens: int | None, on_cut: OnCut) -> list[int]:
        """The ids that serving feeds, see `RowEncoder.prompt_ids`."""
        return self._side.prompt_ids(parts, tools, max_tokens, on_cut)

    def row(self, example: Example, sides: Sequence[tuple[Example, Drafts]]) -> Drafts:
        if not example.branches:
            fix = "Give it chosen and rejected, or a label, true or false; to learn from answers alone, use task: chat."
            return Problem(example.source, "no_preference", "it compares no answers.", fix)
        return super().row(example, sides)


MOSTLY = 0.8
"""Share of pairs from which the longer answer being the better one is worth a warning."""


class Preferences:
    """Facts kept of the usable preferences of one side: 24 bytes each."""

    def __init__(self) -> None:
        self._unordered, self._ordered, self._chars = array("Q"), array("Q"), array("i")

    def add(self, example: Example) -> None:
        """Keep what is needed of a row; nothing of one that compares no answers."""
        if not example.branches:
            return
        ends = (example.branches[0], *example.branches[1:][-1:])
        sides = [[[part.role, part.text, part.fields] for part in (*example.parts, *branch)] for branch in ends]
        hashes = [hash_of(side) for side in sides]
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
        if not 1 - MOSTLY < longer < MOSTLY:
            which = "longer" if longer > 0.5 else "shorter"
            yield f"the {which} answer is nearly always the chosen one: length alone may be learnt (see prefer.length)"
