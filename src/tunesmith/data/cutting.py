"""Texts tokenized in pieces that have the same tokens wherever they stand, each of which a tokenizer sees once."""

# P pieces

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tunesmith.data.pieces import Numbers, Pieces, Tokenized, tokenized
from tunesmith.data.word_rules import find_rule

Stretch = tuple[str, str]
"""A token that a text is cut in front of, or "" where it begins with none, and what follows up to the next one."""
MOST_KEPT = 65_536
"""Pieces remembered, and four times as many tokens of them."""
LONGEST_KEPT = 10_000
"""Characters of a piece that is remembered."""


class Cutter:
    """A tokenizer that does not do the same work again.

    A token that is matched in the text as it stands, whatever its neighbours, ends all that a tokenizer knows of what
    came before. So a text is cut in front of each such token, and a stretch that stands twice in a batch, such as a
    system prompt, is tokenized once and remembered. Other stretches are cut into words where it is certain how the
    tokenizer does that, and words are remembered. `added`: of the tokenizer, by id.
    """

    def __init__(self, backend: Tokenizer, added: Mapping[int, Any]) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._numbers, self._pieces = Numbers(), Pieces()
        self._met = set[int]()
        """Hashes of words that were met and not learnt."""
        first = [token for token in added.values() if not token.normalized]
        # Whether a token of whole words is matched depends on its neighbours: no place is known to be a cut.
        are_sure = not any(token.single_word for token in first)
        self._first_re = alternatives(token.content for token in first if are_sure)
        self._cuts = frozenset(filter(None, cuts(added).values())) if are_sure else frozenset()
        others = {token.content for token in added.values()} - self._cuts
        self._others_re = alternatives(others) if others else None
        self._split_re = None if others else re.compile(f"({self._first_re.pattern})")
        # Tokens that are looked for in what a normalizer leaves are not looked for here.
        self._rule = find_rule(backend) if len(first) == len(added) else None
        self._before_word = min(self._cuts, default="")
        """The first token of a text may have other places than it has within."""

    @property
    def knows_words(self) -> bool:
        """Whether it is certain how the tokenizer splits text into words."""
        return self._rule is not None

    def encode(self, texts: Sequence[str]) -> Tokenized:
        """Of each text, as the tokenizer gives them for the whole."""
        return self._joined(texts, has_places=True)

    def ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Of each text the ids, as `encode` gives them, which cost less."""
        return [ids_T for ids_T, _, _ in self._joined(texts, has_places=False).each()]

    def _joined(self, texts: Sequence[str], *, has_places: bool) -> Tokenized:
        cut = [self._stretches(text) for text in texts]
        num_of = Counter(chain.from_iterable(cut))
        numbers: list[int] = []
        nums: list[int] = []
        others: list[str] = []
        with self._lock:
            try:
                for stretches in cut:
                    before = len(numbers)
                    for stretch in stretches:
                        found = self._known(stretch, recurs=num_of[stretch] > 1, has_places=has_places)
                        if found is None:
                            others.append("".join(stretch))
                            numbers.append(-len(others))
                        else:
                            numbers.extend(found)
                    nums.append(len(numbers) - before)
                return self._looked_up(numbers, nums, others, has_places=has_places)
            except BaseException:  # there may be numbers without tokens
                self._numbers, self._pieces = Numbers(), Pieces()
                raise

    def _known(self, stretch: Stretch, *, recurs: bool, has_places: bool) -> Iterable[int] | None:
        """The numbers of pieces that make up a stretch; None: it is to be tokenized as a whole, and forgotten."""
        lead, rest = stretch
        if lead:
            whole = lead + rest
            if whole in self._numbers or (recurs and len(rest) <= LONGEST_KEPT):
                return (self._numbers[whole],)
        if self._rule is None or (has_places and (self._rule.leaves_out or not lead)):
            return None
        if self._others_re is not None and self._others_re.search(rest):
            return None
        words = self._rule.split(rest)
        if words is None or (len(rest) > LONGEST_KEPT and max(map(len, words), default=0) > LONGEST_KEPT):
            return None
        before = len(self._numbers.new)
        numbers = list(map(self._numbers.__getitem__, [lead, *words] if lead else words))
        return None if self._are_strange(before, len(words)) else numbers

    def _are_strange(self, before: int, num_words: int) -> bool:
        """Whether most words of a stretch, those learnt last, were never met: keys and the like, which do not recur.

        They are not learnt, which takes longer than to tokenize the stretch; those met again are.
        """
        new = self._numbers.new[before:]
        if 2 * len(new) <= num_words:
            return False
        hashes = {hash(word) for word in new} - self._met
        if 2 * len(hashes) <= num_words:
            return False
        if len(self._met) > MOST_KEPT:
            self._met.clear()
        self._met |= hashes
        self._numbers.forget(before)
        return True

    def _lead(self, piece: str) -> str:
        """The token that a piece begins with, if a text is cut in front of it."""
        found = self._first_re.match(piece)
        return found.group() if found and found.group() in self._cuts else ""

    def _looked_up(
        self, numbers: Sequence[int], nums: Sequence[int], others: Sequence[str], *, has_places: bool
    ) -> Tokenized:
        """Texts of so many numbers each; a number below 0 is one of `others`, from -1 down."""
        new, self._numbers.new = self._numbers.new, []
        leads = ["" if self._lead(piece) else self._before_word for piece in new]
        found = tokenized(
            self._backend, [lead + piece for lead, piece in zip(leads, new, strict=True)], has_places=True
        )
        self._pieces.add(found.behind([len(lead) for lead in leads]), [len(piece) for piece in new])
        num = self._pieces.num
        self._pieces.add(tokenized(self._backend, others, has_places=has_places), [len(stretch) for stretch in others])
        number_P = np.array(numbers, np.int64)
        joined = self._pieces.joined(np.where(number_P < 0, num - 1 - number_P, number_P), nums)
        self._pieces.keep_first(num)
        if num > MOST_KEPT or self._pieces.num_tokens > 4 * MOST_KEPT:
            self._numbers, self._pieces = Numbers(), Pieces()
        return joined

    def _stretches(self, text: str) -> list[Stretch]:
        if self._split_re is not None:  # nothing but cuts is looked for
            first, *pairs = self._split_re.split(text)
            led = list(zip(pairs[::2], pairs[1::2], strict=True))
            return [("", first), *led] if first or not led else led
        starts = [found for found in self._first_re.finditer(text) if found.group() in self._cuts]
        ends = [*(found.start() for found in starts[1:]), len(text)]
        led = [(found.group(), text[found.end() : end]) for found, end in zip(starts, ends, strict=False)]
        first = text[: starts[0].start()] if starts else text
        return [("", first), *led] if first or not led else led


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
