"""Anchors and their positives: the rank of each positive among many documents, by vectors and by BM25.

Documents are the positives and negatives of the measured rows and of others, each text once. Left out for an
anchor is its own text, and what other rows say belongs to it: a row has one right document. A pool is the
documents of some rows, and ranks in different pools cannot be compared; so each anchor is also ranked in the
pool of the measured rows alone.
"""

# I rows, K texts of a row, M documents, D vector size

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.branches import lines_of
from tunesmith.data.collate import Collator
from tunesmith.data.dataset import RowStore
from tunesmith.evaluation.predict_rows import Predictions, sample_rows
from tunesmith.evaluation.scores import WordTokenizer
from tunesmith.recipe.objectives import Embed, Prefer
from tunesmith.tasks.embedding_losses import SCORED, Texts, text_losses
from tunesmith.tasks.preference_losses import settle
from tunesmith.tasks.task import Task
from tunesmith.types import JsonObject, Record, Row

K1, B = 1.2, 0.75
MeasuredRows = tuple[RowStore, NDArray[np.int64], Predictions]
"""Rows of a store, and what a model found of them."""


class Bm25:
    """Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework", section 3.4, with Lucene's
    logarithm, which is never negative."""

    def __init__(self, documents: Sequence[str]) -> None:
        self._words = WordTokenizer().tokenize
        counts = [Counter(self._words(text)) for text in documents]
        lengths_M = np.array([sum(count.values()) for count in counts], np.float64)
        norms_M = K1 * (1 - B + B * lengths_M / max(lengths_M.mean(), 1.0))
        places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for m, count in enumerate(counts):
            for word, times in count.items():
                places[word].append((m, times))
        self._size = len(documents)
        self._weights: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        for word, postings in places.items():
            at, times = np.array(postings).T
            idf = math.log(1 + (self._size - len(at) + 0.5) / (len(at) + 0.5))
            self._weights[word] = at, idf * times * (K1 + 1) / (times + norms_M[at])

    def scores(self, query: str) -> NDArray[np.float64]:
        """[M], of each document."""
        scores_M = np.zeros(self._size)
        for word in self._words(query):
            at, weights = self._weights.get(word, (np.empty(0, np.int64), np.empty(0)))
            scores_M[at] += weights
        return scores_M


def other_rows(
    sides: Sequence[tuple[Collator, NDArray[np.int64]]], store: RowStore, rows_I: NDArray[np.int64], *, most: int
) -> Iterator[tuple[Collator, NDArray[np.int64]]]:
    """Rows of both sides whose documents are searched too, by content hash, up to `most` documents in all."""
    left = most - int((store.branches.counts[rows_I] - 1).sum())
    for collator, of_side_I in sides:
        new_I = np.setdiff1d(of_side_I, rows_I) if collator.store is store else of_side_I
        sampled_I = sample_rows(collator.store, new_I, max(0, left)) if len(new_I) else new_I
        totals_I = np.cumsum(collator.store.branches.counts[sampled_I] - 1)
        some_I = sampled_I[totals_I <= left]
        if len(some_I):
            left -= int(totals_I[len(some_I) - 1])
            yield collator, some_I


def settled(
    task: Task,
    own: MeasuredRows,
    others: Sequence[MeasuredRows] = (),
    *,
    embed: Embed,
    prefer: Prefer,
    tokenizer: Any,
) -> Predictions:
    """The predictions of `own` rows with what follows from all of them together: losses of kto, ranks among the
    documents of `others` too, ranks within a list."""
    _, _, predictions = own
    if task.outcome == "lists":
        return replace(predictions, results=_lists(own, tokenizer))
    if task.outcome == "vectors":
        return _vectors(own, others, embed, tokenizer)
    if predictions.results and "wanted" in predictions.results[0]:
        return replace(predictions, losses_I=np.array(settle(predictions.results, prefer)))
    return predictions


def _vectors(own: MeasuredRows, others: Sequence[MeasuredRows], options: Embed, tokenizer: Any) -> Predictions:
    """Losses, and ranks or similarities of rows with scores. Losses of ranking are among all documents."""
    store, rows_I, predictions = own
    if options.loss not in SCORED:
        losses, results = zip(*_ranked(own, others, options, tokenizer), strict=True)
        if options.loss == "ranking":
            return replace(predictions, losses_I=np.array(losses), results=list(results))
    vectors = [torch.from_numpy(result["vectors"]) for result in predictions.results]
    scores = torch.tensor([store.row(int(row)).values[0] for row in rows_I], dtype=torch.float32)
    # No loss needs keys.
    counts, keys = torch.tensor(list(map(len, vectors))), torch.empty(0, dtype=torch.int64)
    texts = Texts(torch.cat(vectors), keys, counts, scores)
    if options.loss in SCORED:
        vectors_LD = torch.nn.functional.normalize(texts.vectors_LD, dim=-1)
        cosines_I = (vectors_LD[texts.anchors_B] * vectors_LD[texts.anchors_B + 1]).sum(-1)
        pairs = zip(scores.tolist(), cosines_I.tolist(), strict=True)
        results = tuple({"value": value, "similarity": cosine} for value, cosine in pairs)
    return replace(predictions, losses_I=text_losses(texts, options).double().numpy(), results=list(results))


def _ranked(
    own: MeasuredRows, others: Sequence[MeasuredRows], options: Embed, tokenizer: Any
) -> Iterator[tuple[float, Record]]:
    documents: dict[int, tuple[NDArray[np.float32], NDArray[np.int32]]] = {}
    """Vector and tokens of each, by the key of its text."""
    belongs: dict[int, set[int]] = defaultdict(set)
    belongs_near: dict[int, set[int]] = defaultdict(set)
    """The positives of each anchor, of all rows and of measured ones."""
    rows: list[tuple[Row, NDArray[np.float32]]] = []
    """Measured rows, and the vectors of their anchors."""
    near: set[int] = set()
    """Documents of measured rows."""
    for store, rows_I, predictions in (own, *others):
        for row, result in zip(map(store.row, rows_I.tolist()), predictions.results, strict=True):
            anchor, *texts = row.keys
            parts = zip(result["vectors"][1:], (line.ids for line in lines_of(row)[1:]), strict=True)
            documents.update(zip(texts, parts, strict=True))
            belongs[anchor].add(texts[0])
            if predictions is own[2]:
                rows.append((row, result["vectors"][0]))
                near.update(texts)
                belongs_near[anchor].add(texts[0])
    keys = sorted(documents)  # by a hash: ties are broken by chance, always alike
    place = {key: m for m, key in enumerate(keys)}
    vectors_MD = np.stack([documents[key][0] for key in keys])
    sizes = (vectors_MD.shape[1], *options.dims)
    by_size = [_unit(vectors_MD[:, :size]) for size in sizes]
    bm25 = Bm25([_text(documents[key][1], options.document_prompt, tokenizer) for key in keys])
    pools = {
        _pool([own, *others]): (np.ones(len(keys), np.bool_), belongs),
        _pool([own]): (np.array([key in near for key in keys]), belongs_near),
    }
    for row, vector_D in rows:
        anchor, positive, *_ = row.keys
        scores = [of_size @ _unit(vector_D[None, :size])[0] for of_size, size in zip(by_size, sizes, strict=True)]
        words_M = bm25.scores(_text(lines_of(row)[0].ids, options.query_prompt, tokenizer))
        searches = []
        for pool, (is_in_M, positives) in pools.items():
            is_shown_M = is_in_M.copy()
            is_shown_M[[place[key] for key in {anchor, *positives[anchor]} - {positive} if key in place]] = False
            searches.append({**_searched(scores, words_M, place[positive], is_shown_M, options), "pool": pool})
        everywhere, *near_ones = searches
        yield everywhere.pop("loss"), {**everywhere, **({"near": near_ones[0]} if near_ones else {})}


def _searched(
    scores: Sequence[NDArray[np.float32]],
    words_M: NDArray[np.float64],
    right: int,
    is_shown_M: NDArray[np.bool_],
    options: Embed,
) -> JsonObject:
    """The rank of a document among those that are shown, by the vectors at each of their sizes and by BM25, and
    the loss."""
    first, *cut = (_rank(scores_M, right, is_shown_M) for scores_M in scores)
    logits_M = options.scale * scores[0].astype(np.float64)
    return {
        "rank": first,
        "bm25": _rank(words_M, right, is_shown_M),
        "documents": int(is_shown_M.sum()),
        "loss": float(np.logaddexp.reduce(logits_M[is_shown_M]) - logits_M[right]),
        **({"dims": dict(zip(map(str, options.dims), cut, strict=True))} if cut else {}),
    }


def _pool(sides: Sequence[MeasuredRows]) -> str:
    """A name for the documents of some rows, of whatever tokenizer: a hash of their content hashes."""
    hashes = sorted(hash_ for store, rows_I, _ in sides for hash_ in store.hashes[rows_I].tolist())
    return hashlib.blake2b(np.array(hashes, np.uint64).tobytes(), digest_size=6).hexdigest()


def _lists(own: MeasuredRows, tokenizer: Any) -> list[Record]:
    """The rank of the best document in its list and nDCG@10 with labels as gains, by the model and by BM25;
    None for a list whose documents are all as good, which no order gets wrong. Of rows with one document each
    its score."""
    store, rows_I, predictions = own
    if (store.branches.counts[rows_I] == 1).all():
        alone = predictions.results
        return [{"value": result["scores"][0], "similarity": result["rewards"][0]} for result in alone]
    rows = [store.row(row) for row in rows_I.tolist()]
    lists = [[line.ids for line in lines_of(row)] for row in rows]
    begins = [int(row.values[0]) for row in rows]
    texts = [[_text(ids[begin:], None, tokenizer) for ids in of] for of, begin in zip(lists, begins, strict=True)]
    bm25, first, results = Bm25([text for of_row in texts for text in of_row]), 0, list[Record]()
    for of, begin, result in zip(lists, begins, predictions.results, strict=True):
        hashes = [hashlib.blake2b(ids.tobytes()).digest() for ids in of]
        order_K = sorted(range(len(of)), key=hashes.__getitem__)  # ties are broken by chance
        wanted_K = np.array(result["scores"])[order_K]
        by_words_K = bm25.scores(_text(of[0][:begin], None, tokenizer))[first : first + len(of)][order_K]
        first += len(of)
        can_err = len(set(result["scores"])) > 1
        rank, ndcg = _in_list(np.array(result["rewards"])[order_K], wanted_K) if can_err else (None, None)
        bm25_rank, bm25_ndcg = _in_list(by_words_K, wanted_K) if can_err else (None, None)
        more = {"ndcg": ndcg, "bm25_ndcg": bm25_ndcg, "documents": len(of)}
        results.append({"rank": rank, "bm25": bm25_rank, **more})
    return results


def _in_list(scores_K: NDArray[np.float64], wanted_K: NDArray[np.float64]) -> tuple[int, float]:
    """Rank of the first of the best documents, and nDCG@10, of documents that are not all as good."""
    ordered_K = wanted_K[np.argsort(-scores_K, kind="stable")]
    gains = ordered_K - min(0.0, float(wanted_K.min()))
    shares = 1 / np.log2(np.arange(2, 2 + min(10, len(gains))))
    ideal = float((np.sort(gains)[::-1][:10] * shares).sum())
    return 1 + int(ordered_K.argmax()), float((gains[:10] * shares).sum()) / ideal


def _unit(vectors_MD: NDArray[np.float32]) -> NDArray[np.float32]:
    norms_M1 = np.maximum(np.linalg.norm(vectors_MD, axis=1, keepdims=True), 1e-12)
    return np.asarray(vectors_MD / norms_M1, np.float32)


def _rank(scores_M: NDArray[Any], right: int, is_shown_M: NDArray[np.bool_]) -> int:
    """Rank of a document among those that are shown, from 1; of equal ones the first in order is better."""
    before_M = (scores_M > scores_M[right]) | ((scores_M == scores_M[right]) & (np.arange(len(scores_M)) < right))
    return 1 + int((before_M & is_shown_M).sum())


def _text(ids_T: NDArray[np.int32], prompt: str | None, tokenizer: Any) -> str:
    """The words of a text, without the prompt in front of it."""
    decoded = str(tokenizer.decode(ids_T.tolist(), skip_special_tokens=True))
    start = str(tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True)) if prompt else ""
    return decoded.removeprefix(start)
