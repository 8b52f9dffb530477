"""Measures of graded answers: several answers of a model to each prompt, of which prompts are the units."""

# I prompts, n answers to each, k of them looked at

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tunesmith.evaluation.bootstrap import Statistic, ratio
from tunesmith.phrases import percent
from tunesmith.types import REWARD_KEY, JsonObject, Record

MARK = "answer_rewards"
"""The key by which a row's result is known to be of this kind."""
GRAM, MOST_TIMES = 4, 3
"""Words of a phrase, and times that an answer may have it without repeating itself."""
NATS_AWAY = "nats_away"
"""The key of the distance of answers from the untouched model, in results of rows and among measures."""
FAR_AWAY = 10.0
"""Nats an answer: where rewards rose and answers are further away than this, a note says so."""
LONGER = 1 / 3
"""Share: where rewards rose and answers grew or shrank by more than this, a note says so."""
FEWER_ENDED = 0.05
ALIKE = 0.7
"""Share of equal answers above which hardly a group has a spread."""
HISTOGRAM_BINS, MOST_POINTS = 10, 1000


def graded_result(
    content: int, answers: Sequence[Record], passes: float, nats_away: Sequence[float] = ()
) -> JsonObject | None:
    """The result of one prompt, whose content hash is `content`, from its answers: {"text", "reward", "scores",
    "ended", "tokens"}. None where none of them has a reward.

    Its loss is minus its mean reward, which training makes smaller. `passes`: reward
    of an answer that is right. `nats_away`: log-ratio of each answer, by the model and by the untouched one.
    """
    scored = [answer for answer in answers if answer[REWARD_KEY] is not None]
    if not scored:
        return None
    rewards = [float(answer[REWARD_KEY]) for answer in scored]
    texts = Counter(answer["text"].strip() for answer in answers)
    return {
        "hash": f"{content:016x}",
        MARK: rewards,
        "loss": -mean(rewards),
        "count": 1,
        "right": sum(reward >= passes for reward in rewards),
        "ended": sum(answer["ended"] for answer in answers) / len(answers),
        "tokens": sum(answer["tokens"] for answer in answers) / len(answers),
        "repeated": sum(repeats(answer["text"]) for answer in answers) / len(answers),
        "drawn": len(answers),
        "alike": sum(num for num in texts.values() if num > 1) / len(answers),
        "scores": mean_scores([answer["scores"] for answer in scored]),
        "answers": [dict(answer) for answer in answers],
        **({NATS_AWAY: mean(nats_away)} if nats_away else {}),
    }


def repeats(text: str) -> bool:
    """Whether a phrase of four words is there more than three times."""
    words = text.split()
    phrases = Counter(zip(*(words[at:] for at in range(GRAM)), strict=False))
    return max(phrases.values(), default=0) > MOST_TIMES


def graded_statistics(rows: Sequence[Record], _: Sequence[str], complete: bool) -> dict[str, Statistic]:
    """Means over prompts. Of pass@k, k is what was drawn, whatever grade failed,
    over prompts with k rewards."""
    num = least_drawn(rows)
    has_k = np.array([len(row[MARK]) >= num for row in rows])
    columns = {
        REWARD_KEY: [mean(row[MARK]) for row in rows],
        "pass_1": [row["right"] / len(row[MARK]) for row in rows],
        "best_reward": [max(row[MARK]) for row in rows],
        "ended": [row["ended"] for row in rows],
        "answer_tokens": [row["tokens"] for row in rows],
        "repeated": [row["repeated"] for row in rows],
        "alike": [row["alike"] for row in rows],
    }
    if all(NATS_AWAY in row for row in rows):  # not by methods that keep no untouched model, nor by other versions
        columns[NATS_AWAY] = [row[NATS_AWAY] for row in rows]
    statistics = {key: ratio(values) for key, values in columns.items()}
    if has_k.any():
        statistics["pass_k"] = ratio([pass_at(num, len(row[MARK]), row["right"]) for row in rows], has_k)
    for name in sorted({name for row in rows for name in row["scores"]}):
        has = np.array([name in row["scores"] for row in rows])
        statistics[f"score {name}"] = ratio([row["scores"].get(name, 0.0) for row in rows], has)
    return statistics


def least_drawn(rows: Sequence[Record]) -> int:
    """Answers that were drawn to each of these prompts."""
    return min(int(row.get("drawn", len(row[MARK]))) for row in rows)


def with_one_k(sides: Sequence[Sequence[Record]]) -> list[list[JsonObject]]:
    """The rows of all sides, with the pass@k of the fewest answers that a side has drawn."""
    num = min(map(least_drawn, sides))
    return [[{**row, "drawn": num} for row in rows] for rows in sides]


def pass_at(k: int, num: int, right: int) -> float:
    """1 − C(num − right, k) / C(num, k): the chance that one of k answers is right, without bias; 0 of fewer
    than k. Chen et al. 2021, arXiv 2107.03374, equation 1."""
    return 1 - math.comb(num - right, k) / math.comb(num, k) if num >= k else 0.0


def mean(rewards: Sequence[float]) -> float:
    """Rounded once, so that the same rewards in another order have the same mean."""
    return math.fsum(rewards) / len(rewards)


def mean_scores(of_answers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score by its name, over the answers that have it."""
    names = sorted({name for scores in of_answers for name in scores})
    return {name: mean([scores[name] for scores in of_answers if name in scores]) for name in names}


def graded_details(rows: Sequence[Record], _: Sequence[str]) -> JsonObject:
    """The histogram of all rewards, and [tokens, reward] of answers."""
    counts, edges = np.histogram([reward for row in rows for reward in row[MARK]], bins=HISTOGRAM_BINS)
    answers = [answer for row in rows for answer in row["answers"] if answer[REWARD_KEY] is not None]
    lengths = [[int(answer["tokens"]), float(answer[REWARD_KEY])] for answer in answers[:MOST_POINTS]]
    return {"rewards": {"counts": counts.tolist(), "edges": edges.tolist()}, "lengths": lengths}


def graded_notes(before: Mapping[str, Record], after: Mapping[str, Record]) -> Iterator[str]:
    """Sentences on a reward that may have risen by something else than better
    answers. Measures of both sides."""
    was, now = ({key: interval["value"] for key, interval in side.items()} for side in (before, after))
    if REWARD_KEY not in was or REWARD_KEY not in now:
        return
    first, last = was[REWARD_KEY], now[REWARD_KEY]
    if last <= first:
        yield f"the held-out reward did not rise: {first:.4f} before, {last:.4f} after"
        return
    rose = f"reward rose from {first:.3f} to {last:.3f}"
    if abs(now["answer_tokens"] - was["answer_tokens"]) > LONGER * was["answer_tokens"]:
        yield (
            f"{rose}, and answers went from {was['answer_tokens']:.0f} to {now['answer_tokens']:.0f} tokens: "
            "look whether their length wins, not what they say"
        )
    if now.get(NATS_AWAY, 0.0) > FAR_AWAY:
        yield (
            f"{rose}, and an answer is {now[NATS_AWAY]:.0f} nats away from the untouched model: read some. "
            "reinforce.kl: 0.02 or a lower optim.lr keeps it nearer"
        )
    if now["repeated"] > 2 * max(was["repeated"], 0.01):
        share, earlier = percent(now["repeated"], 0), percent(was["repeated"], 0)
        yield (
            f"{rose}, and {share} of the answers repeat themselves ({earlier} before): read some. "
            "reinforce.kl: 0.02 or a lower optim.lr keeps the language"
        )
    if now["alike"] > ALIKE > was["alike"]:
        yield (
            f"{rose}, and {percent(now['alike'], 0)} of the answers equal another one to their prompt: they "
            "have no spread to learn from any more. Train for fewer steps, or on harder prompts"
        )
    if was["ended"] - now["ended"] > FEWER_ENDED:
        yield (
            f"{rose}, and {percent(now['ended'], 0)} of the answers end by themselves "
            f"({percent(was['ended'], 0)} before): reinforce.cut: drop teaches nothing by those that do not"
        )
