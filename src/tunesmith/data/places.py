"""Where the turns of rendered texts stand among their tokens, and the control tokens: all rows looked up at once."""

# T tokens, P places

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.pieces import Tokenized
from tunesmith.data.spans import Turn
from tunesmith.data.tokens import ControlTokens


@dataclass(frozen=True, slots=True)
class Marks:
    """Tokens of one kind in all rows, row by row."""

    at: list[int]
    """Counted from the start of the row, rising."""
    starts: list[int]
    """The first character of each."""
    ends: list[int]
    bounds: list[int]
    """Where those of each row begin, and where the last ones end."""


@dataclass(slots=True)
class Place:
    """Where a turn stands among the tokens of its row."""

    turn: Turn
    first: int
    """The first token that ends behind the turn's start."""
    first_start: int
    """The first character of that token; the turn's start where there is none."""
    opening: str | None = None
    """The part of the turn's prompt that decides its last tokens; None: there is no prompt."""
    opening_at: int = 0
    """Its first token."""


@dataclass(frozen=True, slots=True)
class Placed:
    """What is known of the tokens of some rows."""

    tokens: Tokenized
    reserved: list[int]
    """Of each row, how many of its tokens are control tokens that structure a text."""
    closing: Marks
    """Tokens that can close a turn."""
    turns: list[list[Place]]
    """Of each row, those that are trained."""

    def row_ids(self) -> list[NDArray[np.int32]]:
        """Of each row its tokens."""
        return [ids_T for ids_T, _, _ in self.tokens.each()]

    def closing_behind(self, row: int, char: int) -> int:
        """The first token that can close a turn and ends behind a character of the row; maybe one of the next row."""
        return bisect_right(self.closing.ends, char, self.closing.bounds[row], self.closing.bounds[row + 1])


def placed(texts: Sequence[tuple[str, Sequence[Turn]]], found: Tokenized, control: ControlTokens) -> Placed:
    """Where each turn of each text stands. `found`: the tokens of the texts."""
    turns = [(row, turn) for row, (_, of_text) in enumerate(texts) for turn in of_text]
    rows = np.array([row for row, _ in turns], np.int64)
    firsts = found.num_until(rows, np.array([turn.start for _, turn in turns], np.int64))
    prompts = found.num_until(rows, np.array([turn.prompt or 0 for _, turn in turns], np.int64)).tolist()
    starts = np.append(found.starts_T, 0)[firsts + found.bounds[rows]].tolist()
    nums = np.diff(found.bounds)[rows].tolist()
    cuts = _marks(control.are_cuts(found.ids_T), found)
    places: list[list[Place]] = [[] for _ in texts]
    for (row, turn), first, start, num, within in zip(turns, firsts.tolist(), starts, nums, prompts, strict=True):
        place = Place(turn, first, start if first < num else turn.start)
        if turn.prompt is not None:
            place.opening, place.opening_at = _opening(texts[row][0][: turn.prompt], within, cuts, row)
        places[row].append(place)
    reserved = np.diff(np.concatenate([[0], control.are_reserved(found.ids_T).cumsum()])[found.bounds]).tolist()
    return Placed(found, reserved, _marks(control.are_closing(found.ids_T), found), places)


def _opening(prompt: str, within: int, cuts: Marks, row: int) -> tuple[str, int]:
    """The part of a row's prompt of so many tokens that decides its last ones: from its last control token on.

    A control token cuts the text before anything else looks at it, so what comes before has the same ids in the
    prompt and in the whole. A prompt a turn would otherwise be tokenized whole: quadratic in the turns.
    """
    begin, end = cuts.bounds[row], cuts.bounds[row + 1]
    last = bisect_left(cuts.at, within, begin, end) - 1
    return (prompt[cuts.starts[last] :], cuts.at[last]) if last >= begin else (prompt, 0)


def _marks(is_one_T: NDArray[np.bool_], found: Tokenized) -> Marks:
    places_P = np.flatnonzero(is_one_T)
    bounds = places_P.searchsorted(found.bounds)
    at = places_P - np.repeat(found.bounds[:-1], np.diff(bounds))
    return Marks(at.tolist(), found.starts_T[places_P].tolist(), found.ends_T[places_P].tolist(), bounds.tolist())
