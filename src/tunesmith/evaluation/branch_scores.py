"""Metrics of rows with branches: answers that are preferred or not, documents that are ranked, scored pairs.

An anchor has one right document, so that recall is the share of rows that find it, and nDCG@10 is 1 / log2(1 +
rank) (Järvelin and Kekäläinen 2002); a list brings its own. A result holds the rank by the model and that by
BM25.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.evaluation import bootstrap
from tunesmith.evaluation.bootstrap import Floats, OfRows, Statistic, ratio
from tunesmith.types import JsonObject, Record

# I rows, P pairs

Results = Sequence[Record]
"""Lines of evaluation/<name>.jsonl, see `scores.RowResult`."""
HABITS = ("longer_chosen", "likelier_chosen")
"""Measures that choose an answer without knowing preferences: its length, and how likely the untouched model
finds its tokens in the mean, which a row of rewards does not hold."""


def column(rows: Results, key: str) -> Floats:
    return np.array([row[key] for row in rows], np.float64)


def gains(row: Record, what: str) -> Floats:
    """The lead of the better of each two answers of a row in what the model compares ("margin") or in a habit;
    for an answer that is alone, its own value."""
    if what == "margin" and "rewards" not in row:
        return np.array([row["margin"]], np.float64)
    values = np.array(row["rewards" if what == "margin" else "lengths"], np.float64)
    if what == "likelier_chosen":
        values = np.array(row["reference"]) / values
    if "wanted" in row:
        return values[:1]
    scores = np.array(row.get("scores", (1, 0)))
    better, worse = np.nonzero(scores[:, None] > scores)
    return np.asarray(values[better] - values[worse], np.float64)


def pair_statistics(rows: Results, _: Sequence[str], complete: bool) -> dict[str, Statistic]:
    """Pairs of answers, or answers with a reward each; a row counts by the mean over its pairs, a tie half,
    in the calibration too: the mean of several differences is the logit of no event."""
    known = ("margin", *HABITS) if "reference" in rows[0] else ("margin", HABITS[0])
    gained = {what: [gains(row, what) for row in rows] for what in known}
    won = {what: ratio([_won(gain).mean() for gain in of_rows]) for what, of_rows in gained.items()}
    means_I = np.array([gain.mean() for gain in gained["margin"]])
    statistics = {"preference_accuracy": won.pop("margin"), "margin": ratio(means_I)}
    if "rewards" in rows[0]:
        leads_P = np.concatenate(gained["margin"])
        rows_P = np.repeat(np.arange(len(rows)), [len(gain) for gain in gained["margin"]])
        statistics["calibration_error"] = bootstrap.calibration_error(
            1 / (1 + np.exp(-np.abs(leads_P))), _won(leads_P), rows_P
        )
        statistics["reward_mean"] = ratio([np.mean(row["rewards"]) for row in rows])
    else:
        statistics["chosen_shift"], statistics["rejected_shift"] = map(ratio, _shifts(rows).T)
    return statistics | won


def answer_statistics(rows: Results, _: Sequence[str], complete: bool) -> dict[str, Statistic]:
    """Answers that are wanted or not: each of the ones against each of the others, a tie counts half."""
    wanted_I = column(rows, "wanted") > 0
    values = {what: np.concatenate([gains(row, what) for row in rows]) for what in ("margin", *HABITS)}
    rarer = min(int(wanted_I.sum()), int((~wanted_I).sum()))
    shown = {what: bootstrap.roc_auc(wanted_I, values_I) for what, values_I in values.items()}
    (gained, lost), shifts = (
        [ratio(values_I * side_I, side_I.astype(np.float64)) for side_I in (wanted_I, ~wanted_I)]
        for values_I in (values["margin"], _shifts(rows)[:, 0])
    )
    return {
        "preference_accuracy": shown.pop("margin"),
        "margin": OfRows(lambda weights_RI: gained(weights_RI) - lost(weights_RI), rarer),
        **dict(zip(("chosen_shift", "rejected_shift"), shifts, strict=True)),
        **shown,
    }


def _shifts(rows: Results) -> Floats:
    """[I, 2], nats a token that both answers of each row gained."""
    keys = ("logps", "reference", "lengths")
    logps_I2, reference_I2, lengths_I2 = (column(rows, key).reshape(-1, 2) for key in keys)
    return np.asarray((logps_I2 - reference_I2) / lengths_I2, np.float64)


def _won(differences_I: Floats) -> Floats:
    return np.where(differences_I == 0, 0.5, (differences_I > 0).astype(np.float64))


def pair_details(rows: Results, _: Sequence[str]) -> JsonObject:
    """Accuracy by which answer is longer."""
    margins_I, longer_I = (np.concatenate([gains(row, what) for row in rows]) for what in ("margin", HABITS[0]))
    of_length = []
    for name, which_I in (("shorter", longer_I < 0), ("as long", longer_I == 0), ("longer", longer_I > 0)):
        accuracy = float(_won(margins_I[which_I]).mean()) if which_I.any() else None
        of_length.append({"chosen": name, "pairs": int(which_I.sum()), "accuracy": accuracy})
    return {"by_length": of_length}


CURVE = (1, 2, 3, 5, 10, 20, 50, 100)
"""Ranks at which recall is shown."""
BM25 = "bm25"


def by_bm25(rows: Results) -> list[Record]:
    """The rows as if BM25 had ranked their documents."""
    return [{**row, "rank": row[BM25], **({"ndcg": row["bm25_ndcg"]} if "ndcg" in row else {})} for row in rows]


def rank_statistics(rows: Results, _: Sequence[str] = (), complete: bool = True) -> dict[str, Statistic]:
    """recall@1, recall@10, MRR@10 and nDCG@10 of the rows that have a rank."""
    is_ranked_I = ranked(rows)
    rank_I = np.where(is_ranked_I, column(rows, "rank"), np.inf)
    near_I = rank_I <= 10
    ndcg_I = np.nan_to_num(column(rows, "ndcg")) if "ndcg" in rows[0] else near_I / np.log2(1 + rank_I)
    shares = {"recall_1": rank_I <= 1, "recall_10": near_I, "mrr_10": near_I / rank_I, "ndcg_10": ndcg_I}
    return {key: ratio(share_I, is_ranked_I) for key, share_I in shares.items()}


def ranked(rows: Results) -> NDArray[np.bool_]:
    """[I], whether an order of a row's documents can be wrong: not if all are as good, or it has one."""
    return np.array([row["rank"] is not None for row in rows], np.bool_)


def rank_details(rows: Results, _: Sequence[str] = ()) -> JsonObject:
    """Recall over ranks, of the model, of BM25, and of vectors that are cut."""
    can_err = [row for row in rows if row["rank"] is not None]
    ranks = {"model": column(can_err, "rank"), "BM25": column(can_err, BM25)}
    for dim in rows[0].get("dims", {}):
        ranks[f"{dim} numbers"] = np.array([row["dims"][dim] for row in rows])
    recall = {name: [float((rank_I <= k).mean()) for k in CURVE] for name, rank_I in ranks.items() if len(rank_I)}
    details: JsonObject = {"documents": int(column(rows, "documents").max())}
    details |= {"recall": {"at": list(CURVE), **recall}} if can_err else {}
    if len(can_err) < len(rows):
        details |= {"lists": len(rows), "left_out": len(rows) - len(can_err)}
    return details


def similarity_statistics(rows: Results, _: Sequence[str], complete: bool) -> dict[str, Statistic]:
    """Rank correlation of cosine and score."""
    return {"spearman": bootstrap.spearman(column(rows, "value"), column(rows, "similarity"))}
