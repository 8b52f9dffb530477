"""Two evaluations of the same rows side by side: what differs by more than chance, and on which rows.

Works on the lines of a run's evaluation/<name>.jsonl. Rows are matched by the hash of their content. Both sides are
resampled by the same draws (paired bootstrap), so that what is hard or easy for both cancels out.
"""

# I rows in common, R resamples

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tunesmith.errors import InputError
from tunesmith.evaluation import statistics
from tunesmith.evaluation.intervals import Interval, Statistic, interval, resamples
from tunesmith.evaluation.metrics import LEAST_ROWS

Told = Mapping[str, Any]
"""One line of evaluation/<name>.jsonl."""
Kind = Literal["tokens", "classes", "sets", "numbers", "tags"]

_SUMS = ("loss", "count", "correct", "bytes")
"""What is added up of the windows of a document."""
SCORES = ("exact_match", "rouge1", "rouge2", "rougeL")
"""What is kept of each answer in evaluation/answers-<name>.jsonl."""
ROUNDING = 1e-9
"""Share of a value below which a difference is that of sums in another order, and none."""
TIE_NATS = 0.01
"""Losses per token that differ by less are a tie: one per cent of a token's probability, what rounding alone can do."""
_WEIGHED = "the two weigh classes differently (train.class_weights): {}"
TIE_SHARE = 0.01
"""Squared errors that differ by less than this share of the larger are a tie."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One measure of two evaluations on the rows they share."""

    a: float
    b: float
    b_minus_a: Interval
    num_rows: int
    """Rows, documents or answers that it rests on."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0: other rows of the same kind would hardly turn the difference around. Never
        of fewer than `LEAST_ROWS`."""
        excludes_0 = self.b_minus_a["low"] > 0 or self.b_minus_a["high"] < 0
        return excludes_0 and self.b_minus_a["value"] != 0 and self.num_rows >= LEAST_ROWS

    def as_change(self) -> dict[str, Any]:
        """The difference as a report keeps it: value, low, high, is_clear."""
        return {**self.b_minus_a, "is_clear": self.is_clear}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Evaluation B against evaluation A."""

    kind: Kind
    num_rows: int
    """Rows in common."""
    only_a: int
    only_b: int
    are_documents: bool
    """Whether rows are documents, their windows added up."""
    same_targets: bool
    """False: the models cut the texts into other tokens, so losses per token, perplexity and tokens right do not
    compare; bits per byte do."""
    loss_note: str
    """What to say of the loss where the two weigh classes differently; empty: they do not."""
    measures: dict[str, Difference]
    """By the keys of `MEASURES`."""
    won: list[tuple[Told, Told]]
    """Rows (of A, of B) on which B is better, clearest first: right instead of wrong, or of lower loss."""
    lost: list[tuple[Told, Told]]
    """Rows on which B is worse, clearest first."""

    @property
    def num_ties(self) -> int:
        return self.num_rows - len(self.won) - len(self.lost)


def compare(rows_a: Iterable[Told], rows_b: Iterable[Told], *, classes: Sequence[str] = ()) -> Comparison:
    """What B does better and worse than A. `classes` of the head of both; empty: those that the rows name.

    Raises InputError where they share no row, or answer different questions.
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
        told = [" and ".join(sorted(kind)) for kind in kinds]
        raise InputError(
            f"the first was measured on {told[0]}, the second on {told[1]}: only one task can be compared."
        )
    kind = kinds[0].pop()
    same_targets, loss_note = all(was["count"] == now["count"] for was, now in zip(a, b, strict=True)), ""
    measures = _differences(kind, a, b, classes)
    if kind != "tokens" and not same_targets:
        same_targets = True
        if kind == "classes":
            unweighted = _paired(len(a), *({"loss": _mean_unweighted(rows)} for rows in (a, b)))
            measures, loss_note = {**measures, **unweighted}, _WEIGHED.format("the loss is compared without weights")
        else:
            loss_note = _WEIGHED.format("a row's loss is that of all its words together, so the losses do not compare")
            del measures["loss"]
    gains_I = _gains(kind, a, b)
    order = sorted(range(len(shared)), key=lambda i: -abs(gains_I[i]))
    return Comparison(
        kind=kind,
        num_rows=len(shared),
        only_a=len(a_by_key) - len(shared),
        only_b=len(b_by_key) - len(shared),
        are_documents=any("bytes" in row for row in a),
        same_targets=same_targets,
        loss_note=loss_note,
        measures=measures,
        won=[(a[i], b[i]) for i in order if gains_I[i] > 0],
        lost=[(a[i], b[i]) for i in order if gains_I[i] < 0],
    )


def kind_of(row: Told) -> Kind:
    """What was asked about a row."""
    if "correct" in row:
        return "tokens"
    if "value" in row:
        return "numbers"
    if "tags" in row:
        return "tags"
    return "sets" if isinstance(row["label"], list) else "classes"


def by_key(rows: Iterable[Told]) -> dict[tuple[str, int], Told]:
    """Rows by hash and how many with that hash came before; the windows of a document are added up to one row."""
    seen: Counter[str] = Counter()
    found: dict[tuple[str, int], Told] = {}
    for row in rows:
        key = (row["hash"], 0 if "correct" in row else seen[row["hash"]])
        if key in found:
            sums = {name: found[key].get(name, 0) + row[name] for name in _SUMS if name in row}
            found[key] = {**found[key], **sums}
        else:
            found[key] = row
        seen[row["hash"]] += 1
    return found


def _gains(kind: Kind, a: Sequence[Told], b: Sequence[Told]) -> list[float]:
    """How much better B is on each row, 0 for a tie: what is right first, then how sure B is of it."""
    if kind in ("tokens", "numbers"):
        return [_loss_gain(kind, was, now) for was, now in zip(a, b, strict=True)]
    return [(_right(now) - _right(was)) * (1 + _sureness(now)) for was, now in zip(a, b, strict=True)]


def _loss_gain(kind: Kind, was: Told, now: Told) -> float:
    gain = float(was["loss"] - now["loss"])
    if kind == "tokens":
        # The loss of the whole row, so that models with other tokens compare.
        return 0.0 if abs(gain) < TIE_NATS * max(was["count"], now["count"]) else gain
    return 0.0 if abs(gain) <= TIE_SHARE * max(was["loss"], now["loss"]) else gain


def _right(row: Told) -> int:
    """1 for a row whose class or classes are right; of tags, how many."""
    if "tags" in row:
        return sum(tag == found for tag, found in zip(row["tags"], row["predicted"], strict=True))
    return int(row["label"] == row["predicted"])


def _sureness(row: Told) -> float:
    chances = row.get("probability", 0.0)
    return float(min(chances, default=0.0) if isinstance(chances, list) else chances)


def compare_answers(answers_a: Iterable[Told], answers_b: Iterable[Told]) -> tuple[int, dict[str, Difference]]:
    """How many prompts both answered (of one source and with one reference), and what differs in the answers' scores.

    Works on the lines of a run's evaluation/answers-<name>.jsonl.
    """
    of_a, of_b = ({_asked(answer): answer for answer in answers} for answers in (answers_a, answers_b))
    shared = [asked for asked in of_a if asked in of_b]
    a, b = ([answers[asked] for asked in shared] for answers in (of_a, of_b))
    return len(shared), _paired(len(shared), _of_answers(a), _of_answers(b)) if shared else {}


def answers_against_constant(answers: Sequence[Told], answer: str) -> Difference:
    """How many more of the answers are exactly right (B) than if `answer` were always given (A); paired."""
    always, given = (
        np.array(hits, np.float64)
        for hits in ([one["reference"].strip() == answer for one in answers], [one["exact_match"] for one in answers])
    )
    of_answer, of_model = ({"exact_match": statistics.ratio(hits_I)} for hits_I in (always, given))
    return _paired(len(answers), of_answer, of_model)["exact_match"]


def _asked(answer: Told) -> tuple[str, str, str]:
    return answer["source"], answer["prompt"], answer["reference"]


def _of_answers(answers: Sequence[Told]) -> dict[str, Statistic]:
    return {key: statistics.ratio(np.array([answer[key] for answer in answers], np.float64)) for key in SCORES}


def _differences(kind: Kind, a: Sequence[Told], b: Sequence[Told], classes: Sequence[str]) -> dict[str, Difference]:
    names = classes or sorted({name for row in (*a, *b) for name in _names(row)})
    of_a, of_b = ({"loss": _mean_loss(rows), **_STATISTICS[kind](rows, names)} for rows in (a, b))
    if kind == "classes" and len(classes) == 2:
        of_a["roc_auc"], of_b["roc_auc"] = _roc_auc(a, classes), _roc_auc(b, classes)
    if kind == "sets" and not classes:  # means over classes that no row here names are not known
        of_a, of_b = ({key: some[key] for key in some if key not in _OVER_CLASSES} for some in (of_a, of_b))
    return _paired(len(a), of_a, of_b)


_OVER_CLASSES = ("label_accuracy", "macro_f1")


def _roc_auc(rows: Sequence[Told], classes: Sequence[str]) -> Statistic:
    """Of two classes; the chance of one is what the other leaves."""
    is_second_I = np.array([row["label"] == classes[1] for row in rows])
    chances_I = np.array(
        [p if said == classes[1] else 1 - p for p, said in ((r["probability"], r["predicted"]) for r in rows)]
    )
    return statistics.roc_auc(is_second_I, chances_I)


def _mean_unweighted(rows: Sequence[Told]) -> Statistic:
    """The loss as if every class had the weight 1."""
    return statistics.ratio(np.array([row["loss"] / row["count"] for row in rows]))


CONSTANT: Mapping[Kind, tuple[str, ...]] = {
    "tokens": (),
    "classes": ("accuracy", "macro_f1"),
    "sets": ("label_accuracy", "exact_rows", "micro_f1", "macro_f1"),
    "numbers": ("mse",),
    "tags": ("tag_accuracy", "span_f1", "span_precision", "span_recall", "macro_f1"),
}
"""What can be measured of an answer that is always the same; first the measure that the commonest answer is best at."""


def against_constant(rows: Iterable[Told], answer: Any, *, classes: Sequence[str] = ()) -> dict[str, Difference]:
    """What the model of the rows (B) does better than always giving `answer` (A): a class, a list of classes, a number,
    or the tag of every word. Paired: both on the same rows."""
    found = list(rows)
    kind = kind_of(found[0])
    said = [{**row, "predicted": [answer] * len(row["tags"]) if kind == "tags" else answer} for row in found]
    names = classes or sorted({name for row in (*found, *said) for name in _names(row)})
    of_answer, of_model = (
        {key: value for key, value in _STATISTICS[kind](some, names).items() if key in CONSTANT[kind]}
        for some in (said, found)
    )
    return _paired(len(found), of_answer, of_model)


def _paired(num: int, of_a: Mapping[str, Statistic], of_b: Mapping[str, Statistic]) -> dict[str, Difference]:
    """Each measure on both sides, and what lies between them where both are drawn together."""
    moved = [{key: of_b[key](weights) - of_a[key](weights) for key in of_a} for weights in resamples(num)]
    ones_1I = np.ones((1, num))
    found = {}
    for key in of_a:
        was, now = float(of_a[key](ones_1I)[0]), float(of_b[key](ones_1I)[0])
        difference = 0.0 if math.isclose(was, now, rel_tol=ROUNDING) else now - was
        found[key] = Difference(was, now, interval(difference, np.concatenate([some[key] for some in moved])), num)
    return found


def _mean_loss(rows: Sequence[Told]) -> Statistic:
    losses, counts = (np.array([row[key] for row in rows], np.float64) for key in ("loss", "count"))
    return statistics.ratio(losses, counts)


def _names(row: Told) -> Iterator[str]:
    """The classes that a row names."""
    for key in ("label", "tags", "predicted"):
        told = row.get(key, [])
        yield from (name for name in (told if isinstance(told, list) else [told]) if isinstance(name, str))


def _of_tokens(rows: Sequence[Told], _: Sequence[str]) -> dict[str, Statistic]:
    hits, counts = (np.array([row[key] for row in rows], np.float64) for key in ("correct", "count"))
    mean_loss = _mean_loss(rows)
    found: dict[str, Statistic] = {
        "perplexity": lambda weights_RI: np.exp(np.minimum(mean_loss(weights_RI), 700.0)),
        "token_accuracy": statistics.ratio(hits, counts),
    }
    if any("bytes" in row for row in rows):
        bits = np.array([row["loss"] for row in rows]) / math.log(2)
        found["bits_per_byte"] = statistics.ratio(bits, np.array([row.get("bytes", 0) for row in rows]))
    return found


def _of_classes(rows: Sequence[Told], names: Sequence[str]) -> dict[str, Statistic]:
    ids = {name: i for i, name in enumerate(names)}
    true_I, found_I = (np.array([ids[row[key]] for row in rows], np.int64) for key in ("label", "predicted"))
    chances_I = np.array([row["probability"] for row in rows], np.float64)
    return {
        "accuracy": statistics.ratio(true_I == found_I),
        "macro_f1": statistics.macro_f1(true_I, found_I),
        "calibration_error": statistics.calibration_error(chances_I, true_I == found_I),
    }


def _of_sets(rows: Sequence[Told], names: Sequence[str]) -> dict[str, Statistic]:
    true_IC, found_IC = (
        np.array([[name in row[key] for name in names] for row in rows], np.bool_).reshape(len(rows), len(names))
        for key in ("label", "predicted")
    )
    right_IC = true_IC & found_IC
    return {
        "micro_f1": statistics.f1(np.stack([right_IC.sum(1), found_IC.sum(1), true_IC.sum(1)], axis=1)),
        "exact_rows": statistics.ratio((true_IC == found_IC).all(1)),
        "label_accuracy": statistics.ratio((true_IC == found_IC).sum(1) / max(len(names), 1)),
        "macro_f1": statistics.macro_f1_of_counts(right_IC, true_IC.astype(int) + found_IC, absent_count=True),
    }


def _of_numbers(rows: Sequence[Told], _: Sequence[str]) -> dict[str, Statistic]:
    true_I, found_I = (np.array([row[key] for row in rows], np.float64) for key in ("value", "predicted"))
    return {"mse": statistics.ratio((true_I - found_I) ** 2), "spearman": statistics.spearman(true_I, found_I)}


def _of_tags(rows: Sequence[Told], names: Sequence[str]) -> dict[str, Statistic]:
    from tunesmith.evaluation.tag_scores import count_spans, mark_spans

    hits_I, words_I = np.array([_right(row) for row in rows]), np.array([len(row["tags"]) for row in rows])
    found: dict[str, Statistic] = {"tag_accuracy": statistics.ratio(hits_I, words_I)}
    if mark_spans(names):
        counts_I3, _ = count_spans([row["tags"] for row in rows], [row["predicted"] for row in rows])
        found |= {
            "span_f1": statistics.f1(counts_I3),
            "span_precision": statistics.precision(counts_I3),
            "span_recall": statistics.recall(counts_I3),
        }
    else:
        found["macro_f1"] = _macro_f1_of_tags(rows, names)
    return found


def _macro_f1_of_tags(rows: Sequence[Told], names: Sequence[str]) -> Statistic:
    ids = {name: i for i, name in enumerate(names)}
    true, found, right = (np.zeros((len(rows), len(names)), np.int64) for _ in range(3))
    for i, row in enumerate(rows):
        for tag, said in zip(row["tags"], row["predicted"], strict=True):
            true[i, ids[tag]] += 1
            found[i, ids[said]] += 1
            right[i, ids[tag]] += tag == said
    return statistics.macro_f1_of_counts(right, true + found, absent_count=False)


_STATISTICS: Mapping[Kind, Callable[[Sequence[Told], Sequence[str]], dict[str, Statistic]]] = {
    "tokens": _of_tokens,
    "classes": _of_classes,
    "sets": _of_sets,
    "numbers": _of_numbers,
    "tags": _of_tags,
}
