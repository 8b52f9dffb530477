"""Text of data as text: nothing in it is invisible, turns the line around, or ends a page."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

# What a reader would not see or a display would act on: C0 but tab and newline, DEL, C1, marks of direction, spaces
# without width, line ends that are none in a file, and halves of characters.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_WORDS = re.compile(r"\s*\S+\s*")
_MOST_WORDS = 2000
_SAME_ENOUGH = 0.2

Marked = list[tuple[str, bool]]
"""Stretches of a text, and whether each is missing from the other text."""


def visible(text: str) -> str:
    """The text with a sign in place of every character that is none to a reader: ␀, ␛, ⟨U+202E⟩."""
    return _UNSEEN.sub(_sign, text)


def _sign(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def one_line(text: str, width: int) -> str:
    """The text on one line, at most `width` characters."""
    flat = " ".join(visible(text[: 8 * width]).split())
    return flat if len(flat) <= width and len(text) <= 8 * width else flat[: width - 1].rstrip() + "…"


def differences(before: str, after: str) -> tuple[Marked, Marked] | None:
    """Both texts in stretches of words, those marked that stand in one alone (difflib).

    None where so little is common to them, or they are so long, that marks would help nobody.
    """
    words, others = _WORDS.findall(before), _WORDS.findall(after)
    if max(len(words), len(others)) > _MOST_WORDS:
        return None
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in words], [w.strip() for w in others], autojunk=False)
    if matcher.ratio() < _SAME_ENOUGH or not words or not others:
        return None
    codes = matcher.get_opcodes()
    left = _joined((words[a:b], tag != "equal") for tag, a, b, _, _ in codes)
    right = _joined((others[a:b], tag != "equal") for tag, _, _, a, b in codes)
    return left, right


def _joined(stretches: Iterator[tuple[list[str], bool]]) -> Marked:
    joined = []
    for words, marked in stretches:
        text = "".join(words)
        end = len(text.rstrip())
        joined += [(text[:end], marked), (text[end:], False)]
    return [(text, marked) for text, marked in joined if text]
