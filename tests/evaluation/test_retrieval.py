"""Ranks among documents, by vectors and by BM25, against definitions counted by hand and scikit-learn."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from tiny_tasks import encoder_folder, word_tokenizer, write
from tunesmith.data.collate import Collator
from tunesmith.data.dataset import RowStore
from tunesmith.evaluation.bootstrap import value_of
from tunesmith.evaluation.branch_scores import by_bm25, rank_statistics
from tunesmith.evaluation.predict_rows import Predictions
from tunesmith.evaluation.retrieval import K1, B, Bm25, MeasuredRows, other_rows, settled
from tunesmith.recipe.load import validate
from tunesmith.recipe.objectives import Embed
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


RECIPE = validate({"model": "m", "task": "embed", "embed": {"loss": "ranking"}})
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
    found = settled(TASKS["embed"], own, others, recipe=RECIPE, tokenizer=word_tokenizer())
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
    recipe = RECIPE.model_copy(update={"embed": Embed(loss="ranking", dims=(2,))})
    own = measured(store, [0, 2], vectors)
    found = settled(TASKS["embed"], own, recipe=recipe, tokenizer=word_tokenizer())
    assert found.results[1]["rank"] > found.results[1]["dims"]["2"] == 1


def test_more_documents_come_from_other_rows_up_to_a_limit(store):
    collator = Collator(store, layout="padded", device="cpu", pools=True)
    every = np.arange(4)
    for most, expected in ((100, [0, 1, 3]), (5, None), (2, [])):
        (*found,) = other_rows([(collator, every)], store, np.array([2]), most=most)
        rows = sorted(row for _, some in found for row in some.tolist())
        assert rows == expected if expected is not None else 0 < len(rows) < 3
