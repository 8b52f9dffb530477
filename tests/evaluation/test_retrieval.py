"""Ranks among documents, by vectors and by BM25, against definitions counted by hand and scikit-learn."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from tiny_tasks import encoder_folder, word_tokenizer, write
from tunesmith.data.branch_encoders import BranchEncoder, EmbeddingEncoder
from tunesmith.data.collate import Collator
from tunesmith.data.dataset import RowStore
from tunesmith.evaluation import compare
from tunesmith.evaluation.bootstrap import value_of
from tunesmith.evaluation.branch_scores import by_bm25, rank_statistics
from tunesmith.evaluation.compare import (
    NEAR_POOL,
    OTHER_POOLS,
    compare_rows,
    compare_runs,
    left_out,
    row_baseline,
)
from tunesmith.evaluation.predict_rows import Predictions, row_results
from tunesmith.evaluation.retrieval import K1, B, Bm25, MeasuredRows, _in_list, other_rows, settled
from tunesmith.evaluation.scores import RowResult, score
from tunesmith.recipe.load import validate
from tunesmith.recipe.objectives import Embed, Prefer
from tunesmith.tasks import TASKS
from tunesmith.training.resolve import resolve_run

TEXTS = ["the red apple", "a red pear eats a red plum", "Rome", "the the the old", "Ada sells plum"]


def test_bm25_is_its_formula():
    bm25 = Bm25(TEXTS)
    words = [text.lower().split() for text in TEXTS]
    mean = sum(map(len, words)) / len(words)
    for query in ("red plum", "the old Rome", "nothing here", "the the"):
        expected = []
        for text in words:
            score = 0.0
            for word in query.lower().split():
                found = sum(word in one for one in words)
                idf = math.log(1 + (len(words) - found + 0.5) / (found + 0.5))
                times = text.count(word)
                score += idf * times * (K1 + 1) / (times + K1 * (1 - B + B * len(text) / mean)) if times else 0.0
            expected.append(score)
        assert bm25.scores(query).tolist() == pytest.approx(expected, rel=1e-12)


def test_measures_of_ranks_are_those_of_scikit_learn():
    ranks = [1, 3, 2, 10, 11, 40]
    statistics = rank_statistics([{"rank": rank} for rank in ranks])
    found = {key: value_of(statistic, len(ranks)) for key, statistic in statistics.items()}
    relevant = np.zeros((len(ranks), 50))
    relevant[np.arange(len(ranks)), np.array(ranks) - 1] = 1
    order = np.tile(-np.arange(50.0), (len(ranks), 1))
    assert found["ndcg_10"] == pytest.approx(ndcg_score(relevant, order, k=10))
    assert found["mrr_10"] == pytest.approx((1 + 1 / 3 + 1 / 2 + 1 / 10) / 6)
    assert (found["recall_1"], found["recall_10"]) == pytest.approx((1 / 6, 4 / 6))


OPTIONS: dict[str, Any] = {"embed": Embed(loss="ranking"), "prefer": Prefer(), "tokenizer": word_tokenizer()}
ROWS = [
    {"anchor": "red apple", "positive": "big apple", "negative": "small apple"},
    {"anchor": "red apple", "positive": "old pear"},
    {"anchor": "Ada", "positive": "Bob", "negatives": ["big apple"]},
    {"anchor": "plum", "positive": "red apple"},
]


@pytest.fixture
def store(tmp_path: Path) -> RowStore:
    data = {"train": [str(write(tmp_path / "rows.jsonl", ROWS))], "held_out": 0}
    recipe = {"model": str(encoder_folder(tmp_path / "model")), "task": "embed", "device": "cpu", "data": data}
    return resolve_run(validate(recipe), root=tmp_path).rows.store


def measured(store: RowStore, rows: list[int], vectors: dict[str, list[float]]) -> MeasuredRows:
    def of(record: dict[str, Any]) -> np.ndarray:
        negatives = [record[key] for key in ("negative",) if key in record] + record.get("negatives", [])
        texts = [record["anchor"], record["positive"], *negatives]
        return np.array([vectors[text] for text in texts], np.float32)

    num = len(rows)
    results = [{"vectors": of(ROWS[row])} for row in rows]
    found = Predictions(np.zeros(num), np.ones(num), np.zeros(num, np.int64), [], [], results)
    return store, np.array(rows), found


ANGLES = {"red apple": 0, "big apple": 20, "small apple": 10, "old pear": 5, "Ada": 100, "Bob": 90, "plum": 300}
VECTORS = {text: [math.cos(math.radians(a)), math.sin(math.radians(a))] for text, a in ANGLES.items()}


def test_a_positive_is_ranked_among_documents_that_could_be_wrong(store):
    """Not the anchor's own text, not what another row says belongs to it; each text once."""
    own, others = measured(store, [0, 2], VECTORS), [measured(store, [1, 3], VECTORS)]
    found = settled(TASKS["embed"], own, others, **OPTIONS)
    first, second = found.results
    # Of big apple, small apple, old pear, Bob, red apple: old pear belongs to red apple, red apple is the anchor.
    assert (first["rank"], first["documents"]) == (2, 3)
    assert (second["rank"], second["documents"]) == (1, 5)
    scores = [20 * math.cos(math.radians(a)) for a in (20, 10, 90)]
    assert found.losses_I[0] == pytest.approx(math.log(sum(map(math.exp, scores))) - scores[0], rel=1e-5)
    assert first["bm25"] in (1, 2)  # "apple" is in both
    assert by_bm25(found.results)[1]["rank"] == second["bm25"]


def test_cut_vectors_have_ranks_of_their_own(store):
    vectors = {text: [*vector, 9.0 if text == "Bob" else 0.0] for text, vector in VECTORS.items()}
    embed = Embed(loss="ranking", dims=(2,))
    own = measured(store, [0, 2], vectors)
    found = settled(TASKS["embed"], own, **{**OPTIONS, "embed": embed})
    assert found.results[1]["rank"] > found.results[1]["dims"]["2"] == 1


def test_more_documents_come_from_other_rows_up_to_a_limit(store):
    collator = Collator(store, layout="padded", device="cpu", pools=True)
    every = np.arange(4)
    for most, expected in ((100, [0, 1, 3]), (5, None), (2, [])):
        (*found,) = other_rows([(collator, every)], store, np.array([2]), most=most)
        rows = sorted(row for _, some in found for row in some.tolist())
        assert rows == expected if expected is not None else 0 < len(rows) < 3


def assert_an_anchors_own_text_is_no_hit(folder: Path) -> None:  # trap: M4
    """Three texts that stand on both sides, with a prompt each: the model knows texts by their words alone, so that
    an anchor's own text would be the first hit of every search, by vectors and by BM25."""
    rows = [("red apple", "big apple"), ("big apple", "small apple"), ("small apple", "red apple")]
    file = write(folder / "shared.jsonl", [{"anchor": a, "positive": b} for a, b in rows])
    prompts = {"query_prompt": "the ", "document_prompt": "a ", "loss": "ranking"}
    data = {"train": [str(file)], "held_out": 0}
    recipe = validate({"model": str(encoder_folder(folder / "model")), "task": "embed", "device": "cpu", "data": data,
                       "embed": prompts})  # fmt: skip
    found = resolve_run(recipe, root=folder)
    vectors = {"red apple": [1.0, 0.0], "big apple": [0.0, 1.0], "small apple": [-1.0, 0.0]}
    results = [{"vectors": np.array([vectors[a], vectors[b]], np.float32)} for a, b in rows]
    nothing = np.zeros(3)
    predictions = Predictions(nothing, nothing + 1, nothing.astype(np.int64), [], [], results)
    own = (found.rows.store, np.arange(3), predictions)
    options = {**OPTIONS, "embed": found.recipe.embed, "tokenizer": found.inputs.renderer.tokenizer}
    measured = settled(TASKS["embed"], own, **options).results
    assert [one["documents"] for one in measured] == [2, 2, 2]
    assert all(one[by] <= 2 for one in measured for by in ("rank", "bm25"))


def test_an_anchors_own_text_is_no_hit(tmp_path):
    assert_an_anchors_own_text_is_no_hit(tmp_path)


def test_an_own_text_behind_another_prompt_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(EmbeddingEncoder, "encode", BranchEncoder.encode)
    with pytest.raises(AssertionError):
        assert_an_anchors_own_text_is_no_hit(tmp_path)


def ranks_of(store: RowStore, others: list[int]) -> list[RowResult]:
    """Rows 0 and 3, searched among their documents and those of other rows."""
    own, more = measured(store, [0, 3], VECTORS), [measured(store, others, VECTORS)] if others else []
    found = settled(TASKS["embed"], own, more, **OPTIONS)
    return row_results("vector", None, found, store.hashes[[0, 3]])


def assert_one_model_is_no_worse_in_a_larger_pool(store: RowStore) -> None:  # trap: M5
    found = compare_rows(ranks_of(store, [2]), ranks_of(store, [1, 2]))
    assert {key: one.b_minus_a["value"] for key, one in found.metrics.items()} == dict.fromkeys(found.metrics, 0.0)
    assert found.metrics.keys() == {"loss", "recall_1", "recall_10", "mrr_10", "ndcg_10"}
    assert found.loss_note == NEAR_POOL
    assert found.num_ties == 2


def test_one_model_is_no_worse_in_a_larger_pool(store):
    assert_one_model_is_no_worse_in_a_larger_pool(store)


def test_comparing_different_searches_would_be_seen(store, monkeypatch):
    monkeypatch.setattr(compare, "_in_one_pool", lambda sides: (list(sides), NEAR_POOL))
    with pytest.raises(AssertionError):
        assert_one_model_is_no_worse_in_a_larger_pool(store)


def test_a_report_compares_with_an_evaluation_of_the_same_rows_alone(store):
    for a, b in (([1, 2], []), ([], [1])):
        found = compare_rows(ranks_of(store, a), ranks_of(store, b))
        assert (found.loss_note, found.metrics["loss"].b_minus_a["value"]) == (NEAR_POOL, 0.0)
    assert compare_rows(ranks_of(store, [1]), ranks_of(store, [1])).loss_note == ""


def test_training_rows_positives_do_not_change_the_measured_pool(store):
    """Row 1 gives row 0's anchor another positive, which is hidden from it among all documents."""
    with_it, without = ranks_of(store, [1]), ranks_of(store, [2])
    assert [row["near"]["documents"] for row in with_it] == [row["near"]["documents"] for row in without]
    assert compare_rows(with_it, without).loss_note == NEAR_POOL


def test_ranks_without_a_common_pool_get_no_verdict(store):
    """Of an earlier version, or of files that share only some rows."""
    a, b = ranks_of(store, []), ranks_of(store, [1])
    older = [{key: value for key, value in row.items() if key not in ("near", "pool")} for row in b]
    for other in (older, [{**row, "near": {**row["near"], "pool": "another"}} for row in b]):
        found = compare_rows(a, other)
        assert (found.metrics, found.loss_note, found.num_ties) == ({}, OTHER_POOLS, 2)


def test_several_runs_are_compared_in_one_pool(store):
    first, second = compare_runs([ranks_of(store, [2]), ranks_of(store, [2]), ranks_of(store, [1, 2])])
    for found in (first, second):
        assert (found.loss_note, found.metrics["loss"].b_minus_a["value"]) == (NEAR_POOL, 0.0)
    assert first.metrics["loss"].a == second.metrics["loss"].a


def lists(*rows: tuple[list[float], list[float]]) -> list[RowResult]:
    """(scores of the model, labels) of each list, as `settled` measures them."""
    found = []
    for i, (rewards, wanted) in enumerate(rows):
        can_err = len(set(wanted)) > 1
        rank, ndcg = _in_list(np.array(rewards), np.array(wanted)) if can_err else (None, None)
        more = {"bm25": rank, "bm25_ndcg": ndcg, "documents": len(wanted)}
        found.append({"hash": f"{i:x}", "loss": 1.0, "count": 1, "rank": rank, "ndcg": ndcg, **more})
    return found


def test_lists_that_no_order_gets_wrong_are_no_hits():
    """One list is right, one wrong; two have no right document, one has one document."""
    rows = lists(([2, 1], [1, 0]), ([1, 2], [1, 0]), ([1, 2], [0, 0]), ([1, 2], [0, 0]), ([1], [1]))
    measures, details = score(rows)
    assert {key: measures[key]["value"] for key in ("recall_1", "mrr_10")} == {"recall_1": 0.5, "mrr_10": 0.75}
    assert measures["ndcg_10"]["value"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert (details["left_out"], details["lists"], details["recall"]["model"][0]) == (3, 5, 0.5)
    (sentence,) = left_out(details)
    assert sentence.startswith("3 of 5 lists are left out of the ranks")
    assert "left_out" not in score(rows[:2])[1]
    assert row_baseline(rows, details["constant"])["measures"]["recall_1"]["value"] == 0.5
    assert compare_rows(rows, rows).metrics["recall_1"].num_rows == 2


def test_a_file_of_nothing_but_such_lists_has_no_ranks():
    measures, details = score(lists(([1, 2], [0, 0]), ([1, 2], [1, 1])))
    assert math.isnan(measures["ndcg_10"]["value"])
    assert "constant" not in details
    assert measures["loss"]["value"] == 1.0
