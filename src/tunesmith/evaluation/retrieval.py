"""Anchors and their positives: the rank of each positive among many documents, by vectors and by BM25.

Documents are the positives and negatives of the measured rows and of others, each text once. Left out for an anchor is
its own text, and what other rows say belongs to it: a row has one right document.
"""

# I rows, K texts of a row, M documents, D vector size

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
from tunesmith.recipe.objectives import Embed
from tunesmith.recipe.schema import Recipe
from tunesmith.tasks.embedding_losses import SCORED, Texts, text_losses
from tunesmith.tasks.preference_losses import settle
from tunesmith.types import Task

K1, B = 1.2, 0.75
MeasuredRows = tuple[RowStore, NDArray[np.int64], Predictions]
"""Rows of a store, and what a model found of them."""


class Bm25:
    """Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework", section 3.4, with Lucene's logarithm, which
    is never negative."""

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
        for word, found in places.items():
            at, times = np.array(found).T
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
    task: Task, own: MeasuredRows, others: Sequence[MeasuredRows] = (), *, recipe: Recipe, tokenizer: Any
) -> Predictions:
    """The predictions of `own` rows with what follows from all of them together: losses of kto, ranks among the
    documents of `others` too, ranks within a list."""
    _, _, found = own
    if task.outcome == "lists":
        return replace(found, results=_lists(own, tokenizer))
    if task.outcome == "vectors":
        return _vectors(own, others, recipe.embed, tokenizer)
    if found.results and "wanted" in found.results[0]:
        return replace(found, losses_I=np.array(settle(found.results, recipe.prefer)))
    return found


def _vectors(own: MeasuredRows, others: Sequence[MeasuredRows], options: Embed, tokenizer: Any) -> Predictions:
    """Losses, and ranks or the similarities of rows with scores. Losses of ranking are those among all documents."""
    store, rows_I, found = own
    if options.loss not in SCORED:
        losses, results = zip(*_ranked(own, others, options, tokenizer), strict=True)
        if options.loss == "ranking":
            return replace(found, losses_I=np.array(losses), results=list(results))
    vectors = [torch.from_numpy(result["vectors"]) for result in found.results]
    scores = torch.tensor([store.row(int(row)).values[0] for row in rows_I], dtype=torch.float32)
    counts, keys = torch.tensor(list(map(len, vectors))), torch.empty(0, dtype=torch.int64)  # no loss here needs keys
    texts = Texts(torch.cat(vectors), keys, counts, scores)
    if options.loss in SCORED:
        vectors_LD = torch.nn.functional.normalize(texts.vectors_LD, dim=-1)
        cosines_I = (vectors_LD[texts.anchors_B] * vectors_LD[texts.anchors_B + 1]).sum(-1)
        pairs = zip(scores.tolist(), cosines_I.tolist(), strict=True)
        results = tuple({"value": value, "similarity": cosine} for value, cosine in pairs)
    return replace(found, losses_I=text_losses(texts, options).double().numpy(), results=list(results))


def _ranked(
    own: MeasuredRows, others: Sequence[MeasuredRows], options: Embed, tokenizer: Any
) -> Iterator[tuple[float, Mapping[str, Any]]]:
    documents: dict[bytes, NDArray[np.float32]] = {}
    belongs: dict[bytes, set[bytes]] = defaultdict(set)
    rows: list[tuple[bytes, bytes, NDArray[np.float32]]] = []
    """Anchor, positive, and the anchor's vector."""
    for store, rows_I, found in (own, *others):
        for row, result in zip(rows_I.tolist(), found.results, strict=True):
            anchor, *texts = (line.ids.tobytes() for line in lines_of(store.row(row)))
            documents.update(zip(texts, result["vectors"][1:], strict=True))
            belongs[anchor].add(texts[0])
            if found is own[2]:
                rows.append((anchor, texts[0], result["vectors"][0]))
    keys = sorted(documents, key=lambda key: hashlib.blake2b(key).digest())  # ties are broken by chance, always alike
    place = {key: m for m, key in enumerate(keys)}
    vectors_MD = np.stack([documents[key] for key in keys])
    sizes = (vectors_MD.shape[1], *options.dims)
    by_size = [_unit(vectors_MD[:, :size]) for size in sizes]
    bm25 = Bm25([_text(key, options.document_prompt, tokenizer) for key in keys])
    for anchor, positive, vector_D in rows:
        right = place[positive]
        hidden = [place[key] for key in {anchor, *belongs[anchor]} - {positive} if key in place]
        is_shown_M = np.ones(len(keys), np.bool_)
        is_shown_M[hidden] = False
        scores = [of_size @ _unit(vector_D[None, :size])[0] for of_size, size in zip(by_size, sizes, strict=True)]
        first, *cut = (_rank(scores_M, right, is_shown_M) for scores_M in scores)
        logits_M = options.scale * scores[0].astype(np.float64)
        loss = np.logaddexp.reduce(logits_M[is_shown_M]) - logits_M[right]
        result = {
            "rank": first,
            "bm25": _rank(bm25.scores(_text(anchor, options.query_prompt, tokenizer)), right, is_shown_M),
            "documents": int(is_shown_M.sum()),
            **({"dims": dict(zip(map(str, options.dims), cut, strict=True))} if cut else {}),
        }
        yield float(loss), result


def _lists(own: MeasuredRows, tokenizer: Any) -> list[Mapping[str, Any]]:
    """The rank of the best document in its list and nDCG@10 with labels as gains, by the model and by BM25; of rows
    with one document each its score."""
    store, rows_I, found = own
    if (store.branches.counts[rows_I] == 1).all():
        return [{"value": one["scores"][0], "similarity": one["rewards"][0]} for one in found.results]
    rows = [store.row(row) for row in rows_I.tolist()]
    keys = [[line.ids.tobytes() for line in lines_of(row)] for row in rows]
    begins = [4 * int(row.values[0]) for row in rows]  # bytes
    texts = [[_text(key[begin:], None, tokenizer) for key in of] for of, begin in zip(keys, begins, strict=True)]
    bm25, first, results = Bm25([text for of_row in texts for text in of_row]), 0, list[Mapping[str, Any]]()
    for of, begin, result in zip(keys, begins, found.results, strict=True):
        order_K = sorted(range(len(of)), key=lambda k: hashlib.blake2b(of[k]).digest())  # ties are broken by chance
        wanted_K = np.array(result["scores"])[order_K]
        by_words_K = bm25.scores(_text(of[0][:begin], None, tokenizer))[first : first + len(of)][order_K]
        first += len(of)
        rank, ndcg = _in_list(np.array(result["rewards"])[order_K], wanted_K)
        bm25_rank, bm25_ndcg = _in_list(by_words_K, wanted_K)
        more = {"ndcg": ndcg, "bm25_ndcg": bm25_ndcg, "documents": len(of)}
        results.append({"rank": rank, "bm25": bm25_rank, **more})
    return results


def _in_list(scores_K: NDArray[np.float64], wanted_K: NDArray[np.float64]) -> tuple[int, float]:
    """Rank of the first of the best documents, and nDCG@10."""
    ordered_K = wanted_K[np.argsort(-scores_K, kind="stable")]
    gains = ordered_K - min(0.0, float(wanted_K.min()))
    shares = 1 / np.log2(np.arange(2, 2 + min(10, len(gains))))
    ideal = float((np.sort(gains)[::-1][:10] * shares).sum())
    return 1 + int(ordered_K.argmax()), float((gains[:10] * shares).sum()) / ideal if ideal else 1.0


def _unit(vectors_MD: NDArray[np.float32]) -> NDArray[np.float32]:
    norms_M1 = np.maximum(np.linalg.norm(vectors_MD, axis=1, keepdims=True), 1e-12)
    return np.asarray(vectors_MD / norms_M1, np.float32)


def _rank(scores_M: NDArray[Any], right: int, is_shown_M: NDArray[np.bool_]) -> int:
    """Rank of a document among those that are shown, from 1; of equal ones the first in order is better."""
    before_M = (scores_M > scores_M[right]) | ((scores_M == scores_M[right]) & (np.arange(len(scores_M)) < right))
    return 1 + int((before_M & is_shown_M).sum())


def _text(key: bytes, prompt: str | None, tokenizer: Any) -> str:
    """The words of a text, without the prompt in front of it."""
    whole = str(tokenizer.decode(np.frombuffer(key, np.int32).tolist(), skip_special_tokens=True))
    start = str(tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True)) if prompt else ""
    return whole.removeprefix(start)
