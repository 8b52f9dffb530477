"""Paired comparison of two evaluations of the same rows: clear differences, and verdicts in sentences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.errors import InputError
from tunesmith.evaluation.bootstrap import Interval, Statistic, paired_intervals, ratio, rows_behind, value_of
from tunesmith.evaluation.branch_scores import HABITS, by_bm25, column
from tunesmith.evaluation.graded_scores import least_drawn, with_one_k
from tunesmith.evaluation.metrics import FEW_ROWS, FEWEST_ROWS, info_of
from tunesmith.evaluation.scores import (
    ANSWER_SCORES,
    RowKind,
    RowResult,
    are_short,
    by_key,
    keyed,
    kind_of,
    names_in,
    num_right,
    statistics_of,
    sureness,
)
from tunesmith.phrases import percent, plural
from tunesmith.types import JsonObject, Record

# I rows in common


ROUNDING = 1e-9
"""Share of a value below which a difference is mere rounding of sums in another order."""
TIE_NATS = 0.01
"""Losses per token that differ by less tie: one per cent of a token's probability, as rounding can do."""
TIE_SHARE = 0.01
"""Squared errors that differ by less than this share of the larger are a tie."""
_OTHER_WEIGHTS = "the two weigh classes differently (train.class_weights): {}"
NEAR_POOL = (
    "the two searched different documents, since training rows are searched too: compared here are the ranks "
    "among the documents of the measured rows alone"
)
OTHER_POOLS = (
    "the two searched different documents, so their ranks and losses cannot be compared. Measure both on one file "
    "with tunesmith eval"
)
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
    "graded": (),
    "taught": (),
}
"""Metrics of an answer that is always the same, the one that the commonest answer is best at first."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of two evaluations on the rows they share."""

    a: float
    b: float
    b_minus_a: Interval
    num_rows: int
    """Rows, documents or answers behind it; fewer if they weigh unlike or some do not count: `rows_behind`."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0: other rows of the same kind would hardly reverse the difference.
        Never of fewer than `FEWEST_ROWS`."""
        excludes_0 = self.b_minus_a["low"] > 0 or self.b_minus_a["high"] < 0
        return excludes_0 and self.b_minus_a["value"] != 0 and self.num_rows >= FEWEST_ROWS

    def as_change(self) -> JsonObject:
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
    """False: the models split the texts into other tokens, so losses per token, perplexity and token accuracy
    cannot be compared; bits per byte can."""
    loss_note: str
    """A note where the two weigh classes differently, or searched other documents; else empty."""
    metrics: dict[str, Difference]
    """By the keys of `METRICS`."""
    won: list[tuple[RowResult, RowResult]]
    """Rows (of A, of B) on which B is better, clearest first: right instead of wrong, or of lower loss."""
    lost: list[tuple[RowResult, RowResult]]
    """Rows on which B is worse, clearest first."""
    drawn: int | None
    """Answers to each prompt that count, the k of pass@k; None: rows are not graded prompts."""

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
            f"they have no row in common (the first has {len(a_by_key):,}, the second {len(b_by_key):,}), and "
            "only evaluations of the same rows can be compared. Measure both on one file with tunesmith eval."
        )
    a, b = [a_by_key[key] for key in shared], [b_by_key[key] for key in shared]
    kinds = [{kind_of(row) for row in rows} for rows in (a, b)]
    if len(kinds[0] | kinds[1]) > 1:
        first, second = (" and ".join(sorted(kind)) for kind in kinds)
        raise InputError(f"the first was measured on {first}, the second on {second}: only one task can be compared.")
    kind = kinds[0].pop()
    (a, b), pool_note = _in_one_pool([a, b]) if kind == "ranks" else ([a, b], "")
    if kind == "graded":
        a, b = map(list[RowResult], with_one_k([a, b]))
    same_targets = all(was["count"] == now["count"] for was, now in zip(a, b, strict=True))
    loss_note = ""
    names = classes or names_in((*a, *b))
    metrics = paired(len(a), *(statistics_of(kind, rows, names, complete=bool(classes)) for rows in (a, b)))
    if kind != "tokens" and not same_targets:
        same_targets = True
        if kind == "classes":
            unweighted = ({"loss": ratio(column(rows, "loss") / column(rows, "count"))} for rows in (a, b))
            metrics = {**metrics, **paired(len(a), *unweighted)}
            loss_note = "the loss is compared without weights"
        else:
            loss_note = "a row has one loss for all its words, so the losses cannot be compared"
            del metrics["loss"]
        loss_note = _OTHER_WEIGHTS.format(loss_note)
    loss_note = loss_note or pool_note
    if pool_note == OTHER_POOLS:
        metrics, gains_I = {}, [0.0] * len(a)
    else:
        gains_I = [_gain(kind, was, now) for was, now in zip(a, b, strict=True)]
    counts_I = [row["count"] if kind == "tokens" else 1 for row in a]
    order = sorted(range(len(shared)), key=lambda i: -abs(gains_I[i]) / counts_I[i])
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
        drawn=least_drawn(a) if kind == "graded" else None,
    )


def _in_one_pool(sides: Sequence[Sequence[RowResult]]) -> tuple[list[list[RowResult]], str]:
    """The rows of all sides as ranked among the same documents, and a note if they were not so measured."""
    pools = [[(row.get("pool"), row.get("documents")) for row in rows] for rows in sides]
    if all(pool == pools[0] for pool in pools):
        return list(map(list, sides)), ""
    near: list[list[RowResult]] = [[{**row, **row.get("near", {})} for row in rows] for rows in sides]
    pools = [[(row.get("pool"), row["documents"]) for row in rows] for rows in near]
    are_known = all(pool is not None for pool, _ in pools[0])
    is_one = are_known and all(pool == pools[0] for pool in pools)
    return (near, NEAR_POOL) if is_one else (list(map(list, sides)), OTHER_POOLS)


def compare_runs(sides: Sequence[Sequence[RowResult]]) -> list[Comparison]:
    """Each further evaluation against the first, all on the rows that every one of them has.

    Raises InputError as `compare_rows`.
    """
    if len(sides) == 2:
        return [compare_rows(*sides)]
    shared = set.intersection(*({key for key, _ in keyed(rows)} for rows in sides))
    if not shared:
        raise InputError(f"the {len(sides)} evaluations have no row that is in all of them. Measure all on one file.")
    shared_rows = [[row for key, row in keyed(rows) if key in shared] for rows in sides]
    if all(kind_of(row) == "graded" for rows in shared_rows for row in rows):
        shared_rows = list(map(list[RowResult], with_one_k(shared_rows)))
    in_order = [list(by_key(rows).values()) for rows in shared_rows]
    are_ranks = kind_of(shared_rows[0][0]) == "ranks"
    (first, *others), note = _in_one_pool(in_order) if are_ranks else (shared_rows, "")
    compared = [compare_rows(first, other) for other in others]
    if note == NEAR_POOL:
        return [replace(comparison, loss_note=note) for comparison in compared]
    return compared


def _gain(kind: RowKind, was: RowResult, now: RowResult) -> float:
    """Gain of B on a row, 0 for a tie: by what is right, then by the probability that B gives it."""
    if kind == "similarities":  # all rows together have one loss
        return 0.0
    if kind not in ("tokens", "numbers", "graded", "taught"):
        return (num_right(now) - num_right(was)) * (1 + sureness(now))
    gain = float(was["loss"] - now["loss"])  # of the whole row, so that models with other tokens compare
    if kind in ("graded", "taught"):
        return gain
    if kind == "tokens":
        return 0.0 if abs(gain) < TIE_NATS * max(was["count"], now["count"]) else gain
    return 0.0 if abs(gain) <= TIE_SHARE * max(was["loss"], now["loss"]) else gain


def paired(num: int, of_a: Mapping[str, Statistic], of_b: Mapping[str, Statistic]) -> dict[str, Difference]:
    """Each metric that both sides have, and the interval of its difference where both are drawn together."""
    of_a = {key: of_a[key] for key in of_a if key in of_b}  # a grader gives some of its numbers now and then
    values = {key: (value_of(of_a[key], num), value_of(of_b[key], num)) for key in of_a}
    differences = {
        key: 0.0 if math.isclose(was, now, rel_tol=ROUNDING) else now - was for key, (was, now) in values.items()
    }
    bounds = paired_intervals(num, of_a, of_b, differences)
    behind = {key: math.ceil(min(rows_behind(of[key], num) for of in (of_a, of_b))) for key in of_a}
    return {key: Difference(*values[key], bounds[key], behind[key]) for key in of_a}


def compare_answers(answers_a: Iterable[Record], answers_b: Iterable[Record]) -> tuple[int, dict[str, Difference]]:
    """Number of prompts that both answered (of one source, with one reference), and the differences in scores.

    Works on the lines of a run's evaluation/answers-<name>.jsonl.
    """
    of_a, of_b = (
        {(answer["source"], answer["prompt"], answer["reference"]): answer for answer in answers}
        for answers in (answers_a, answers_b)
    )
    shared = sorted(of_a.keys() & of_b.keys())
    sides = [
        {key: ratio(column([of[answer] for answer in shared], key)) for key in ANSWER_SCORES} for of in (of_a, of_b)
    ]
    return len(shared), paired(len(shared), *sides) if shared else {}


def rows_against_constant(
    rows: Sequence[RowResult], constant: Any, *, classes: Sequence[str] = ()
) -> dict[str, Difference]:
    """The model of the rows (B) against always answering `constant` (A): a class, a list of classes, a number,
    or the tag of every word. Paired: both on the same rows."""
    units = list(by_key(rows).values())
    kind = kind_of(units[0])
    if kind in _NAMES and constant in HABITS:
        statistics, (key,) = statistics_of(kind, units, (), complete=True), CONSTANT_METRICS[kind]
        return paired(len(units), {key: statistics[constant]}, {key: statistics[key]})
    constant_rows: list[RowResult] = [
        {**row, "predicted": [constant] * len(row["tags"]) if kind == "tags" else constant} for row in units
    ]
    if kind == "ranks":
        constant_rows = by_bm25(units)
    names = classes or names_in((*units, *constant_rows))
    sides = (statistics_of(kind, rows_of_side, names, complete=True) for rows_of_side in (constant_rows, units))
    of_constant, of_model = ({key: side[key] for key in side if key in CONSTANT_METRICS[kind]} for side in sides)
    return paired(len(units), of_constant, of_model)


HOLD_OUT_MORE = "Hold out more: data.held_out, or a file with --eval."
MEASURE_MORE = "A larger file would say more."
MOST_CLASSES_NAMED = 3
"""Classes without a right row that are named; of more the number is said."""
LIKE_A_CLASS = 0.1
"""Share of equal short answers from which they are taken for classes."""
_MOST_CHARACTERS = 40
UNLEARNT = -0.5
"""Nats a token of chosen answers that a model may lose before that is noted."""
_NAMES = {
    "numbers": "mean baseline",
    "ranks": "BM25",
    **dict.fromkeys(("pairs", "answers", "rewards"), "best simple rule"),
}
_HABITS = {
    "longer_chosen": "always choosing the longer answer",
    "likelier_chosen": "choosing what the untouched model finds likelier",
    "bm25": "a search for shared words (BM25)",
}


def changes(
    before: Sequence[RowResult],
    after: Sequence[RowResult],
    answers_before: Iterable[Record],
    answers_after: Iterable[Record],
    *,
    classes: Sequence[str] = (),
) -> dict[str, JsonObject]:
    """By metric {"value", "low", "high", "is_clear"} of after minus before, paired; {} if rows are not kept."""
    of_rows = compare_rows(before, after, classes=classes).metrics if before and after else {}
    _, of_answers = compare_answers(answers_before, answers_after)
    return {key: differs.as_change() for key, differs in {**of_rows, **of_answers}.items()}


def row_baseline(rows: Sequence[RowResult], constant: Record | None, classes: Sequence[str] = ()) -> Any:
    """Metrics of a constant answer on the same rows, JSON-ready; None for tasks without one, or if unknown.

    `constant` is {"answer", "from"} of `score`. In {"name", "words", "from", "rows", "key", "measures"}, `key`
    is the metric of the verdict; each metric has the baseline's value and the paired change to the model.
    """
    if constant is None or not rows:
        return None
    kind = kind_of(rows[0])
    compared = rows_against_constant(rows, constant["answer"], classes=classes)
    words = _HABITS[constant["answer"]] if kind in _NAMES and kind != "numbers" else _words(constant["answer"])
    facts = {"name": _NAMES.get(kind, "majority baseline"), "words": words, "from": constant["from"]}
    return {**facts, "rows": len(rows), "key": CONSTANT_METRICS[kind][0], "measures": _as_measures(compared)}


def answer_baseline(answers: Sequence[Record]) -> Any:
    """Metrics of always giving the commonest reference, for short answers that name classes; else None."""
    if not are_short([answer["reference"] for answer in answers]):
        return None
    usual, num = Counter(answer["reference"].strip() for answer in answers).most_common(1)[0]
    if num < max(2, LIKE_A_CLASS * len(answers)):
        return None
    always = ratio([float(answer["reference"].strip() == usual) for answer in answers])
    exact = ratio(column(answers, "exact_match"))
    compared = paired(len(answers), {"exact_match": always}, {"exact_match": exact})
    facts = {"name": "majority baseline", "words": _words(usual), "from": "the answers measured"}
    return {**facts, "rows": len(answers), "key": "exact_match", "measures": _as_measures(compared)}


def _as_measures(found: Mapping[str, Difference]) -> JsonObject:
    return {key: {"value": differs.a, "change": differs.as_change()} for key, differs in found.items()}


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


def baseline_sentence(measures: Mapping[str, Record], baseline: Record) -> str:
    """accuracy is 67.3% (62.8–72.0), against 65.4% for always answering `positive` (majority baseline): …"""
    key = baseline["key"]
    info, its = info_of(key), baseline["measures"][key]
    where = "" if baseline["from"] == "the training rows" else f" of {baseline['from']}"
    named = "" if f"({baseline['name']})" in baseline["words"] else f" ({baseline['name']}{where})"
    return (
        f"{info.label} is {info.whole(measures[key])}, against {info.text(its['value'])} for "
        f"{baseline['words']}{named}: {info.worth(its['change'])}"
    )


def capitalized(sentence: str) -> str:
    """The sentence with a capital at its beginning."""
    return sentence[:1].upper() + sentence[1:]


def never_right(details: Record, weights: Any = None) -> Iterator[str]:
    """A sentence that names the classes of which no held-out row is right, if there are any.

    `weights`: train.class_weights of the run, with which a second sentence says the way out.
    """
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
        names = [f"{named(name)} ({plural(support, unit)})" for name, support in never]
        shown, left = names[:MOST_CLASSES_NAMED], len(names) - MOST_CLASSES_NAMED
        shown += [f"{left:,} more"] if left > 0 else []
        words = f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]
        yield f"{words} {'is' if len(never) == 1 else 'are'} never right."
    if never and weights is not None:
        is_rare = never[-1][1] * len(rows) < sum(row["support"] for row in rows)
        way = ", or let rare classes count as much as frequent ones: --set train.class_weights=balanced"
        more = f"Train on more {unit}s of {'it' if len(never) == 1 else 'them'}"
        yield f"{more}{way if is_rare and weights == 'equal' else ''}."


def left_out(details: Record) -> Iterator[str]:
    """A sentence on the lists that no order gets wrong, if there are any."""
    if num := details.get("left_out", 0):
        yield (
            f"{num:,} of {plural(details['lists'], 'list')} {'is' if num == 1 else 'are'} left out of the "
            "ranks: all documents of such a list have one label, or there is one document, so no order is "
            "wrong."
        )


def too_few(num: int, unit: str, way: str = HOLD_OUT_MORE) -> Iterator[str]:
    """A sentence that warns of few rows, if they are few."""
    count = f"{plural(num, unit)} {'is' if num == 1 else 'are'}"
    if num < FEWEST_ROWS:
        yield f"{count} too few to conclude anything: below {FEWEST_ROWS} nothing is called better or worse. {way}"
    elif num < FEW_ROWS:
        yield f"{count} few: on other {unit}s of the same kind this may turn out differently. {way}"


def preference_notes(measures: Mapping[str, Record]) -> Iterator[str]:
    """Sentences on a model of preferences that went wrong; none for other tasks."""
    if "preference_accuracy" not in measures:
        return
    value = {key: interval["value"] for key, interval in measures.items()}
    accuracy = value["preference_accuracy"]
    if measures["preference_accuracy"].get("high", 1.0) < min(value[habit] for habit in _HABITS if habit in value):
        yield (
            f"{percent(accuracy)} of the held-out preferences are right, fewer than by choosing the longer "
            "answer or the likelier one: chosen and rejected may be the wrong way round"
        )
    chosen, rejected = (value.get(key, 0.0) for key in ("chosen_shift", "rejected_shift"))
    if chosen < UNLEARNT:
        yield (
            f"chosen answers lost {-chosen:.2f} nats a token, rejected ones {-rejected:.2f}: the model "
            "unlearns both. prefer.nll: 1 keeps the chosen ones likely, and so does a lower optim.lr"
        )
