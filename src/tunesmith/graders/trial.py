"""Try a grader on answers that must win, on answers that must not win, and on a model's answers."""

# I prompts, S samples of a prompt

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.errors import InputError
from tunesmith.evaluation.bootstrap import intervals, ratio
from tunesmith.evaluation.graded_scores import HISTOGRAM_BINS, mean, mean_scores, pass_at
from tunesmith.graders.grade import Answer, Grade
from tunesmith.graders.pool import Pool
from tunesmith.graders.prompts import Prompt
from tunesmith.types import REWARD_KEY, JsonObject

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
GROUP_SIZES = (4, 8, 16, 32)
NUM_SHOWN = 5
MOST_STUCK = 4
"""Grades that may take too long before the first that does not: all of them would take hours."""


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
    for i, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        yield "empty", i, Answer("")
        yield "echo", i, Answer(prompt.text)
        if reference is None:
            continue
        yield "reference", i, reference
        yield "twice", i, Answer(f"{reference.text}\n{reference.text}", reference.tools)
        later = (references[(i + far) % len(references)] for far in range(1, len(references)))
        foreign = next((other for other in later if other is not None and other != reference), None)
        if foreign is not None:
            yield "foreign", i, foreign


def grade_all(
    pool: Pool,
    prompts: Sequence[Prompt],
    answers: Sequence[tuple[str, int, Answer]],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Graded]:
    """The grade of every (kind, row, answer). Raises InputError where the first ones all took too long."""
    futures = [pool.submit(answer, prompts[i].item) for _, i, answer in answers]
    graded = []
    for (kind, i, answer), future in zip(answers, futures, strict=True):
        graded.append(Graded(kind, i, answer, future.result()))
        progress("grade", len(graded), len(answers))
        if len(graded) == MOST_STUCK and all(entry.grade.kind == "timeout" for entry in graded):
            where, why = prompts[i].source, graded[0].grade.error
            raise InputError(f"{where}: none of the first {MOST_STUCK} grades came in time: {why}. Mend the grader.")
    return graded


def results(prompts: Sequence[Prompt], graded: Sequence[Graded], *, passes: float = 1.0) -> JsonObject:
    """The result of a trial in plain values: rewards by kind of answer, the model's groups, errors and times.

    `passes`: the reward at which an answer counts as right.
    """
    kinds = {kind: [entry for entry in graded if entry.kind == kind] for kind in PLAYED}
    seconds = np.array([entry.grade.seconds for entry in graded])
    return {
        "rows": len(prompts),
        "references": len(kinds["reference"]),
        "grades": len(graded),
        "kinds": {kind: _of_kind(entries) for kind, entries in kinds.items() if entries},
        "model": _of_model(kinds[MODEL], passes) if kinds[MODEL] else None,
        "won": _won(kinds),
        "errors": _errors(prompts, graded),
        "left_out": _left_out(prompts, graded),
        "seconds": {name: float(np.quantile(seconds, share)) for name, share in (("p50", 0.5), ("p99", 0.99))},
        **_extremes(prompts, kinds[MODEL] or kinds["reference"] or graded),
    }


def by_row(entries: Sequence[Graded]) -> dict[int, list[float]]:
    """Rewards by row, for rows with at least one."""
    rewards: dict[int, list[float]] = {}
    for entry in entries:
        if entry.grade.reward is not None:
            rewards.setdefault(entry.row, []).append(entry.grade.reward)
    return rewards


def _of_kind(entries: Sequence[Graded]) -> JsonObject:
    """Count, mean over rows with its interval, sub-scores and histogram of the answers of one kind."""
    rewards = [entry.grade.reward for entry in entries if entry.grade.reward is not None]
    unread = sum(entry.grade.is_unread for entry in entries)
    values: JsonObject = {
        "answers": len(entries),
        "scored": len(rewards),
        "unread": unread,
        "mean": None,
        "counts": [],
        "edges": [],
    }
    if not rewards:
        return values
    means = [mean(group) for group in by_row(entries).values()]
    counts, edges = np.histogram(rewards, bins=HISTOGRAM_BINS)
    values["scores"] = mean_scores([entry.grade.scores for entry in entries])
    values |= {"low": min(rewards), "high": max(rewards), "counts": counts.tolist(), "edges": edges.tolist()}
    return values | {"mean": intervals(len(means), {"mean": ratio(means)})["mean"]}


def _of_model(entries: Sequence[Graded], passes: float) -> JsonObject:
    """Measures of the model's answers, group by group: means over prompts, each with its interval."""
    groups, most = list(by_row(entries).values()), max(Counter(entry.row for entry in entries).values())
    if not groups:
        return {"samples": most, "measures": {}, "groups": {}, "length": None}
    full = [group for group in groups if len(group) == most] or groups
    num = min(map(len, full))
    right = [sum(reward >= passes for reward in group) for group in full]
    measures = intervals(len(groups), {REWARD_KEY: ratio([mean(group) for group in groups])})
    of_full = {
        "pass@1": ratio([c / len(group) for c, group in zip(right, full, strict=True)]),
        f"pass@{num}": ratio([pass_at(num, len(group), c) for c, group in zip(right, full, strict=True)]),
        f"best of {num}": ratio([max(group) for group in full]),
        "groups with spread": ratio([float(max(group) > min(group)) for group in full]),
    }
    measures |= intervals(len(full), of_full)
    spreads = {str(size): mean([spread_of(size, group) for group in full]) for size in GROUP_SIZES}
    return {"samples": most, "measures": measures, "groups": spreads, "length": length_correlation(entries)}


def spread_of(size: int, rewards: Sequence[float]) -> float:
    """The chance that `size` answers to a prompt do not all get the same reward, from the rewards of answers
    that were drawn.

    The estimate has no bias as long as `size` is at most their number. Above it the chance for their number is
    returned, a lower bound: more answers can only spread more.
    """
    counts, num = Counter(rewards).values(), len(rewards)
    size = min(size, num)
    return 1 - sum(math.comb(count, size) for count in counts) / math.comb(num, size)


def length_correlation(entries: Sequence[Graded]) -> float | None:
    """Pearson's r of reward and number of tokens, each less its group's mean, since training compares answers
    within a group. None if either does not vary."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for entry in entries:
        if entry.answer.tokens is not None and entry.grade.reward is not None:
            groups.setdefault(entry.row, []).append((float(entry.answer.tokens), entry.grade.reward))
    tokens: list[float] = []
    rewards: list[float] = []
    for pairs in groups.values():
        for column, values in enumerate((tokens, rewards)):
            centre = mean([pair[column] for pair in pairs])
            values += [pair[column] - centre for pair in pairs]
    spread = math.sqrt(math.fsum(x * x for x in tokens) * math.fsum(y * y for y in rewards))
    return None if spread < 1e-12 else math.fsum(x * y for x, y in zip(tokens, rewards, strict=True)) / spread


def _won(kinds: Mapping[str, Sequence[Graded]]) -> dict[str, JsonObject]:
    """The mean reward of each kind of answer that must not win, and the mean of the references on the same
    rows; without references, of the model's answers."""
    right = "reference" if kinds["reference"] else MODEL
    against = {row: mean(group) for row, group in by_row(kinds[right]).items()}
    won = {}
    for kind in ("empty", "echo", "foreign", "twice"):
        means = {row: mean(group) for row, group in by_row(kinds[kind]).items() if row in against}
        if means:
            others = mean([against[row] for row in means])
            won[kind] = {
                "mean": mean(list(means.values())),
                "against": right,
                "mean_against": others,
                "rows": len(means),
            }
    return won


def _errors(prompts: Sequence[Prompt], graded: Sequence[Graded]) -> list[JsonObject]:
    """Failed grades by kind, the most frequent first: their number, and where the first of them are."""
    failed = Counter(entry.grade.kind for entry in graded if entry.grade.kind is not None)
    errors = []
    for kind, num in failed.most_common():
        first = [entry for entry in graded if entry.grade.kind == kind][:NUM_SHOWN]
        places = [
            {"source": prompts[entry.row].source, "of": entry.kind, "error": entry.grade.error} for entry in first
        ]
        errors.append({"kind": kind, "num": num, "first": places})
    return errors


def _left_out(prompts: Sequence[Prompt], graded: Sequence[Graded]) -> list[JsonObject]:
    """Further numbers of a grader that were none, by name: their number, and the first of them."""
    values: dict[str, JsonObject] = {}
    for entry in graded:
        for name, value in entry.grade.left_out.items():
            first = {"name": name, "num": 0, "source": prompts[entry.row].source, "of": entry.kind, "value": value}
            values.setdefault(name, first)["num"] += 1
    return [values[name] for name in sorted(values)]


def _extremes(prompts: Sequence[Prompt], entries: Sequence[Graded]) -> JsonObject:
    ranked = [entry for entry in entries if entry.grade.reward is not None]
    ranked.sort(key=lambda entry: -(entry.grade.reward or 0.0))

    def shown(entry: Graded) -> JsonObject:
        prompt = prompts[entry.row]
        return {
            "source": prompt.source,
            "of": entry.kind,
            "prompt": prompt.text,
            "answer": entry.answer.text,
            "reference": prompt.reference.text if prompt.reference else None,
            REWARD_KEY: entry.grade.reward,
            "scores": dict(entry.grade.scores),
        }

    best, worst = ranked[:NUM_SHOWN], ranked[: -NUM_SHOWN - 1 : -1]
    return {"best": list(map(shown, best)), "worst": list(map(shown, worst))}
