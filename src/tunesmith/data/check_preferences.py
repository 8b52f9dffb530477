"""What a check says of preferences as a whole: pairs that are there both ways round, and which answers are longer."""

# I rows

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.examples import hash_of
from tunesmith.data.hold_out import conflicts
from tunesmith.types import Example

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
        """How long chosen and rejected answers are."""
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
