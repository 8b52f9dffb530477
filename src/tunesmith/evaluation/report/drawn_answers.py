"""The part of a report that has all answers to some held-out prompts, drawn before training and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunesmith.evaluation.graded_scores import MARK, mean
from tunesmith.evaluation.scores import RowResult
from tunesmith.types import REWARD_KEY, JsonObject

RowsByKey = Mapping[tuple[str, int], RowResult]
"""Rows as `scores.by_key` has them."""


def telling_prompts(before: RowsByKey, after: RowsByKey) -> list[JsonObject]:
    """The prompts with the lowest, the median and the highest change of their mean reward, in this order, each as
    {"source", "prompt", "before", "after"}. A side has the mean "reward", and "answers" in the order of their draw.

    Fewer where fewer prompts have rewards on both sides; none where rows are no prompts.
    """
    prompts = list[JsonObject]()
    for key in before.keys() & after.keys():
        if MARK in before[key] and MARK in after[key]:
            sides = {"before": _side(before[key]), "after": _side(after[key])}
            prompts.append({"source": after[key]["source"], "prompt": after[key]["text"], **sides})
    prompts.sort(key=lambda prompt: (prompt["after"][REWARD_KEY] - prompt["before"][REWARD_KEY], prompt["source"]))
    places = sorted({0, len(prompts) // 2, len(prompts) - 1}) if prompts else []
    return [prompts[place] for place in places]


def _side(row: RowResult) -> JsonObject:
    answers: Sequence[JsonObject] = row["answers"]
    shown = [{key: answer[key] for key in ("text", REWARD_KEY, "ended")} for answer in answers]
    return {REWARD_KEY: mean(row[MARK]), "answers": shown}
