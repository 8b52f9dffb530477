"""Texts that belong together: {"anchor": "...", "positive": "..."}, with hard negatives or without; or two sentences
and their score: {"sentence1": "...", "sentence2": "...", "score": 0.8}.

Read as well: query for anchor; negative, negative_1, negative_2, ..., and negatives, each a text or a list of texts.
"""

from __future__ import annotations

from typing import Any

from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, Part, Problem, Shape, Source

NAME: Shape = "text_pairs"
_ANCHORS = ("anchor", "query", "sentence1")
NEGATIVES = ("negative", *(f"negative_{i}" for i in range(1, 11)), "negatives")
FIELDS = ("anchor", "positive", "query", "sentence1", "sentence2", "score", *NEGATIVES)
REQUIRED = ("anchor", "positive")
INPUTS = ("anchor",)


def matches(record: dict[str, Any]) -> bool:
    return record.keys() >= {"sentence1", "sentence2", "score"} or (
        "positive" in record and not record.keys().isdisjoint(_ANCHORS)
    )


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: its anchor, and as branches its positive and negatives. Not `answered`: the anchor alone.

    `values` holds the score, if there is one.
    """
    found = RowProblems(source)
    first = next((key for key in _ANCHORS if key in record), "anchor")
    parts = (Part(first, found.answer(record, first, "empty"), False),)
    if not answered:
        return found.problems or Example(parts, source, NAME)
    second = "sentence2" if first == "sentence1" and "positive" not in record else "positive"
    texts = [Part(second, found.answer(record, second, "empty"), False)]
    for key in (key for key in NEGATIVES if record.get(key) is not None):
        texts += [Part("negative", text, False) for text in found.answers(record[key], key, "empty")]
    has_score = record.get("score") is not None or "sentence2" in record
    values = tuple(found.numbers(record.get("score"), 1, "score")) if has_score else ()
    if not found.problems and not values:
        _compare(parts[0], texts, found)
    branches = tuple((part,) for part in texts)
    return found.problems or Example(parts, source, NAME, branches=branches, values=values)


def _compare(anchor: Part, texts: list[Part], found: RowProblems) -> None:
    """Problems of texts that teach nothing, or the contrary."""
    positive, *negatives = (part.text.strip() for part in texts)
    if positive == anchor.text.strip():
        found.add("identical_texts", f"{anchor.role} and positive are the same text.", "Remove the row.")
    for text in dict.fromkeys(negatives):
        if text in (positive, anchor.text.strip()):
            same = "positive" if text == positive else anchor.role
            found.add("identical_texts", f"a negative is the same text as {same}: {text[:40]!r}.", "Remove it.")
