"""Paired comparison of two evaluations of the same rows: clear differences, and the rows on which one is better.

Works on the lines of a run's evaluation/<name>.jsonl. Rows are matched by the hash of their content. Both sides are
resampled by the same draws (paired bootstrap), so that what is hard or easy for both cancels out.
"""

# I rows in common

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import InputError
from tunesmith.evaluation.bootstrap import Interval, Statistic, paired_intervals, ratio, value_of
from tunesmith.evaluation.metrics import FEWEST_ROWS
from tunesmith.evaluation.preference_scores import HABITS, by_habit, column
from tunesmith.evaluation.retrieval_scores import by_bm25
from tunesmith.evaluation.scores import (
    ANSWER_SCORES,
    RowKind,
    RowResult,
    by_key,
    keyed,
    kind_of,
    names_in,
    num_right,
    statistics_of,
    sureness,
)

ROUNDING = 1e-9
"""Share of a value below which a difference is that of sums in another order, and none."""
TIE_NATS = 0.01
"""Losses per token that differ by less are a tie: one per cent of a token's probability, what rounding alone can do."""
TIE_SHARE = 0.01
"""Squared errors that differ by less than this share of the larger are a tie."""
_OTHER_WEIGHTS = "the two weigh classes differently (train.class_weights): {}"
CONSTANT_METRICS: Mapping[RowKind, tuple[str, ...]] = {
    "tokens": (),
    "classes": ("accuracy", "macro_f1"),
    "sets": ("label_accuracy", "exact_rows", "micro_f1", "macro_f1"),
    "numbers": ("mse",),
    "tags": ("tag_accuracy", "span_f1", "span_precision", "span_recall", "macro_f1"),
    "pairs": ("preference_accuracy",),
    "answers": ("preference_accuracy",),
    "rewards": ("preference_accuracy",),
    "ranks": ("recall_1", "recall_10", "mrr_10", "ndcg_10"),
    "similarities": (),
}
"""Metrics of an answer that is always the same, the one that the commonest answer is best at first."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of two evaluations on the rows they share."""

    a: float
    b: float
    b_minus_a: Interval
    num_rows: int
    """Rows, documents or answers behind it."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0: other rows of the same kind would hardly reverse the difference. Never of
        fewer than `FEWEST_ROWS`."""
        excludes_0 = self.b_minus_a["low"] > 0 or self.b_minus_a["high"] < 0
        return excludes_0 and self.b_minus_a["value"] != 0 and self.num_rows >= FEWEST_ROWS

    def as_change(self) -> dict[str, Any]:
        """The difference as a report keeps it: value, low, high, is_clear."""
        return {**self.b_minus_a, "is_clear": self.is_clear}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Evaluation B against evaluation A."""

    kind: RowKind
    num_rows: int
    """Rows in common."""
    only_a: int
    only_b: int
    are_documents: bool
    """Whether rows are documents, their windows added up."""
    same_targets: bool
    """False: the models split the texts into other tokens, so losses per token, perplexity and token accuracy do not
    compare; bits per byte do."""
    loss_note: str
    """A note on the loss where the two weigh classes differently, else empty."""
    metrics: dict[str, Difference]
    """By the keys of `METRICS`."""
    won: list[tuple[RowResult, RowResult]]
    """Rows (of A, of B) on which B is better, clearest first: right instead of wrong, or of lower loss."""
    lost: list[tuple[RowResult, RowResult]]
    """Rows on which B is worse, clearest first."""

    @property
    def num_ties(self) -> int:
        return self.num_rows - len(self.won) - len(self.lost)


def compare_rows(
    rows_a: Iterable[RowResult], rows_b: Iterable[RowResult], *, classes: Sequence[str] = ()
) -> Comparison:
    """B against A on the rows they share. `classes` of the head of both; empty: those that the rows name.

    Raises InputError where they share no row, or are of different kinds.
    """
    a_by_key, b_by_key = by_key(rows_a), by_key(rows_b)
    shared = [key for key in a_by_key if key in b_by_key]
    if not shared:
        raise InputError(
            f"they have no row in common (the first has {len(a_by_key):,}, the second {len(b_by_key):,}), and only "
            "evaluations of the same rows can be compared. Measure both on one file with tunesmith eval."
        )
    a, b = [a_by_key[key] for key in shared], [b_by_key[key] for key in shared]
    kinds = [{kind_of(row) for row in rows} for rows in (a, b)]
    if len(kinds[0] | kinds[1]) > 1:
        first, second = (" and ".join(sorted(kind)) for kind in kinds)
        raise InputError(f"the first was measured on {first}, the second on {second}: only one task can be compared.")
    kind = kinds[0].pop()
    same_targets, loss_note = all(was["count"] == now["count"] for was, now in zip(a, b, strict=True)), ""
    names = classes or names_in((*a, *b))
    metrics = paired(len(a), *(statistics_of(kind, rows, names, complete=bool(classes)) for rows in (a, b)))
    if kind != "tokens" and not same_targets:
        same_targets = True
        if kind == "classes":
            unweighted = ({"loss": ratio(column(rows, "loss") / column(rows, "count"))} for rows in (a, b))
            metrics, loss_note = {**metrics, **paired(len(a), *unweighted)}, "the loss is compared without weights"
        else:
            loss_note = "a row's loss is that of all its words together, so the losses do not compare"
            del metrics["loss"]
        loss_note = _OTHER_WEIGHTS.format(loss_note)
    gains_I = [_gain(kind, was, now) for was, now in zip(a, b, strict=True)]
    order = sorted(range(len(shared)), key=lambda i: -abs(gains_I[i]))
    return Comparison(
        kind=kind,
        num_rows=len(shared),
        only_a=len(a_by_key) - len(shared),
        only_b=len(b_by_key) - len(shared),
        are_documents=any("bytes" in row for row in a),
        same_targets=same_targets,
        loss_note=loss_note,
        metrics=metrics,
        won=[(a[i], b[i]) for i in order if gains_I[i] > 0],
        lost=[(a[i], b[i]) for i in order if gains_I[i] < 0],
    )


def compare_runs(sides: Sequence[Sequence[RowResult]]) -> list[Comparison]:
    """Each further evaluation against the first, all on the rows that every one of them has.

    Raises InputError as `compare_rows`.
    """
    if len(sides) == 2:
        return [compare_rows(*sides)]
    shared = set.intersection(*({key for key, _ in keyed(rows)} for rows in sides))
    if not shared:
        raise InputError(f"the {len(sides)} evaluations have no row that is in all of them. Measure all on one file.")
    first, *others = ([row for key, row in keyed(rows) if key in shared] for rows in sides)
    return [compare_rows(first, rows) for rows in others]


def _gain(kind: RowKind, was: RowResult, now: RowResult) -> float:
    """Gain of B on a row, 0 for a tie: by what is right, then by the probability that B gives it."""
    if kind == "similarities":  # their loss is that of all rows together
        return 0.0
    if kind not in ("tokens", "numbers"):
        return (num_right(now) - num_right(was)) * (1 + sureness(now))
    gain = float(was["loss"] - now["loss"])  # of the whole row, so that models with other tokens compare
    if kind == "tokens":
        return 0.0 if abs(gain) < TIE_NATS * max(was["count"], now["count"]) else gain
    return 0.0 if abs(gain) <= TIE_SHARE * max(was["loss"], now["loss"]) else gain


def paired(num: int, of_a: Mapping[str, Statistic], of_b: Mapping[str, Statistic]) -> dict[str, Difference]:
    """Each metric on both sides, and the interval of its difference where both are drawn together."""
    values = {key: (value_of(of_a[key], num), value_of(of_b[key], num)) for key in of_a}
    differences = {
        key: 0.0 if math.isclose(was, now, rel_tol=ROUNDING) else now - was for key, (was, now) in values.items()
    }
    found = paired_intervals(num, of_a, of_b, differences)
    return {key: Difference(*values[key], found[key], num) for key in of_a}


def compare_answers(
    answers_a: Iterable[Mapping[str, Any]], answers_b: Iterable[Mapping[str, Any]]
) -> tuple[int, dict[str, Difference]]:
    """The number of prompts that both answered (of one source, with one reference), and the differences in scores.

    Works on the lines of a run's evaluation/answers-<name>.jsonl.
    """
    of_a, of_b = (
        {(one["source"], one["prompt"], one["reference"]): one for one in answers} for answers in (answers_a, answers_b)
    )
    shared = sorted(of_a.keys() & of_b.keys())
    sides = [{key: ratio(column([of[one] for one in shared], key)) for key in ANSWER_SCORES} for of in (of_a, of_b)]
    return len(shared), paired(len(shared), *sides) if shared else {}


def answers_against_constant(answers: Sequence[Mapping[str, Any]], constant: str) -> Difference:
    """Answers exactly right (B) against those if `constant` were always given (A); paired."""
    always = ratio([float(one["reference"].strip() == constant) for one in answers])
    given = ratio(column(answers, "exact_match"))
    return paired(len(answers), {"exact_match": always}, {"exact_match": given})["exact_match"]


def rows_against_constant(
    rows: Sequence[RowResult], constant: Any, *, classes: Sequence[str] = ()
) -> dict[str, Difference]:
    """The model of the rows (B) against always answering `constant` (A): a class, a list of classes, a number, or the
    tag of every word. Paired: both on the same rows."""
    units = list(by_key(rows).values())
    kind = kind_of(units[0])
    said: list[RowResult] = [
        {**row, "predicted": [constant] * len(row["tags"]) if kind == "tags" else constant} for row in units
    ]
    if kind in HABITS:
        said = by_habit(kind, units, constant)
    elif kind == "ranks":
        said = by_bm25(units)
    names = classes or names_in((*units, *said))
    sides = (statistics_of(kind, some, names, complete=True) for some in (said, units))
    of_constant, of_model = ({key: side[key] for key in side if key in CONSTANT_METRICS[kind]} for side in sides)
    return paired(len(units), of_constant, of_model)
