"""Documents that answer a query, and others: {"query": "...", "documents": ["...", "..."], "labels": [1, 0]}, or
scores. Read as well: positive with negatives, as in text_pairs; and a document a row, with its label or score.
"""

from __future__ import annotations

from typing import Any

from tunesmith.data.formats import text_pairs
from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, Part, Problem, Shape, Source

NAME: Shape = "ranked_documents"
_WANTED = ("labels", "scores", "label", "score")
FIELDS = ("query", "documents", "document", *_WANTED, "positive", *text_pairs.NEGATIVES)
REQUIRED = ("query", "documents", "labels")
INPUTS = ("query", "document")


def matches(record: dict[str, Any]) -> bool:
    return "query" in record and not record.keys().isdisjoint(("documents", "document", "positive"))


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: its query, and a branch for each document, with its score as label.

    Not `answered`: query and one document, as two parts.
    """
    found = RowProblems(source)
    query = Part("query", found.answer(record, "query", "empty"), False)
    if not answered:
        document = Part("document", found.answer(record, "document", "empty"), False)
        return found.problems or Example((query, document), source, NAME)
    if "positive" in record:
        pair = text_pairs.parse(record, source)
        if isinstance(pair, list):
            return pair
        texts, wanted = [one.text for (one,) in pair.branches], [1.0] + [0.0] * (len(pair.branches) - 1)
    else:
        texts = found.answers(record.get("documents", record.get("document")), "documents", "empty")
        key = next((key for key in _WANTED if key in record), "labels")
        wanted = found.numbers(record.get(key), len(texts), key)
        if not texts:
            found.add("missing_field", "documents is empty.", "Give it a document, or remove the row.")
    branches = tuple((Part("document", text, False),) for text in texts)
    return found.problems or Example((query,), source, NAME, labels=tuple(map(repr, wanted)), branches=branches)
