"""Texts: documents, with summaries or labels, words with tags, and texts that belong together.

{"text": "..."}, or a .txt or .md file each
{"document": "...", "summary": "..."}
{"text": "...", "label": "...", "text_pair": "..."}: one text or two, and a class, a list of classes or a number
{"tokens": ["Ann", "sings"], "tags": ["B-PER", "O"]}
{"anchor": "...", "positive": "..."}, with hard negatives or without; query for anchor; negative, negative_1,
    negative_2, ..., and negatives, each a text or a list of texts
{"sentence1": "...", "sentence2": "...", "score": 0.8}
{"query": "...", "documents": ["...", "..."], "labels": [1, 0]}, or scores; a document a row; positive, negatives
"""

from __future__ import annotations

from typing import Any

from tunesmith.data.formats.format import Format
from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, JsonObject, Part, Problem, Record, Source

_ANCHORS = ("anchor", "query", "sentence1")
_NEGATIVES = ("negative", *(f"negative_{i}" for i in range(1, 11)), "negatives")
_WANTED = ("labels", "scores", "label", "score")


def _parse_text(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: all of it is trained."""
    check = RowProblems(source)
    text = check.text(record, "text")
    if answered and isinstance(record.get("text"), str) and not text.strip():
        check.add("no_text", "it holds no text: there is nothing to learn.", "Remove it.")
    return check.problems or Example((Part("text", text, True),), source, "text", plain=True)


def _parse_summary(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: the summary is trained."""
    check = RowProblems(source)
    parts = [Part("document", check.text(record, "document"), False)]
    if answered:
        parts.append(Part("summary", check.answer(record, "summary"), True))
    return check.problems or Example(tuple(parts), source, "document_summary", plain=True)


def _parse_label(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row. A label is text, a number, true or false; a list says which classes hold."""
    check = RowProblems(source)
    parts = [Part("text", check.text(record, "text"), False)]
    if record.get("text_pair") is not None:
        parts.append(Part("text_pair", check.text(record, "text_pair"), False))
    label = record.get("label")
    labels: tuple[str, ...] = ()
    if answered and label is None:
        check.text(record, "label")
    elif answered:
        labels = check.labels(label, "label") if isinstance(label, list) else (check.label(label, "label"),)
        twice = next((name for i, name in enumerate(labels) if name in labels[:i]), None)
        if twice:
            check.add("bad_label", f"label names {twice[:40]!r} twice.", "Name it once.")
    many = answered and isinstance(label, list)
    return check.problems or Example(tuple(parts), source, "text_label", labels=labels, many=many)


def _parse_tags(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: a part a word, and as many labels."""
    check = RowProblems(source)
    words = _list(record, "tokens", check)
    for i, word in enumerate(words):
        if not isinstance(word, str):
            check.wrong_type(f"tokens[{i}]", word, "text")
    if isinstance(record.get("tokens"), list) and not words:
        check.add("no_text", "tokens is empty: there is nothing to learn.", "Remove the row.")
    tags: tuple[str, ...] = ()
    if answered:
        tags = check.labels(_list(record, "tags", check), "tags")
        if not check.problems and len(tags) != len(words):
            message = f"tokens has {len(words):,} entries, but tags has {len(tags):,}."
            check.add("ragged_tags", message, "Each word needs one tag.")
    return check.problems or Example(
        tuple(Part("word", word, False) for word in words), source, "tokens_tags", labels=tags
    )


def _list(record: JsonObject, key: str, check: RowProblems) -> list[Any]:
    value = record.get(key)
    if isinstance(value, list):
        return value
    if value is None:
        check.text(record, key)
    else:
        check.wrong_type(key, value, 'a list such as ["Ann", "sings"]')
    return []


def _has_pair(record: Record) -> bool:
    return record.keys() >= {"sentence1", "sentence2", "score"} or (
        "positive" in record and not record.keys().isdisjoint(_ANCHORS)
    )


def _parse_pair(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: its anchor, and as branches positive and negatives. Not `answered`: the anchor.

    `values` holds the score, if there is one.
    """
    check = RowProblems(source)
    first = next((key for key in _ANCHORS if key in record), "anchor")
    parts = (Part(first, check.answer(record, first, "empty"), False),)
    if not answered:
        return check.problems or Example(parts, source, "text_pairs")
    second = "sentence2" if first == "sentence1" and "positive" not in record else "positive"
    texts = [Part(second, check.answer(record, second, "empty"), False)]
    for key in (key for key in _NEGATIVES if record.get(key) is not None):
        texts += [Part("negative", text, False) for text in check.answers(record[key], key, "empty")]
    has_score = record.get("score") is not None or "sentence2" in record
    values = tuple(check.numbers(record.get("score"), 1, "score")) if has_score else ()
    if not check.problems and not values:
        _compare(parts[0], texts, check)
    branches = tuple((part,) for part in texts)
    return check.problems or Example(parts, source, "text_pairs", branches=branches, values=values)


def _compare(anchor: Part, texts: list[Part], check: RowProblems) -> None:
    """Problems of texts that teach nothing, or the contrary."""
    positive, *negatives = (part.text.strip() for part in texts)
    if positive == anchor.text.strip():
        check.add("identical_texts", f"{anchor.role} and positive are the same text.", "Remove the row.")
    for text in dict.fromkeys(negatives):
        if text in (positive, anchor.text.strip()):
            same = "positive" if text == positive else anchor.role
            check.add("identical_texts", f"a negative is the same text as {same}: {text[:40]!r}.", "Remove it.")


def _parse_ranked(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: its query, and a branch for each document, with its score as label.

    Not `answered`: query and one document, as two parts.
    """
    check = RowProblems(source)
    query = Part("query", check.answer(record, "query", "empty"), False)
    if not answered:
        document = Part("document", check.answer(record, "document", "empty"), False)
        return check.problems or Example((query, document), source, "ranked_documents")
    if "positive" in record:
        pair = _parse_pair(record, source)
        if isinstance(pair, list):
            return pair
        texts, wanted = (
            [document_part.text for (document_part,) in pair.branches],
            [1.0] + [0.0] * (len(pair.branches) - 1),
        )
    else:
        texts = check.answers(record.get("documents", record.get("document")), "documents", "empty")
        key = next((key for key in _WANTED if key in record), "labels")
        wanted = check.numbers(record.get(key), len(texts), key)
        if not texts:
            check.add("missing_field", "documents is empty.", "Give it a document, or remove the row.")
    branches = tuple((Part("document", text, False),) for text in texts)
    return check.problems or Example(
        (query,), source, "ranked_documents", labels=tuple(map(repr, wanted)), branches=branches
    )


TEXT = Format("text", _parse_text, ("text",), ("text",), ("text",))
DOCUMENT_SUMMARY = Format(
    "document_summary", _parse_summary, ("document", "summary"), ("document", "summary"), ("document",)
)
TEXT_LABEL = Format("text_label", _parse_label, ("text", "label", "text_pair"), ("text", "label"), ("text",))
TOKENS_TAGS = Format("tokens_tags", _parse_tags, ("tokens", "tags"), ("tokens", "tags"), ("tokens",))
TEXT_PAIRS = Format(
    "text_pairs",
    _parse_pair,
    ("anchor", "positive", "query", "sentence1", "sentence2", "score", *_NEGATIVES),
    ("anchor", "positive"),
    ("anchor",),
    matches=_has_pair,
)
RANKED_DOCUMENTS = Format(
    "ranked_documents",
    _parse_ranked,
    ("query", "documents", "document", *_WANTED, "positive", *_NEGATIVES),
    ("query", "documents", "labels"),
    ("query", "document"),
    matches=lambda record: "query" in record and not record.keys().isdisjoint(("documents", "document", "positive")),
)
