"""How a tokenizer splits text into words, said as an expression of Python's: for rules and characters that are certain.

A word is tokenized by itself, whatever stands beside it, so that a tokenizer need see each word once. Only characters
count that releases of Unicode since 5.1 do not class otherwise, and that no neighbour changes in normal form C: the
libraries know different releases. Scripts without blanks between words, whose words hardly recur, are left out.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

_BLOCKS = (
    (0x20, 0x7E), (0xA0, 0x24F),  # Latin
    (0x388, 0x3CE), (0x400, 0x481), (0x48A, 0x4FF),  # Greek, Cyrillic
    (0x200D, 0x200D), (0x2009, 0x2009), (0x2010, 0x2027), (0x202F, 0x202F), (0x20AC, 0x20AC),  # marks, thin blanks
    (0x2190, 0x22FF), (0x2500, 0x2767), (0x2794, 0x27BF), (0xFE0F, 0xFE0F), (0x1F300, 0x1FAFF),  # symbols
)  # fmt: skip
_LEFT_OUT = "\u00ad\u017f"
"""A soft hyphen, which some remove, and ſ, which is an s to those that ignore case."""
_SYMBOLS = 0x2000
"""What is assigned in symbol blocks later is a symbol too; elsewhere it may become a letter."""


def _are_known() -> Iterator[str]:
    for first, last in _BLOCKS:
        for char in map(chr, range(first, last + 1)):
            is_assigned = unicodedata.category(char) != "Cn" or ord(char) > _SYMBOLS
            if is_assigned and unicodedata.is_normalized("NFC", char) and char not in _LEFT_OUT:
                yield char


_KNOWN = "".join(_are_known())
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Of the pre-tokenizer ByteLevel. Source: openai/gpt-2, src/encoder.py."""
_GPT2_SINGLE_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""The same between digits, each of which is a word: an end of what it sees is where a digit stands."""
_BERT = r"[\p{P}!-/:-@\[-`{-~]|[^\s\p{P}!-/:-@\[-`{-~]+"
"""Words of BERT: punctuation, and what stands between it and white space."""
_PARTS = re.compile(
    r"(?:\\p\{(?:L|N|M|Lu|Ll|Lt|Lm|Lo)\}|\\[sSrn]|\(\?[i:!]:?|\[\^?|[\])|?*+ '/]|[a-z]|\{[0-9],[0-9]\})+"
)
"""What patterns are made of that mean the same to both libraries."""
_REPEATED_TWICE = re.compile(r"(?:[?*+]|[0-9]\})[?*+]")
_CLASS = re.compile(r"\\p\{(\w+)\}|\\.|[\[\]]")


@dataclass(frozen=True, slots=True)
class WordRule:
    """Words of a text without control tokens."""

    words: re.Pattern[str]
    unknown: re.Pattern[str]
    """A character that the rule may not hold for."""
    leaves_out: bool
    """Whether white space is no part of any word."""

    def split(self, text: str) -> list[str] | None:
        """The words in order; None: only the tokenizer itself can tell."""
        if self.unknown.search(text):
            return None
        words = self.words.findall(text)
        return words if self.leaves_out or sum(map(len, words)) == len(text) else None


def find_rule(backend: Tokenizer) -> WordRule | None:
    """The rule of a tokenizer, if it is one that is known and its words are tokenized by themselves."""
    try:
        normalizer, step = _state(backend.normalizer), _state(backend.pre_tokenizer)
    except Exception:  # steps written in Python have no state to be read
        return None
    if getattr(backend.model, "dropout", None):  # the same word has other tokens each time
        return None
    steps = step.get("pretokenizers", [step])
    if (normalizer.get("type"), [each.get("type") for each in steps]) == ("BertNormalizer", ["BertPreTokenizer"]):
        return WordRule(_translated(_BERT), _unknown(), leaves_out=True)
    pattern = _byte_level(steps) if normalizer.get("type") in (None, "NFC") else None
    try:
        return None if pattern is None else WordRule(_translated(pattern), _unknown(), leaves_out=False)
    except re.error:
        return None


def _byte_level(steps: Iterable[Mapping[str, Any]]) -> str | None:
    match [_name(step) for step in steps]:
        case ["words"]:
            return _GPT2
        case ["digits", "words"]:
            return _GPT2_SINGLE_DIGITS
        case [str(pattern), "bytes"] if _PARTS.fullmatch(pattern) and not _REPEATED_TWICE.search(pattern):
            return pattern
    return None


def _name(step: Mapping[str, Any]) -> str | None:
    """Of a step of byte-level tokenizers, or the pattern that it splits by."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step["pattern"].get("Regex")
        return pattern if isinstance(pattern, str) else None
    return None


def _state(step: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = {} if step is None else json.loads(step.__getstate__())
    return found


def _unknown() -> re.Pattern[str]:
    return re.compile(f"[^\t\n\r{_ranges(_KNOWN)}]")


def _translated(pattern: str) -> re.Pattern[str]:
    """The pattern with classes of Unicode spelled out."""
    is_inside = False

    def spelled(found: re.Match[str]) -> str:
        nonlocal is_inside
        if found.group() in "[]":
            is_inside = found.group() == "["
        if found.group(1) is None:
            return found.group()
        members = _ranges(char for char in _KNOWN if unicodedata.category(char).startswith(found.group(1)))
        return members if is_inside else f"[{members}]"

    return re.compile(_CLASS.sub(spelled, pattern))


def _ranges(characters: Iterable[str]) -> str:
    """Rising characters as the inside of a class."""
    ranges: list[list[int]] = []
    for code in map(ord, characters):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
