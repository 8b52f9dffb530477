"""Metrics of ranks: of anchors whose positive is looked for among documents, of lists, and of pairs with a similarity.

An anchor has one right document, so that recall is the share of rows that find it, and nDCG@10 is 1 / log2(1 + rank)
(Järvelin and Kekäläinen 2002); a list brings its own. A result holds the rank by the model and that by BM25.
"""

# I rows

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.evaluation import bootstrap
from tunesmith.evaluation.bootstrap import Floats, Statistic, ratio

CURVE = (1, 2, 3, 5, 10, 20, 50, 100)
"""Ranks at which recall is drawn."""
MOST_DOTS = 500
BM25 = "bm25"


def by_bm25(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows as if BM25 had ranked their documents."""
    return [{**row, "rank": row[BM25], **({"ndcg": row["bm25_ndcg"]} if "ndcg" in row else {})} for row in rows]


def rank_statistics(
    rows: Sequence[Mapping[str, Any]], _: Sequence[str] = (), complete: bool = True
) -> dict[str, Statistic]:
    """recall@1, recall@10, MRR@10 and nDCG@10."""
    rank_I = _column(rows, "rank")
    near_I = rank_I <= 10
    return {
        "recall_1": ratio(rank_I <= 1),
        "recall_10": ratio(near_I),
        "mrr_10": ratio(near_I / rank_I),
        "ndcg_10": ratio(_column(rows, "ndcg") if "ndcg" in rows[0] else near_I / np.log2(1 + rank_I)),
    }


def rank_details(rows: Sequence[Mapping[str, Any]], _: Sequence[str] = ()) -> dict[str, Any]:
    """Recall over ranks, of the model, of BM25, and of vectors that are cut."""
    ranks = {"model": _column(rows, "rank"), "BM25": _column(rows, BM25)}
    for dim in rows[0].get("dims", {}):
        ranks[f"{dim} numbers"] = np.array([row["dims"][dim] for row in rows])
    recall = {name: [float((rank_I <= k).mean()) for k in CURVE] for name, rank_I in ranks.items()}
    return {"recall": {"at": list(CURVE), **recall}, "documents": int(_column(rows, "documents").max())}


def similarity_statistics(
    rows: Sequence[Mapping[str, Any]], _: Sequence[str] = (), complete: bool = True
) -> dict[str, Statistic]:
    """Rank correlation of cosine and score."""
    return {"spearman": bootstrap.spearman(_column(rows, "value"), _column(rows, "similarity"))}


def similarity_details(rows: Sequence[Mapping[str, Any]], _: Sequence[str] = ()) -> dict[str, Any]:
    shown = np.unique(np.linspace(0, len(rows) - 1, MOST_DOTS).astype(np.int64))
    return {"scatter": [[rows[i]["value"], rows[i]["similarity"]] for i in shown]}


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    return np.array([row[key] for row in rows], np.float64)
