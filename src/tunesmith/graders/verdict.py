"""The verdict of a trial on a grader, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tunesmith.graders.grade import FAILURES
from tunesmith.graders.trial import MODEL, PLAYED
from tunesmith.phrases import percent, plural
from tunesmith.types import REWARD_KEY, Record

BARS = " ▁▂▃▄▅▆▇█"
LEAST_SPREAD, MOST_CORRELATION, MOST_FAILED = 0.2, 0.5, 0.01


@dataclass(frozen=True, slots=True)
class Verdict:
    """A sentence about a grader; `refuses`: nothing should be trained with the grader as it is."""

    words: str
    refuses: bool = False


def verdicts(values: Record) -> list[Verdict]:
    """The verdicts on `trial.results`, those that refuse first; at least one."""
    sentences = sorted(_verdicts(values), key=lambda entry: not entry.refuses)
    if any(entry.refuses for entry in sentences):
        return sentences
    if not values["won"]:
        lead = (
            "No row has a reference and no model has answered, so nothing says whether right answers win. Give rows a "
            "field reference, or --model."
        )
        return [Verdict(lead), *sentences]
    seen = [PLAYED[kind] for kind in values["won"] if kind != "twice"]
    others = " and ".join(filter(None, [", ".join(seen[:-1]), *seen[-1:]]))
    strength = ""
    if seen:  # all of them against the same answers
        against = next(iter(values["won"].values()))["against"]
        strength = f"It tells {PLAYED[against]} from {others}. "
    end = "It can be used; worth knowing:" if sentences else "Nothing speaks against this grader."
    return [Verdict(strength + end), *sentences]


def _verdicts(values: Record) -> Iterator[Verdict]:
    failed = sum(entry["num"] for entry in values["errors"])
    is_failing = failed > MOST_FAILED * values["grades"]
    if is_failing:
        kinds = ", ".join(f"{FAILURES[entry['kind']]}: {entry['num']:,}" for entry in values["errors"])
        of = f"{failed:,} of {plural(values['grades'], 'grade')} failed ({percent(failed / values['grades'])})"
        yield Verdict(f"{of}, and have no reward: {kinds}. Mend the grader or the rows that are named above.", True)
    known = [entry for entry in values["kinds"].values() if entry["scored"]]
    if not known:
        return
    low, high = min(entry["low"] for entry in known), max(entry["high"] for entry in known)
    model = values["kinds"].get(MODEL)
    if low == high and not is_failing:  # grades that failed might differ
        yield Verdict(
            f"All grades are {low:g}: there is nothing to learn from. The grader has to tell answers apart.", True
        )
    elif model and model["scored"] and model["low"] == model["high"]:
        why = "there is nothing to learn: take an easier task, a denser grader, or train on references first"
        yield Verdict(f"All answers of the model get {model['low']:g}: {why}.", True)
    if low < high:
        yield from _of_played(values, low, high)
    yield from _of_model(values)


def _of_played(values: Record, low: float, high: float) -> Iterator[Verdict]:
    """Verdicts on answers that no model gave; all grades are from `low` to `high`."""
    empty = values["kinds"].get("empty")
    if not values["won"] and empty and empty["scored"] and empty["low"] == high:
        yield Verdict(f"An empty answer gets {high:.3g}, the most of all: the grader may be won by saying nothing.")
    winners = [
        kind for kind, entry in values["won"].items() if kind != "twice" and entry["mean"] >= entry["mean_against"]
    ]
    if winners:
        got = ", ".join(f"{PLAYED[kind]} gets {values['won'][kind]['mean']:.3g}" for kind in winners)
        against = values["won"][winners[0]]
        right = f"{PLAYED[against['against']]} {against['mean_against']:.3g}"
        if values["kinds"][against["against"]]["high"] == low:
            why = "Either they are not written as the grader wants answers, or it looks at something else"
            yield Verdict(f"{right[0].upper()}{right[1:]}, the lowest reward of all: {got}. {why}.", True)
            return
        yield Verdict(f"The grader can be won without the answer: {got}, {right}. A model would learn just that.", True)
    twice = values["won"].get("twice")
    if twice and twice["against"] == "reference" and twice["mean"] > twice["mean_against"]:
        got = f"{twice['mean']:.3g} instead of {twice['mean_against']:.3g}"
        yield Verdict(f"Saying the reference twice gets more than saying it once, {got}: repeating wins.", True)


def _of_model(values: Record) -> Iterator[Verdict]:
    model = values["model"]
    if not model or not model["measures"]:
        return
    spread = model["measures"]["groups with spread"]["value"]
    if spread < LEAST_SPREAD:
        more = f"of 32 {percent(model['groups']['32'], 0)} or more would have it"
        yield Verdict(
            f"Only {percent(spread, 0)} of the groups of {model['samples']} have answers of different reward, "
            f"and only those teach anything; {more}. Ways out: more answers a prompt; an easier task or a "
            "denser grader; training on references first; or the prompts that are neither solved nor hopeless: "
            "--keep 0.05:0.95 --out kept.jsonl."
        )
    length = model["length"]
    if length is not None and abs(length) > MOST_CORRELATION:
        wins = "length wins" if length > 0 else "shortness wins"
        yield Verdict(
            f"Within a group reward follows the number of tokens (correlation {length:.2f}): {wins}. Let a "
            "`length` grader bound it in a `multi` grader, unless it is what you want."
        )


def lines_of(values: Record) -> Iterator[tuple[str, str, str, str]]:
    """(what, value, 95 % interval, distribution) of every measure."""
    for kind, entry in values["kinds"].items():
        yield _line_of_kind(kind, entry)
        if entry["mean"] is not None and kind in ("reference", MODEL):
            yield from ((f"  {name}", f"{mean:.3f}", "", "") for name, mean in entry["scores"].items())
    model = values["model"] or {"measures": {}, "groups": {}, "length": None}
    for name, measure in model["measures"].items():
        if name != REWARD_KEY:
            yield name, f"{measure['value']:.3f}", _bounds(measure), ""
    for size, share in model["groups"].items():
        least = "at least " if int(size) > model["samples"] else ""
        yield f"groups of {size} would have spread", f"{least}{percent(share, 0)}", "", ""
    if model["length"] is not None:
        yield "correlation of reward with tokens", f"{model['length']:.2f}", "", ""
    yield "seconds a grade, median and 99 %", f"{values['seconds']['p50']:.2g}, {values['seconds']['p99']:.2g}", "", ""


def _line_of_kind(kind: str, entry: Record) -> tuple[str, str, str, str]:
    """The line of one kind of answers, with a histogram of their rewards."""
    odd = {"without reward": entry["answers"] - entry["scored"], "without the JSON": entry["unread"]}
    counted = ", ".join(f"{num:,} {words}" for words, num in odd.items() if num)
    what = f"{PLAYED[kind]} ({counted})" if counted else PLAYED[kind]
    if entry["mean"] is None:
        return what, "–", "", ""
    spread = f"all {entry['low']:.3g}"
    if entry["low"] < entry["high"]:
        most = max(entry["counts"])
        bars = "".join(BARS[math.ceil((len(BARS) - 1) * num / most)] for num in entry["counts"])
        spread = f"{entry['low']:.3g} {bars} {entry['high']:.3g}"
    return what, f"{entry['mean']['value']:.3f}", _bounds(entry["mean"]), spread


def _bounds(interval: Mapping[str, float] | None) -> str:
    return f"{interval['low']:.3f} to {interval['high']:.3f}" if interval else ""
