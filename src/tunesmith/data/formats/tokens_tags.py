"""Sentences, word by word, and a tag for each: {"tokens": ["Ann", "sings"], "tags": ["B-PER", "O"]}."""

from __future__ import annotations

from typing import Any

from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, Part, Problem, Shape, Source

NAME: Shape = "tokens_tags"
FIELDS = ("tokens", "tags")
REQUIRED = ("tokens", "tags")
INPUTS = ("tokens",)


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: a part a word, and as many labels."""
    found = RowProblems(source)
    words = _list(record, "tokens", found)
    for i, word in enumerate(words):
        if not isinstance(word, str):
            found.wrong_type(f"tokens[{i}]", word, "text")
    if isinstance(record.get("tokens"), list) and not words:
        found.add("no_text", "tokens is empty: there is nothing to learn.", "Remove the row.")
    tags: tuple[str, ...] = ()
    if answered:
        tags = found.labels(_list(record, "tags", found), "tags")
        if not found.problems and len(tags) != len(words):
            message = f"tokens has {len(words):,} entries, but tags has {len(tags):,}."
            found.add("ragged_tags", message, "Each word needs one tag.")
    return found.problems or Example(tuple(Part("word", word, False) for word in words), source, NAME, labels=tags)


def _list(record: dict[str, Any], key: str, found: RowProblems) -> list[Any]:
    value = record.get(key)
    if isinstance(value, list):
        return value
    if value is None:
        found.text(record, key)
    else:
        found.wrong_type(key, value, 'a list such as ["Ann", "sings"]')
    return []
