"""Where the turns of rendered texts stand among their tokens, and the control tokens: all rows looked up at once."""

# T tokens, P places

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.pieces import Tokenized
from tunesmith.data.spans import Turn
from tunesmith.data.tokens import ControlTokens


@dataclass(slots=True)
class Marks:
    """Tokens of one kind in a row."""

    at: list[int]
    """Rising."""
    starts: list[int]
    """The first character of each."""
    ends: list[int]


@dataclass(slots=True)
class RowTokens:
    """Of a row, and where the control tokens among them stand."""

    ids_T: NDArray[np.int32]
    num_reserved: int
    closing: Marks
    """Tokens that can close a turn."""
    cuts: Marks
    """Tokens that a text is cut at."""


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


def marked(found: Tokenized, control: ControlTokens) -> list[RowTokens]:
    """The tokens of each text."""
    reserved, closing, cuts = (
        _marks(np.flatnonzero(are(found.ids_T)), found)
        for are in (control.are_reserved, control.are_closing, control.are_cuts)
    )
    return [
        RowTokens(ids_T, len(its_reserved.at), its_closing, its_cuts)
        for (ids_T, _, _), its_reserved, its_closing, its_cuts in zip(
            found.each(), reserved, closing, cuts, strict=True
        )
    ]


def placed(
    texts: Sequence[tuple[str, Sequence[Turn]]], found: Tokenized, tokens: Sequence[RowTokens]
) -> list[list[Place]]:
    """Where each turn of each text stands."""
    turns = [(row, turn) for row, (_, of_text) in enumerate(texts) for turn in of_text]
    rows = np.array([row for row, _ in turns], np.int64)
    firsts = found.num_until(rows, np.array([turn.start for _, turn in turns], np.int64))
    prompts = found.num_until(rows, np.array([turn.prompt or 0 for _, turn in turns], np.int64)).tolist()
    starts = np.append(found.starts_T, 0)[firsts + found.bounds[rows]].tolist()
    nums = np.diff(found.bounds)[rows].tolist()
    places: list[list[Place]] = [[] for _ in texts]
    for (row, turn), first, start, num, within in zip(turns, firsts.tolist(), starts, nums, prompts, strict=True):
        place = Place(turn, first, start if first < num else turn.start)
        if turn.prompt is not None:
            place.opening, place.opening_at = _opening(texts[row][0][: turn.prompt], within, tokens[row].cuts)
        places[row].append(place)
    return places


def _opening(prompt: str, within: int, cuts: Marks) -> tuple[str, int]:
    """The part of a prompt of so many tokens that decides its last ones: from its last control token on.

    A control token cuts the text before anything else looks at it, so what comes before has the same ids in the
    prompt and in the whole. A prompt a turn would otherwise be tokenized whole: quadratic in the turns.
    """
    num = bisect_left(cuts.at, within)
    return (prompt[cuts.starts[num - 1] :], cuts.at[num - 1]) if num else (prompt, 0)


def _marks(places_P: NDArray[np.int64], found: Tokenized) -> list[Marks]:
    """Some of the tokens, row by row, counted from the start of each."""
    cuts = places_P.searchsorted(found.bounds)
    at = (places_P - np.repeat(found.bounds[:-1], np.diff(cuts))).tolist()
    starts, ends = found.starts_T[places_P].tolist(), found.ends_T[places_P].tolist()
    bounds = cuts.tolist()
    return [Marks(at[a:b], starts[a:b], ends[a:b]) for a, b in pairwise(bounds)]
