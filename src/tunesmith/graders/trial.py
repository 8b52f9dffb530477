"""A grader is tried: on answers that must win, on answers that must not, and on those of a model."""

# I prompts, S samples of a prompt

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from tunesmith.evaluation.bootstrap import Interval, intervals, ratio
from tunesmith.graders.grade import Answer, Grade
from tunesmith.graders.pool import Pool
from tunesmith.graders.prompts import Prompt

MODEL = "model"
PLAYED: Mapping[str, str] = {
    "reference": "the row's reference",
    "empty": "an empty answer",
    "echo": "the prompt repeated",
    "foreign": "the reference of another row",
    "twice": "the reference twice",
    MODEL: "the model's answers",
}
"""Kinds of answers that a grader is tried on."""
GROUPS = (4, 8, 16, 32)
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Graded:
    """An answer and its grade."""

    kind: str
    row: int
    answer: Answer
    grade: Grade


def played(prompts: Sequence[Prompt]) -> Iterator[tuple[str, int, Answer]]:
    """(kind, row, answer) of every answer that a row gives without a model."""
    references = [prompt.reference for prompt in prompts]
    for i, prompt in enumerate(prompts):
        yield "empty", i, Answer("")
        yield "echo", i, Answer(prompt.text)
        if (own := references[i]) is None:
            continue
        yield "reference", i, own
        yield "twice", i, Answer(f"{own.text}\n{own.text}", own.tools)
        later = (references[(i + far) % len(references)] for far in range(1, len(references)))
        other = next((one for one in later if one is not None and one != own), None)
        if other is not None:
            yield "foreign", i, other


def grade_all(
    pool: Pool,
    prompts: Sequence[Prompt],
    answers: Sequence[tuple[str, int, Answer]],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Graded]:
    """The grade of every (kind, row, answer)."""
    futures = [pool.submit(answer, prompts[i].item) for _, i, answer in answers]
    found = []
    for (kind, i, answer), future in zip(answers, futures, strict=True):
        found.append(Graded(kind, i, answer, future.result()))
        progress("grade", len(found), len(answers))
    return found


def results(prompts: Sequence[Prompt], graded: Sequence[Graded], *, passes: float = 1.0) -> dict[str, Any]:
    """All that is said of a trial, in plain values: by kind, of the model's groups, of errors and of time.

    `passes`: the reward at which an answer counts as right.
    """
    kinds = {kind: [one for one in graded if one.kind == kind] for kind in PLAYED}
    of_kinds = {kind: _of_kind(some) for kind, some in kinds.items() if some}
    seconds = np.array([one.grade.seconds for one in graded])
    return {
        "rows": len(prompts),
        "references": len(kinds["reference"]),
        "grades": len(graded),
        "kinds": of_kinds,
        "model": _of_model(kinds[MODEL], passes) if kinds[MODEL] else None,
        "won": _won(kinds),
        "errors": _errors(prompts, graded),
        "seconds": {name: float(np.quantile(seconds, share)) for name, share in (("p50", 0.5), ("p99", 0.99))},
        **_extremes(prompts, kinds[MODEL] or kinds["reference"] or graded),
    }


def _scored(some: Sequence[Graded]) -> list[float]:
    return [one.grade.reward for one in some if one.grade.reward is not None]


def groups(some: Sequence[Graded]) -> dict[int, list[Graded]]:
    """Graded answers by their row."""
    return {row: list(members) for row, members in groupby(sorted(some, key=lambda one: one.row), lambda one: one.row)}


def _of_kind(some: Sequence[Graded]) -> dict[str, Any]:
    """Count, mean over rows with its interval, sub-scores and histogram of one kind of answers."""
    rewards = _scored(some)
    means = [math.fsum(own) / len(own) for one in groups(some).values() if (own := _scored(one))]
    unread = sum(one.grade.is_unread for one in some)
    found: dict[str, Any] = {
        "answers": len(some),
        "scored": len(rewards),
        "unread": unread,
        "mean": None,
        "counts": [],
        "edges": [],
    }
    if not rewards:
        return found
    counts, edges = np.histogram(rewards, bins=10)
    names = sorted({name for one in some for name in one.grade.scores})
    scores = {name: [one.grade.scores[name] for one in some if name in one.grade.scores] for name in names}
    found["scores"] = {name: math.fsum(values) / len(values) for name, values in scores.items()}
    found |= {"low": min(rewards), "high": max(rewards), "counts": counts.tolist(), "edges": edges.tolist()}
    return found | {"mean": intervals(len(means), {"mean": ratio(means)})["mean"]}


def _of_model(some: Sequence[Graded], passes: float) -> dict[str, Any]:
    """Means over prompts of what a group of a model's answers says, each with its interval over prompts."""
    rewards = [own for one in groups(some).values() if (own := _scored(one))]
    most = max((len(one) for one in groups(some).values()), default=0)
    if not rewards:
        return {"samples": most, "measures": {}, "groups": {}, "length": None}
    full = [own for own in rewards if len(own) == most] or rewards
    num = min(map(len, full))
    right = [sum(reward >= passes for reward in own) for own in full]
    measures: dict[str, Interval] = intervals(
        len(rewards), {"reward": ratio([math.fsum(own) / len(own) for own in rewards])}
    )
    of_full = {
        "pass@1": ratio([c / len(own) for c, own in zip(right, full, strict=True)]),
        f"pass@{num}": ratio([pass_at(num, len(own), c) for c, own in zip(right, full, strict=True)]),
        f"best of {num}": ratio([max(own) for own in full]),
        "groups with spread": ratio([float(max(own) > min(own)) for own in full]),
    }
    measures |= intervals(len(full), of_full)
    spreads = {str(size): float(np.mean([spread_of(size, own) for own in full])) for size in GROUPS}
    return {"samples": most, "measures": measures, "groups": spreads, "length": length_correlation(some)}


def pass_at(k: int, num: int, right: int) -> float:
    """1 − C(num − right, k) / C(num, k): the chance that one of k answers is right, without bias. Chen et al. 2021,
    arXiv 2107.03374, equation 1."""
    return 1 - math.comb(num - right, k) / math.comb(num, k)


def spread_of(size: int, rewards: Sequence[float]) -> float:
    """The chance that `size` answers to a prompt do not all get one reward, by the rewards of those that were drawn.

    Up to their number it is without bias; beyond it is 1 − Σ p^size of the shares p of each reward, which for rewards
    of 0 and 1 is 1 − p^G − (1 − p)^G, and too low on average: a reward that was not seen has a share of 0.
    """
    counts, num = Counter(rewards).values(), len(rewards)
    if size <= num:
        return 1 - sum(math.comb(count, size) for count in counts) / math.comb(num, size)
    return 1 - math.fsum((count / num) ** size for count in counts)


def length_correlation(some: Sequence[Graded]) -> float | None:
    """Pearson's r of reward and tokens within the groups, whose means are taken out: what training would see. None
    where either does not vary."""
    tokens: list[float] = []
    rewards: list[float] = []
    for members in groups(some).values():
        pairs = [(one.answer.tokens, one.grade.reward) for one in members]
        known = [(float(count), reward) for count, reward in pairs if count is not None and reward is not None]
        for values, column in ((tokens, 0), (rewards, 1)):
            mean = math.fsum(pair[column] for pair in known) / max(len(known), 1)
            values += [pair[column] - mean for pair in known]
    spread = math.sqrt(math.fsum(x * x for x in tokens) * math.fsum(y * y for y in rewards))
    return None if spread < 1e-12 else math.fsum(x * y for x, y in zip(tokens, rewards, strict=True)) / spread


def _won(kinds: Mapping[str, Sequence[Graded]]) -> dict[str, dict[str, Any]]:
    """Of answers that must not win, their mean and that of the references, or else of the model's answers, on the rows
    that have both."""
    right = "reference" if kinds["reference"] else MODEL
    means = {
        kind: {row: math.fsum(own) / len(own) for row, one in groups(kinds[kind]).items() if (own := _scored(one))}
        for kind in (right, "empty", "echo", "foreign", "twice")
    }
    found = {}
    for kind in ("empty", "echo", "foreign", "twice"):
        if both := sorted(means[kind].keys() & means[right].keys()):
            ours, other = (math.fsum(means[one][row] for row in both) / len(both) for one in (kind, right))
            found[kind] = {"mean": ours, "against": right, "mean_against": other, "rows": len(both)}
    return found


def _errors(prompts: Sequence[Prompt], graded: Sequence[Graded]) -> list[dict[str, Any]]:
    """Kinds of failed grades, the commonest first: how many, and the first places."""
    failed = [one for one in graded if one.grade.kind is not None]
    found = []
    for kind, num in Counter(one.grade.kind for one in failed).most_common():
        some = [one for one in failed if one.grade.kind == kind]
        first = [{"source": prompts[one.row].source, "of": one.kind, "error": one.grade.error} for one in some[:SHOWN]]
        found.append({"kind": kind, "num": num, "first": first})
    return found


def _extremes(prompts: Sequence[Prompt], some: Sequence[Graded]) -> dict[str, Any]:
    known = sorted((one for one in some if one.grade.reward is not None), key=lambda one: -(one.grade.reward or 0.0))

    def shown(one: Graded) -> dict[str, Any]:
        prompt = prompts[one.row]
        return {
            "source": prompt.source,
            "of": one.kind,
            "prompt": prompt.text,
            "answer": one.answer.text,
            "reference": prompt.reference.text if prompt.reference else None,
            "reward": one.grade.reward,
            "scores": dict(one.grade.scores),
        }

    return {"best": list(map(shown, known[:SHOWN])), "worst": list(map(shown, known[: -SHOWN - 1 : -1]))}
