"""Pieces of text and their tokens, each under a number, and texts put together of them."""

# T tokens, P pieces

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

FIRST_ROOM = 4096


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Texts end to end."""

    ids_T: NDArray[np.int32]
    starts_T: NDArray[np.int64]
    """The first character of each token, counted from the start of its text."""
    ends_T: NDArray[np.int64]
    """Behind its last character."""
    bounds: NDArray[np.int64]
    """Where the tokens of each text begin, and where the last ones end."""

    def each(self) -> list[tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]]:
        """Text by text."""
        bounds = self.bounds.tolist()
        return [(self.ids_T[a:b], self.starts_T[a:b], self.ends_T[a:b]) for a, b in pairwise(bounds)]

    def num_until(self, rows: NDArray[np.int64], chars: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each pair of a text and a character, how many of the text's tokens end at or before it."""
        most = int(max(self.ends_T.max(initial=0), chars.max(initial=0))) + 1  # so that texts come one after another
        of_text_T = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        return (self.ends_T + of_text_T * most).searchsorted(chars + rows * most, side="right") - self.bounds[rows]

    def behind(self, leads: Sequence[int]) -> Tokenized:
        """Without the first token of each text that begins with one of so many characters; 0: it does not."""
        lead_P = np.array(leads, np.int64)
        num_P = np.diff(self.bounds)
        is_kept_T = np.ones(len(self.ids_T), np.bool_)
        is_kept_T[self.bounds[:-1][lead_P > 0]] = False
        shift_T = np.repeat(lead_P, num_P)
        bounds = np.concatenate([[0], (num_P - (lead_P > 0)).cumsum()])
        starts_T, ends_T = self.starts_T - shift_T, self.ends_T - shift_T
        return Tokenized(self.ids_T[is_kept_T], starts_T[is_kept_T], ends_T[is_kept_T], bounds)


def tokenized(backend: Tokenizer, texts: Sequence[str], *, has_places: bool) -> Tokenized:
    """Texts as they stand, by the tokenizer itself; without places, which cost it time, these are all 0."""
    encode = backend.encode_batch if has_places else backend.encode_batch_fast
    encodings = encode(list(texts), add_special_tokens=False)
    ids = [encoding.ids for encoding in encodings]
    bounds = np.cumsum([0, *map(len, ids)])
    num = int(bounds[-1])
    ids_T = np.fromiter(chain.from_iterable(ids), np.int32, num)
    if not has_places:
        return Tokenized(ids_T, np.zeros(num, np.int64), np.zeros(num, np.int64), bounds)
    offsets = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
    places_T2 = np.fromiter(offsets, np.int64, 2 * num).reshape(-1, 2)
    starts_T, ends_T = np.ascontiguousarray(places_T2.T)
    return Tokenized(ids_T, starts_T, ends_T, bounds)


class Numbers(dict[str, int]):
    """A number for each piece, given when it is first asked for; `new` are those given since that was last emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, piece: str) -> int:
        self.new.append(piece)
        number = self[piece] = len(self)
        return number

    def forget(self, first: int) -> None:
        """The pieces of `new` from there on."""
        for piece in self.new[first:]:
            del self[piece]
        del self.new[first:]


class Pieces:
    """Tokens of pieces by number, in arrays that have room for more."""

    def __init__(self) -> None:
        self._ids = np.empty(FIRST_ROOM, np.int32)
        self._starts = np.empty(FIRST_ROOM, np.int64)
        self._ends = np.empty(FIRST_ROOM, np.int64)
        self._bounds = np.zeros(FIRST_ROOM + 1, np.int64)
        self._chars = np.empty(FIRST_ROOM, np.int64)
        self.num = 0

    @property
    def num_tokens(self) -> int:
        return int(self._bounds[self.num])

    def add(self, found: Tokenized, chars: Sequence[int]) -> None:
        """Pieces under the next numbers, and the characters of each."""
        start, end = self.num_tokens, self.num_tokens + len(found.ids_T)
        more = self.num + len(chars)
        self._ids, self._starts, self._ends = (_room(of, end) for of in (self._ids, self._starts, self._ends))
        self._bounds, self._chars = _room(self._bounds, more + 1), _room(self._chars, more)
        self._ids[start:end], self._starts[start:end], self._ends[start:end] = found.ids_T, found.starts_T, found.ends_T
        self._bounds[self.num + 1 : more + 1] = start + found.bounds[1:]
        self._chars[self.num : more] = chars
        self.num = more

    def keep_first(self, num: int) -> None:
        """Forget all but those."""
        self.num = num

    def joined(self, number_P: NDArray[np.int64], nums: Sequence[int]) -> Tokenized:
        """Texts of so many pieces each."""
        first_P, chars_P = self._bounds[number_P], self._chars[number_P]
        size_P = self._bounds[number_P + 1] - first_P
        begin, place = np.concatenate([[0], size_P.cumsum()]), np.concatenate([[0], chars_P.cumsum()])
        of_texts = np.concatenate([[0], np.cumsum(nums, dtype=np.int64)])
        at_T = np.arange(begin[-1]) + np.repeat(first_P - begin[:-1], size_P)
        shift_T = np.repeat(place[:-1] - np.repeat(place[of_texts[:-1]], nums), size_P)
        return Tokenized(self._ids[at_T], self._starts[at_T] + shift_T, self._ends[at_T] + shift_T, begin[of_texts])


def _room(array: NDArray[Any], size: int) -> NDArray[Any]:
    if len(array) >= size:
        return array
    larger = np.empty(max(size, 2 * len(array)), array.dtype)
    larger[: len(array)] = array
    return larger
