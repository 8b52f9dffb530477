"""Rows of two models that are equally good, of every kind: what differs between them is chance."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tunesmith.evaluation.scores import RowResult

Draw = np.random.Generator
Sides = list[list[RowResult]]
TAGS = ["O", "B-PER", "I-PER", "B-LOC"]


def _rows(num: int, *, loss: Any, count: Any = None, **columns: Any) -> list[RowResult]:
    counts = np.ones(num) if count is None else count
    given = {"loss": loss, "count": counts, **columns}
    made = {key: values.tolist() if isinstance(values, np.ndarray) else values for key, values in given.items()}
    return [{"hash": f"{i:016x}", **{key: values[i] for key, values in made.items()}} for i in range(num)]


def tokens(draw: Draw, num: int) -> Sides:
    hard, counts = draw.lognormal(0.5, 0.5, num), draw.integers(3, 200, num)

    def side() -> list[RowResult]:
        losses = hard * draw.lognormal(0, 0.2, num) * counts
        return _rows(num, loss=losses, count=counts, correct=draw.binomial(counts, 0.55), bytes=4 * counts)

    return [side(), side()]


def taught(draw: Draw, num: int) -> Sides:
    hard, counts = draw.lognormal(-1, 0.5, num), draw.integers(3, 200, num)

    def side() -> list[RowResult]:
        losses, answers = (hard * draw.lognormal(0, 0.2, num) * counts for _ in range(2))
        return _rows(num, loss=losses, count=counts, answers=answers, agreed=draw.binomial(counts, 0.7))

    return [side(), side()]


def classes(draw: Draw, num: int, size: int = 2) -> Sides:
    names = np.array([f"c{i}" for i in range(size)])
    right, hard = draw.integers(0, size, num), draw.normal(0, 0.5, num)
    every = np.arange(num)

    def side() -> list[RowResult]:
        logits = draw.normal(0, 1, (num, size))
        logits[every, right] += 1.2 + hard
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        found, losses = chances.argmax(1), -np.log(chances[every, right])
        given = {"label": names[right], "predicted": names[found], "probability": chances[every, found]}
        return _rows(num, loss=losses, **given)

    return [side(), side()]


def sets(draw: Draw, num: int) -> Sides:
    true = draw.random((num, 4)) < 0.4

    def side() -> list[RowResult]:
        chances = 1 / (1 + np.exp(-np.where(true, 1, -1) - draw.normal(0, 1.2, true.shape)))
        losses, found = -np.where(true, np.log(chances), np.log1p(-chances)).sum(1), chances > 0.5
        named = [[[f"c{c}" for c in np.flatnonzero(row)] for row in which] for which in (true, found)]
        sure = [row[which].tolist() for row, which in zip(chances, found, strict=True)]
        return _rows(num, loss=losses, count=np.full(num, 4), label=named[0], predicted=named[1], probability=sure)

    return [side(), side()]


def numbers(draw: Draw, num: int) -> Sides:
    """Errors of which a few are large."""
    true, hard = draw.normal(0, 1, num), draw.normal(0, 0.4, num)

    def side() -> list[RowResult]:
        found = true + hard + draw.standard_t(4, num) / 2
        return _rows(num, loss=(found - true) ** 2, value=true, predicted=found)

    return [side(), side()]


def tags(draw: Draw, num: int) -> Sides:
    sizes = draw.integers(4, 25, num)
    true = [draw.choice(TAGS, size, p=[0.6, 0.15, 0.1, 0.15]) for size in sizes]

    def side() -> list[RowResult]:
        found = [np.where(draw.random(len(of)) < 0.15, draw.choice(TAGS, len(of)), of).tolist() for of in true]
        losses = draw.lognormal(0, 0.5, num) * sizes
        return _rows(num, loss=losses, count=sizes, tags=[of.tolist() for of in true], predicted=found)

    return [side(), side()]


def pairs(draw: Draw, num: int) -> Sides:
    lead, reference = draw.normal(0.3, 0.7, num), -draw.lognormal(3, 0.5, (num, 2))
    lengths = draw.integers(5, 80, (num, 2))

    def side() -> list[RowResult]:
        margins, logps = lead + draw.normal(0, 0.5, num), reference + draw.normal(0, 2, (num, 2))
        given = {"logps": logps, "reference": reference, "lengths": lengths, "margin": margins}
        return _rows(num, loss=np.log1p(np.exp(-margins)), **given)

    return [side(), side()]


def answers(draw: Draw, num: int) -> Sides:
    wanted = draw.permutation(np.arange(num) % 2 == 0)
    lead, reference = np.where(wanted, 0.3, -0.3) + draw.normal(0, 0.5, num), -draw.lognormal(3, 0.5, (num, 2))
    lengths = draw.integers(5, 80, (num, 2))

    def side() -> list[RowResult]:
        margins, logps = lead + draw.normal(0, 0.5, num), reference + draw.normal(0, 2, (num, 2))
        given = {"wanted": wanted, "logps": logps, "reference": reference, "lengths": lengths, "margin": margins}
        return _rows(num, loss=1 / (1 + np.exp(margins)), **given)

    return [side(), side()]


def rewards(draw: Draw, num: int) -> Sides:
    sizes = draw.integers(2, 5, num)
    good = [draw.normal(0, 1, size) + np.arange(size)[::-1] / 2 for size in sizes]
    scores, lengths = [list(range(size))[::-1] for size in sizes], [draw.integers(5, 50, n).tolist() for n in sizes]

    def side() -> list[RowResult]:
        found = [(of + draw.normal(0, 0.7, len(of))).tolist() for of in good]
        return _rows(num, loss=draw.lognormal(-0.5, 0.4, num), rewards=found, scores=scores, lengths=lengths)

    return [side(), side()]


def ranks(draw: Draw, num: int) -> Sides:
    hard = draw.normal(0, 1, num)

    def side() -> list[RowResult]:
        found = np.maximum(1, np.round(np.exp(0.7 + 0.6 * hard + draw.normal(0, 0.8, num)))).astype(int)
        losses = np.log1p(found) * draw.lognormal(0, 0.3, num)
        return _rows(num, loss=losses, rank=found, bm25=found, documents=np.full(num, 100))

    return [side(), side()]


def similarities(draw: Draw, num: int) -> Sides:
    true, hard = draw.integers(0, 6, num).astype(float), draw.normal(0, 0.1, num)

    def side() -> list[RowResult]:
        return _rows(num, loss=np.ones(num), value=true, similarity=true / 8 + hard + draw.normal(0, 0.2, num))

    return [side(), side()]


def graded(draw: Draw, num: int) -> Sides:
    """Four answers to each prompt, of which some are right, with a sub-score between 0 and 1."""
    hard = draw.uniform(0, 1, num)

    def side() -> list[RowResult]:
        right = draw.binomial(4, hard)
        rewards = [[1.0] * int(good) + [0.0] * int(4 - good) for good in right]
        scores = [{"style": float(value)} for value in draw.normal(hard, 0.2)]
        shares = {key: draw.binomial(4, 0.6, num) / 4 for key in ("ended", "repeated", "alike")}
        lengths = draw.lognormal(3, 0.4, num)
        columns = {"right": right, "tokens": lengths, "scores": scores, **shares}
        return _rows(num, loss=-right / 4, answer_rewards=rewards, **columns)

    return [side(), side()]


KINDS: Mapping[str, Callable[[Draw, int], Sides]] = {
    "tokens": tokens, "classes": classes, "four classes": lambda draw, num: classes(draw, num, 4), "sets": sets,
    "numbers": numbers, "tags": tags, "pairs": pairs, "answers": answers, "rewards": rewards, "ranks": ranks,
    "similarities": similarities, "graded": graded, "taught": taught,
}  # fmt: skip
