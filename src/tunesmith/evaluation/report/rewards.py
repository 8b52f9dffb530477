"""The part of a report that says how rewards went, of a run that learnt from them."""

# S steps

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tunesmith.evaluation.report.plots import ACCENT, HELD_OUT_LINE, INK, MUTED, Plot, draw, smooth, thinned
from tunesmith.evaluation.series import RunSeries, measures_of
from tunesmith.phrases import duration, percent, plural
from tunesmith.types import REWARD_KEY, Record


def reward_plots(series: RunSeries, report: Record) -> list[Plot]:
    """Rewards over the steps, their histograms before and after, and rewards by length."""
    plots = [_course(series)] if series.drawn else []
    details = {name: report["details"][name] for name in ("before", "after")}
    if all(of_side.get("rewards") for of_side in details.values()):
        plots.append(_histogram({name: of_side["rewards"] for name, of_side in details.items()}))
    if all(of_side.get("lengths") for of_side in details.values()):
        plots.append(_by_length({name: of_side["lengths"] for name, of_side in details.items()}))
    return plots


def _course(series: RunSeries) -> Plot:
    steps_S = np.array(list(series.drawn), np.float64)
    rewards_S = np.array([values[REWARD_KEY] for values in series.drawn.values()], np.float64)
    window = max(1, len(steps_S) // 25)
    held = [(step, measures_of(values)[REWARD_KEY]) for step, values in series.course()]

    def paint(axes: Any) -> None:
        if window > 1:
            axes.plot(*thinned(steps_S, rewards_S), color=MUTED, linewidth=0.7, alpha=0.45)
        label = "training, smoothed" if window > 1 else "training"
        axes.plot(*thinned(steps_S, smooth(rewards_S, window)), color=INK, linewidth=1.6, label=label)
        values = np.array([interval["value"] for _, interval in held])
        ends = np.array([(i.get("low", i["value"]), i.get("high", i["value"])) for _, i in held]).T
        if len(held):
            spans = np.abs(np.nan_to_num(ends - values))
            steps = [step for step, _ in held]
            axes.errorbar(steps, values, spans, color=ACCENT, elinewidth=1, label="held out", **HELD_OUT_LINE)
        axes.set(xlabel="step", ylabel="mean reward")
        axes.legend(loc="lower right")

    return draw(REWARD_KEY, "Reward", "Mean of a step's answers, and of held-out prompts with 95 % intervals.", paint)


def _histogram(sides: Record) -> Plot:
    def paint(axes: Any) -> None:
        for (name, of_side), color, alpha in zip(sides.items(), (MUTED, ACCENT), (0.6, 0.5), strict=True):
            edges, counts = of_side["edges"], of_side["counts"]
            axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=color, alpha=alpha, label=name)
        axes.set(xlabel="reward of an answer", ylabel="answers")
        axes.legend()

    return draw("rewards", "Rewards before and after", "Of answers to held-out prompts.", paint)


def _by_length(sides: Record) -> Plot:
    def paint(axes: Any) -> None:
        for (name, points), color in zip(sides.items(), (MUTED, ACCENT), strict=True):
            tokens_rewards = np.array(points, np.float64)
            axes.scatter(tokens_rewards[:, 0], tokens_rewards[:, 1], s=9, color=color, alpha=0.5, label=name)
        axes.set(xlabel="tokens of an answer", ylabel="reward of an answer")
        axes.legend()

    return draw("lengths", "Reward by length", "Of answers to held-out prompts, before and after.", paint)


def reward_sentences(series: RunSeries) -> Iterator[str]:
    """Sentences on the answers of the first and of the last quarter of the steps,
    and on where their time went."""
    steps = [series.drawn[step] for step in sorted(series.drawn)]
    if not steps:
        return
    num = max(1, len(steps) // 4)
    first, last = steps[:num], steps[-num:]

    def mean(part: Sequence[Record], key: str) -> float:
        return float(sum(values[key] for values in part) / len(part))

    of = {key: (mean(first, key), mean(last, key)) for key in ("spread", "ended", "answer_tokens", "surprise")}
    yield (
        f"First {plural(num, 'step')} → last {num}: prompts whose answers differ in reward "
        f"{percent(of['spread'][0], 0)} → {percent(of['spread'][1], 0)}; answers that end by themselves "
        f"{percent(of['ended'][0], 0)} → {percent(of['ended'][1], 0)}; tokens of an answer "
        f"{of['answer_tokens'][0]:.1f} → {of['answer_tokens'][1]:.1f}; nats of surprise a token "
        f"{of['surprise'][0]:.2f} → {of['surprise'][1]:.2f}."
    )
    drawn, graded = (sum(values["seconds"][key] for values in steps) for key in ("draw", "grade"))
    learnt = max(0.0, sum(step.seconds for step in series.steps.values()) - drawn - graded)
    failed = sum(sum(values.get("unscored", {}).values()) for values in steps)
    away = max(values.get("largest_mismatch", 0.0) for values in steps)
    yield (
        f"Drawing took {duration(drawn)}, grading {duration(graded)} more, learning {duration(learnt)}; "
        f"{plural(failed, 'answer')} had no reward. The log-probability with which a token was drawn and the one "
        f"with which it is learnt differ by at most {away:.2g} nats."
    )
