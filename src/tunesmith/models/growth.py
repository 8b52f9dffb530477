"""The factor by which a tokenizer.json lengthens a text before it splits it: replacements in a row multiply."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from tunesmith.errors import ModelError
from tunesmith.types import JsonObject

MOST_FOR_ONE = 256
"""Characters for one: Unicode's own forms make 18 at most, which some files apply twice."""
_WHOLE = re.compile(r"(?:\\s|[\w ])(?:\+|\{[1-9]\d*,\d*\})?")
"""A regular expression that takes away a character at least; others can match nothing, at each character."""


def check_growth(file: Path) -> None:
    """Raise `ModelError` for a tokenizer.json that makes more than `MOST_FOR_ONE`
    characters of one in text or answer.

    It is read before the tokenizers library loads it, which rewrites its added tokens then.
    """
    try:
        content = orjson.loads(file.read_bytes())
    except (OSError, ValueError):  # missing, or not JSON: said when it is loaded
        return
    for part in ("normalizer", "pre_tokenizer", "decoder") if isinstance(content, dict) else ():
        most = 1
        for step in _steps(content.get(part)):
            most *= _factor(step)
            if most > MOST_FOR_ONE:
                raise ModelError(
                    f"{file}: its {part} makes more than {MOST_FOR_ONE} characters of one, by replacements one "
                    "after the other: a row could take all memory. Use another, and look at this one before "
                    "you trust its source."
                )


def _steps(part: Any) -> Iterator[JsonObject]:
    """The steps of a part, those within sequences too."""
    open_parts = [part]
    while open_parts:
        step = open_parts.pop()
        if isinstance(step, list):
            open_parts += step
        elif isinstance(step, dict):
            yield step
            open_parts += [step.get(name) for name in ("normalizers", "pretokenizers", "decoders")]


def _factor(step: JsonObject) -> int:
    """The most characters that a step makes of one."""
    kind, pattern, content = step.get("type"), step.get("pattern"), step.get("content")
    if kind == "ByteLevel":
        return 2
    if kind == "Precompiled":
        return _longest(step.get("precompiled_charsmap"))
    if kind != "Replace" or not isinstance(content, str) or not isinstance(pattern, dict):
        return 1
    text, expression = pattern.get("String"), str(pattern.get("Regex"))
    if isinstance(text, str) and text:
        return max(1, -(-len(content) // len(text)))
    return max(1, len(content) + (_WHOLE.fullmatch(expression) is None))


def _longest(charsmap: Any) -> int:
    """Characters of the longest text in SentencePiece's map: a size, a trie of it, texts that end in NUL."""
    try:
        raw = base64.b64decode(charsmap)
    except (TypeError, ValueError):
        return 1
    texts = raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")
    return max(1, *(len(text.decode("utf-8", "replace")) for text in texts))
