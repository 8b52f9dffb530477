"""Metrics of rows with branches: answers that are preferred or not, documents that are ranked, scored pairs.

An anchor has one right document, so that recall is the share of rows that find it, and nDCG@10 is 1 / log2(1 + rank)
(Järvelin and Kekäläinen 2002); a list brings its own. A result holds the rank by the model and that by BM25.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.evaluation import bootstrap
from tunesmith.evaluation.bootstrap import Floats, Statistic, ratio

# I rows

Results = Sequence[Mapping[str, Any]]
"""Lines of evaluation/<name>.jsonl, see `scores.RowResult`."""
MOST_DOTS = 500
"""Rows in a scatter."""


def column(rows: Results, key: str) -> Floats:
    return np.array([row[key] for row in rows], np.float64)


def pair_statistics(rows: Results, _: Sequence[str], complete: bool) -> dict[str, Statistic]:
    """Pairs of answers; a tie of both counts half."""
    shifts_I2 = _shifts(rows)
    return {
        "preference_accuracy": ratio(_won(column(rows, "margin"))),
        "margin": ratio(column(rows, "margin")),
        "chosen_shift": ratio(shifts_I2[:, 0]),
        "rejected_shift": ratio(shifts_I2[:, 1]),
        **{habit: ratio(_won(preferred)) for habit, preferred in _of_pairs(rows).items()},
    }


def answer_statistics(rows: Results, _: Sequence[str], complete: bool) -> dict[str, Statistic]:
    """Answers that are wanted or not: each of the ones against each of the others, a tie counts half."""
    wanted_I, margins_I = column(rows, "wanted") > 0, column(rows, "margin")
    gained, lost = _mean_of(margins_I, wanted_I), _mean_of(margins_I, ~wanted_I)
    shifts_I = _shifts(rows)[:, 0]
    return {
        "preference_accuracy": bootstrap.roc_auc(wanted_I, margins_I),
        "margin": lambda weights_RI: gained(weights_RI) - lost(weights_RI),
        "chosen_shift": _mean_of(shifts_I, wanted_I),
        "rejected_shift": _mean_of(shifts_I, ~wanted_I),
        **{habit: bootstrap.roc_auc(wanted_I, preferred) for habit, preferred in _of_answers(rows).items()},
    }


def _mean_of(values_I: Floats, which_I: Any) -> Statistic:
    return ratio(values_I * which_I, which_I.astype(np.float64))


def _shifts(rows: Results) -> Floats:
    """[I, 2], nats a token that both answers of each row gained."""
    logps_I2, reference_I2, lengths_I2 = (column(rows, key).reshape(-1, 2) for key in ("logps", "reference", "lengths"))
    return np.asarray((logps_I2 - reference_I2) / lengths_I2, np.float64)


def _won(differences_I: Floats) -> Floats:
    return np.where(differences_I == 0, 0.5, (differences_I > 0).astype(np.float64))


def _habits(rows: Results) -> dict[str, Floats]:
    """[I, 2], what two habits that know no preference go by: the length of both answers, and how likely the untouched
    model finds their tokens in the mean."""
    lengths_I2, reference_I2 = (column(rows, key) for key in ("lengths", "reference"))
    return {"longer_chosen": lengths_I2, "likelier_chosen": reference_I2 / lengths_I2}


def _of_answers(rows: Results) -> dict[str, Floats]:
    return {habit: values_I2[:, 0] for habit, values_I2 in _habits(rows).items()}


def _of_pairs(rows: Results) -> dict[str, Floats]:
    return {habit: values_I2[:, 0] - values_I2[:, 1] for habit, values_I2 in _habits(rows).items()}


def reward_statistics(rows: Results, _: Sequence[str], complete: bool) -> dict[str, Statistic]:
    """Answers with a reward each; a row counts by the mean over its pairs, a tie of two rewards half."""
    moved, longer = ([_contests(row, key) for row in rows] for key in ("rewards", "lengths"))
    means_I = np.array([one.mean() for one in moved])
    right_I, all_I = np.array([_won(one).mean() for one in moved]), np.concatenate([row["rewards"] for row in rows])
    return {
        "preference_accuracy": ratio(right_I),
        "margin": ratio(means_I),
        "calibration_error": bootstrap.calibration_error(1 / (1 + np.exp(-np.abs(means_I))), means_I > 0),
        "reward_mean": ratio(np.array([np.mean(row["rewards"]) for row in rows])),
        "reward_spread": ratio(np.array([np.mean(np.abs(row["rewards"] - all_I.mean())) for row in rows])),
        "longer_chosen": ratio(np.array([_won(one).mean() for one in longer])),
    }


def _contests(row: Mapping[str, Any], key: str) -> Floats:
    """The difference of each better and worse answer of a row."""
    scores, values = np.array(row["scores"]), np.array(row[key], np.float64)
    better, worse = np.nonzero(scores[:, None] > scores)
    return np.asarray(values[better] - values[worse], np.float64)


HABITS: Mapping[str, Callable[[Results], dict[str, Floats]]] = {
    "pairs": _of_pairs,
    "answers": _of_answers,
    "rewards": lambda rows: {"longer_chosen": np.array([_contests(row, "lengths").mean() for row in rows])},
}
"""The values that habits prefer an answer by, by kind of row."""
_STATISTICS = {"pairs": pair_statistics, "answers": answer_statistics, "rewards": reward_statistics}


def better_habit(kind: str, rows: Results) -> str:
    """The habit that chooses more of these rows rightly."""
    once_1I, statistics = np.ones((1, len(rows))), _STATISTICS[kind](rows, (), True)
    return max(HABITS[kind](rows), key=lambda habit: float(np.nan_to_num(statistics[habit](once_1I)[0])))


def by_habit(kind: str, rows: Results, habit: str) -> list[Mapping[str, Any]]:
    """The rows as if a model had chosen by a habit."""
    if kind == "rewards":
        return [{**row, "rewards": row["lengths"]} for row in rows]
    return [{**row, "margin": value} for row, value in zip(rows, HABITS[kind](rows)[habit].tolist(), strict=True)]


def pair_details(rows: Results, _: Sequence[str]) -> dict[str, Any]:
    """Margin and difference in length of some pairs, and accuracy by which answer is longer."""
    return _by_length(column(rows, "margin"), _of_pairs(rows)["longer_chosen"])


def answer_details(rows: Results, _: Sequence[str]) -> dict[str, Any]:
    """Margin and length of some answers, those that are wanted and the others."""
    sides: dict[str, list[list[float]]] = {"wanted": [], "not wanted": []}
    for row in (rows[i] for i in _spread(len(rows))):
        sides["wanted" if row["wanted"] else "not wanted"].append([float(row["lengths"][0]), float(row["margin"])])
    return {"sides": sides}


def _spread(num: int) -> Sequence[int]:
    """Indices of at most `MOST_DOTS` of so many rows, evenly apart."""
    return [int(i) for i in np.unique(np.linspace(0, num - 1, MOST_DOTS).astype(np.int64))]


def reward_details(rows: Results, _: Sequence[str]) -> dict[str, Any]:
    """Margins and differences in length of every better and worse answer."""
    return _by_length(*(np.concatenate([_contests(row, key) for row in rows]) for key in ("rewards", "lengths")))


def _by_length(margins_I: Floats, longer_I: Floats) -> dict[str, Any]:
    of_length = []
    for name, which_I in (("shorter", longer_I < 0), ("as long", longer_I == 0), ("longer", longer_I > 0)):
        accuracy = float(_won(margins_I[which_I]).mean()) if which_I.any() else None
        of_length.append({"chosen": name, "pairs": int(which_I.sum()), "accuracy": accuracy})
    return {
        "margins": [[float(longer_I[i]), float(margins_I[i])] for i in _spread(len(margins_I))],
        "by_length": of_length,
    }


# I rows


CURVE = (1, 2, 3, 5, 10, 20, 50, 100)
"""Ranks at which recall is drawn."""
BM25 = "bm25"


def by_bm25(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows as if BM25 had ranked their documents."""
    return [{**row, "rank": row[BM25], **({"ndcg": row["bm25_ndcg"]} if "ndcg" in row else {})} for row in rows]


def rank_statistics(
    rows: Sequence[Mapping[str, Any]], _: Sequence[str] = (), complete: bool = True
) -> dict[str, Statistic]:
    """recall@1, recall@10, MRR@10 and nDCG@10."""
    rank_I = column(rows, "rank")
    near_I = rank_I <= 10
    return {
        "recall_1": ratio(rank_I <= 1),
        "recall_10": ratio(near_I),
        "mrr_10": ratio(near_I / rank_I),
        "ndcg_10": ratio(column(rows, "ndcg") if "ndcg" in rows[0] else near_I / np.log2(1 + rank_I)),
    }


def rank_details(rows: Sequence[Mapping[str, Any]], _: Sequence[str] = ()) -> dict[str, Any]:
    """Recall over ranks, of the model, of BM25, and of vectors that are cut."""
    ranks = {"model": column(rows, "rank"), "BM25": column(rows, BM25)}
    for dim in rows[0].get("dims", {}):
        ranks[f"{dim} numbers"] = np.array([row["dims"][dim] for row in rows])
    recall = {name: [float((rank_I <= k).mean()) for k in CURVE] for name, rank_I in ranks.items()}
    return {"recall": {"at": list(CURVE), **recall}, "documents": int(column(rows, "documents").max())}


def similarity_statistics(
    rows: Sequence[Mapping[str, Any]], _: Sequence[str] = (), complete: bool = True
) -> dict[str, Statistic]:
    """Rank correlation of cosine and score."""
    return {"spearman": bootstrap.spearman(column(rows, "value"), column(rows, "similarity"))}


def similarity_details(rows: Sequence[Mapping[str, Any]], _: Sequence[str] = ()) -> dict[str, Any]:
    return {"scatter": [[rows[i]["value"], rows[i]["similarity"]] for i in _spread(len(rows))]}
