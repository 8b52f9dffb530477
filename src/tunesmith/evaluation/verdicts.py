"""Verdicts on an evaluation in sentences: against the model before training, and against one constant answer.

A new head answers at random before it is trained, so that only the second comparison says anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tunesmith.evaluation.compare import (
    CONSTANT_METRICS,
    answers_against_constant,
    compare_answers,
    compare_rows,
    rows_against_constant,
)
from tunesmith.evaluation.metrics import FEW_ROWS, FEWEST_ROWS, info_of
from tunesmith.evaluation.preference_scores import HABITS
from tunesmith.evaluation.scores import RowResult, are_short, kind_of

MOST_NAMED = 3
"""Classes without a right row that are named; of more the number is said."""
LIKE_A_CLASS = 0.1
"""Share of equal short answers from which they are taken for classes."""
_MOST_CHARACTERS = 40
UNLEARNT = -0.5
"""Nats a token of chosen answers that a model may lose before that is noted."""
_NAMES = {"numbers": "mean baseline", "ranks": "BM25"}
_HABITS = {
    "longer_chosen": "always choosing the longer answer",
    "likelier_chosen": "choosing what the untouched model finds likelier",
    "bm25": "the order of words that both share",
}


def changes(
    before: Sequence[RowResult],
    after: Sequence[RowResult],
    answers_before: Iterable[Mapping[str, Any]],
    answers_after: Iterable[Mapping[str, Any]],
    *,
    classes: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """By metric {"value", "low", "high", "is_clear"} of after minus before, paired; {} where rows are not kept."""
    found = compare_rows(before, after, classes=classes).metrics if before and after else {}
    _, of_answers = compare_answers(answers_before, answers_after)
    return {key: differs.as_change() for key, differs in {**found, **of_answers}.items()}


def row_baseline(rows: Sequence[RowResult], constant: Mapping[str, Any] | None, classes: Sequence[str] = ()) -> Any:
    """Metrics of a constant answer on the same rows, JSON-ready; None for tasks without one, or if it is not known.

    `constant` is {"answer", "from"} of `score`. In {"name", "words", "from", "rows", "key", "measures"}, `key` is the
    metric of the verdict; each metric has the baseline's value and the paired change to the model.
    """
    if constant is None or not rows:
        return None
    kind = kind_of(rows[0])
    found = rows_against_constant(rows, constant["answer"], classes=classes)
    return {
        "name": _NAMES.get(kind, "best habit" if kind in HABITS else "majority baseline"),
        "words": _HABITS.get(constant["answer"], "") if kind in (*HABITS, "ranks") else _words(constant["answer"]),
        "from": constant["from"],
        "rows": len(rows),
        "key": CONSTANT_METRICS[kind][0],
        "measures": {key: {"value": differs.a, "change": differs.as_change()} for key, differs in found.items()},
    }


def answer_baseline(answers: Sequence[Mapping[str, Any]]) -> Any:
    """Metrics of always giving the commonest reference, for short answers that name classes; None for others."""
    if not are_short([one["reference"] for one in answers]):
        return None
    usual, num = Counter(one["reference"].strip() for one in answers).most_common(1)[0]
    if num < max(2, LIKE_A_CLASS * len(answers)):
        return None
    differs = answers_against_constant(answers, usual)
    return {
        "name": "majority baseline",
        "words": _words(usual),
        "from": "the answers measured",
        "rows": len(answers),
        "key": "exact_match",
        "measures": {"exact_match": {"value": differs.a, "change": differs.as_change()}},
    }


def _words(answer: Any) -> str:
    if isinstance(answer, float):
        return f"always answering the mean, {answer:.6g}"
    if isinstance(answer, list):
        return f"always answering {', '.join(map(named, answer))}" if answer else "always answering no class"
    return f"always answering {named(answer)}"


def named(label: str) -> str:
    """A class name in a sentence."""
    flat = " ".join(str(label).split())
    return f"`{flat}`" if len(flat) <= _MOST_CHARACTERS else f"`{flat[:_MOST_CHARACTERS]}…`"


def baseline_sentence(measures: Mapping[str, Mapping[str, Any]], baseline: Mapping[str, Any]) -> str:
    """accuracy is 67.3% (62.8–72.0), against 65.4% for always answering `positive` (majority baseline): …"""
    key = baseline["key"]
    info, its = info_of(key), baseline["measures"][key]
    value, ends = info.text(measures[key]["value"]), info.bounds(measures[key])
    where = "" if baseline["from"] == "the training rows" else f" of {baseline['from']}"
    return (
        f"{info.label} is {value}{f' ({ends})' if ends else ''}, against {info.text(its['value'])} for "
        f"{baseline['words']} ({baseline['name']}{where}): {verdict_words(key, its['change'])}"
    )


def capitalized(sentence: str) -> str:
    """The sentence with a capital at its beginning."""
    return sentence[:1].upper() + sentence[1:]


def verdict_words(key: str, change: Mapping[str, Any]) -> str:
    """A paired difference and its verdict: +3.2 (+1.0 to +5.1) points, better."""
    info = info_of(key)
    verdict = info.verdict(change)
    if change["value"] == 0:
        return "the same"
    words = {"better": ", better", "worse": ", worse", "unclear": ", which may be chance"}
    return info.difference(change) + words.get(verdict, "")


def never_right(details: Mapping[str, Any]) -> Iterator[str]:
    """A sentence that names the classes of which no held-out row is right, if there are any."""
    rows = details.get("per_class") or details.get("per_type") or ()
    unit = "span" if rows and "type" in rows[0] and "confusion" not in details else "row"
    if rows and "type" in rows[0] and {row["type"] for row in rows} <= set(details.get("labels", ())):
        unit = "word"  # tags that do not mark spans are counted word by word
    never = sorted(
        ((row["label"] if "label" in row else row["type"], row["support"]) for row in rows
         if row["support"] and not row["recall"]),
        key=lambda pair: -pair[1],
    )  # fmt: skip
    if never:
        listed = [f"{named(name)} ({support:,} {unit}{'' if support == 1 else 's'})" for name, support in never]
        more = len(never) - MOST_NAMED
        listed = listed[:MOST_NAMED] + ([f"{more:,} more"] if more > 0 else [])
        words = f"{', '.join(listed[:-1])} and {listed[-1]}" if len(listed) > 1 else listed[0]
        yield f"{words} {'is' if len(never) == 1 else 'are'} never right."


def too_few(num: int, unit: str) -> Iterator[str]:
    """A sentence that warns of few rows, if they are few."""
    count = f"{num:,} {unit}{'' if num == 1 else 's'} {'is' if num == 1 else 'are'}"
    way = "Hold out more: data.held_out, or a file with --eval."
    if num < FEWEST_ROWS:
        yield f"{count} too few to conclude anything: below {FEWEST_ROWS} nothing is called better or worse. {way}"
    elif num < FEW_ROWS:
        yield f"{count} few: on other {unit}s of the same kind this may turn out differently. {way}"


def preference_notes(measures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Sentences on a model of preferences that went wrong; none for other tasks."""
    if "preference_accuracy" not in measures:
        return
    value = {key: one["value"] for key, one in measures.items()}
    accuracy = value["preference_accuracy"]
    if measures["preference_accuracy"].get("high", 1.0) < min(value[habit] for habit in _HABITS if habit in value):
        yield (
            f"{accuracy:.1%} of the held-out preferences are right, fewer than by choosing the longer answer or the "
            "likelier one: chosen and rejected may be the wrong way round"
        )
    chosen, rejected = (value.get(key, 0.0) for key in ("chosen_shift", "rejected_shift"))
    if chosen < UNLEARNT:
        yield (
            f"chosen answers lost {-chosen:.2f} nats a token, rejected ones {-rejected:.2f}: the model unlearns both. "
            "prefer.nll: 1 keeps the chosen ones likely, and so does a lower optim.lr"
        )
