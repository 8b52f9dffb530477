"""Documents to tokens and the bytes that each spells, in memory bounded by a stretch of text."""

# T tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.tokens import Encoder, Tokens

STRETCH_CHARS = 1_000_000
"""A longer text is tokenized in stretches: the tokenizer needs hundreds of bytes a token while it works."""
OVERLAP_CHARS = 4_096
"""Characters that two stretches share. A token depends on what is near: in their middle both split the text alike."""


@dataclass(frozen=True, slots=True)
class Spelled:
    """The tokens of a text, without anything around it."""

    ids_T: NDArray[np.int32]
    bytes_T: NDArray[np.int64]
    """UTF-8 bytes of the text from the end of the token before to the end of each; all of a text's in sum."""


def spell(encoder: Encoder, texts: Sequence[str]) -> list[Spelled]:
    """Tokens of each text."""
    encoded = iter(encoder.encode([text for text in texts if len(text) <= STRETCH_CHARS]))
    return [
        _between(text, next(encoded), 0, len(text)) if len(text) <= STRETCH_CHARS else _spell_long(encoder, text)
        for text in texts
    ]


def _spell_long(encoder: Encoder, text: str) -> Spelled:
    """The tokens of the whole text, from stretches that are joined where both end a token."""
    parts = []
    cut, left = 0, _stretch(encoder, text, 0)
    step = STRETCH_CHARS - OVERLAP_CHARS
    for start in range(step, len(text) - OVERLAP_CHARS, step):
        right = _stretch(encoder, text, start)
        low, high = start + OVERLAP_CHARS // 4, start + 3 * OVERLAP_CHARS // 4
        shared = np.intersect1d(left.ends_T, right.ends_T)
        shared = shared[(shared > low) & (shared < high)]
        # Thousands of characters without the end of a token are no text: they are cut anywhere.
        until = int(shared[len(shared) // 2]) if len(shared) else (low + high) // 2
        parts.append(_between(text, left, cut, until))
        cut, left = until, right
    parts.append(_between(text, left, cut, len(text)))
    return Spelled(np.concatenate([part.ids_T for part in parts]), np.concatenate([part.bytes_T for part in parts]))


def _stretch(encoder: Encoder, text: str, start: int) -> Tokens:
    tokens = encoder.encode([text[start : start + STRETCH_CHARS]])[0]
    return Tokens(tokens.ids_T, tokens.starts_T + start, tokens.ends_T + start)


def _between(text: str, tokens: Tokens, start: int, end: int) -> Spelled:
    """The tokens that end behind `start`, up to `end`; those at the start of the text too."""
    ends_T = np.maximum.accumulate(tokens.ends_T)
    first = int(np.searchsorted(ends_T, start, side="right")) if start else 0
    last = int(np.searchsorted(ends_T, end, side="right"))
    ends_T = ends_T[first:last] - start
    if len(ends_T):
        ends_T[-1] = end - start
    return Spelled(tokens.ids_T[first:last], _num_bytes(text[start:end], ends_T))


def _num_bytes(text: str, ends_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """UTF-8 bytes of a text from each of the given places to the next, the first from its start."""
    if text.isascii():
        return np.diff(ends_T, prepend=0)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.diff(np.concatenate([[0], np.cumsum(widths)])[ends_T], prepend=0)
