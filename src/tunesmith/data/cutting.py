"""Texts tokenized in the stretches that control tokens cut them into, those that recur once."""

# T tokens

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Arrays = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]
"""Ids of a text, and the characters [start, end) of each."""
MOST_KEPT = 4_096
LONGEST_KEPT = 10_000
"""Characters of a stretch that is kept."""


class Cutter:
    """A tokenizer that does not do the same work again.

    A token that is matched in the text as it stands, whatever its neighbours, ends all that a tokenizer knows of what
    came before. So a text is cut in front of each such token, and a stretch that stands twice in a batch, such as a
    system prompt, is tokenized once and remembered. `added`: of the tokenizer, by id.
    """

    def __init__(self, backend: Tokenizer, added: Mapping[int, Any]) -> None:
        self._backend = backend
        self._kept: dict[str, Arrays] = {}
        first = [token for token in added.values() if not token.normalized]
        # Whether a token of whole words is matched depends on its neighbours: no place is known to be a cut.
        are_sure = not any(token.single_word for token in first)
        self._first_re = alternatives(token.content for token in first if are_sure)
        self._cuts = frozenset(cuts(added).values()) if are_sure else frozenset()

    def encode(self, texts: Sequence[str]) -> list[Arrays]:
        """Of each text, as the tokenizer gives them for the whole."""
        cut = [self._stretches(text) for text in texts]
        num_of = Counter(stretch for stretches in cut for stretch in stretches)
        new = [stretch for stretch in num_of if stretch not in self._kept]
        found = dict(zip(new, self._tokenized(new), strict=True))
        pieces = [found[s] if s in found else self._kept[s] for stretches in cut for s in stretches]
        if len(self._kept) > MOST_KEPT:
            self._kept.clear()
        self._kept.update((s, _copied(found[s])) for s in new if num_of[s] > 1 and len(s) <= LONGEST_KEPT)
        return _joined(cut, pieces)

    def _stretches(self, text: str) -> list[str]:
        if not self._cuts:
            return [text]
        starts = [found.start() for found in self._first_re.finditer(text) if found.group() in self._cuts]
        if not starts or starts == [0]:
            return [text]
        if starts[0]:
            starts.insert(0, 0)
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]

    def _tokenized(self, stretches: Sequence[str]) -> list[Arrays]:
        encodings = self._backend.encode_batch(list(stretches), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        ends = np.cumsum([0, *map(len, ids)])
        flat_T = np.fromiter(chain.from_iterable(ids), np.int32, int(ends[-1]))
        offsets = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
        places_T2 = np.fromiter(offsets, np.int64, 2 * int(ends[-1])).reshape(-1, 2)
        starts_T, ends_T = np.ascontiguousarray(places_T2.T)
        return [
            (flat_T[a:b], starts_T[a:b], ends_T[a:b])
            for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        ]


def cuts(added: Mapping[int, Any]) -> dict[int, str]:
    """Tokens behind which a text is tokenized as if it began there, whatever stands before."""
    return {
        i: token.content
        for i, token in added.items()
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    }


def alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    """Any of some texts, the longest that stands at a place, as tokenizers match them; of none, nothing matches."""
    some = sorted({text for text in texts if text})
    return re.compile(_branches(some) if some else "(?!)")


def _branches(texts: Sequence[str]) -> str:
    """Sorted texts as a tree of their beginnings: the time for a match does not grow with their number."""
    by_first: dict[str, list[str]] = {}
    for text in texts:
        if text:
            by_first.setdefault(text[0], []).append(text[1:])
    if not by_first:
        return ""
    branches = "|".join(re.escape(first) + _branches(rests) for first, rests in by_first.items())
    if texts[0] == "":  # one of them ends here
        return f"(?:{branches})?"
    return f"(?:{branches})" if len(by_first) > 1 else branches


def _joined(cut: Sequence[Sequence[str]], pieces: Sequence[Arrays]) -> list[Arrays]:
    """The stretches of each text put together, places counted from its start."""
    if not pieces:
        return []
    shifts, nums = [], []
    at = 0
    for stretches in cut:
        place = num = 0
        for stretch in stretches:
            shifts.append(place)
            place += len(stretch)
            num += len(pieces[at][0])
            at += 1
        nums.append(num)
    shifts_T = np.repeat(shifts, [len(piece[0]) for piece in pieces])
    ids_T = np.concatenate([piece[0] for piece in pieces])
    starts_T = np.concatenate([piece[1] for piece in pieces]) + shifts_T
    ends_T = np.concatenate([piece[2] for piece in pieces]) + shifts_T
    ends = np.cumsum(nums).tolist()
    return [(ids_T[a:b], starts_T[a:b], ends_T[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _copied(arrays: Arrays) -> Arrays:
    ids_T, starts_T, ends_T = arrays
    return ids_T.copy(), starts_T.copy(), ends_T.copy()  # not the whole batch with it
