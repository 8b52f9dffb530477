"""What a trial says of a grader, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.graders.grade import KINDS
from tunesmith.graders.trial import MODEL, PLAYED
from tunesmith.phrases import percent, plural

BARS = " ▁▂▃▄▅▆▇█"
LEAST_SPREAD, MOST_CORRELATION, MOST_FAILED = 0.2, 0.5, 0.01


@dataclass(frozen=True, slots=True)
class Verdict:
    """A sentence; `refuses`: nothing should be trained with this grader as it is."""

    words: str
    refuses: bool = False


def verdicts(found: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts on `trial.results`, those that refuse first; at least one."""
    some = sorted(_verdicts(found), key=lambda one: not one.refuses)
    if any(one.refuses for one in some):
        return some
    seen = [PLAYED[kind] for kind in found["won"] if kind != "twice"]
    others = " and ".join(filter(None, [", ".join(seen[:-1]), *seen[-1:]]))
    told = f"It tells {PLAYED[_right(found)]} from {others}. " if seen else ""
    return [
        Verdict(f"{told}{'Nothing speaks against this grader.' if not some else 'It can be used; worth knowing:'}"),
        *some,
    ]


def _right(found: Mapping[str, Any]) -> str:
    return str(next((one["against"] for one in found["won"].values()), MODEL))


def _verdicts(found: Mapping[str, Any]) -> Iterator[Verdict]:
    failed = sum(one["num"] for one in found["errors"])
    if failed > MOST_FAILED * found["grades"]:
        kinds = ", ".join(f"{KINDS[one['kind']]}: {one['num']:,}" for one in found["errors"])
        of = f"{failed:,} of {plural(found['grades'], 'grade')} failed ({percent(failed / found['grades'])})"
        yield Verdict(f"{of}, and have no reward: {kinds}. Mend the grader or the rows that are named above.", True)
    known = [one for one in found["kinds"].values() if one["scored"]]
    if not known:
        return
    low, high = min(one["low"] for one in known), max(one["high"] for one in known)
    model = found["kinds"].get(MODEL)
    if low == high:
        yield Verdict(
            f"All grades are {low:g}: there is nothing to learn from. The grader has to tell answers apart.", True
        )
    elif model and model["scored"] and model["low"] == model["high"]:
        why = "there is nothing to learn: take an easier task, a denser grader, or train on references first"
        yield Verdict(f"All answers of the model get {model['low']:g}: {why}.", True)
    if low < high:
        yield from _of_played(found)
    yield from _of_model(found)


def _of_played(found: Mapping[str, Any]) -> Iterator[Verdict]:
    winners = [kind for kind, one in found["won"].items() if kind != "twice" and one["mean"] >= one["mean_against"]]
    if winners:
        got = ", ".join(f"{PLAYED[kind]} gets {found['won'][kind]['mean']:.3g}" for kind in winners)
        against = found["won"][winners[0]]
        right = f"{PLAYED[against['against']]} {against['mean_against']:.3g}"
        if found["kinds"][against["against"]]["high"] == min(
            one["low"] for one in found["kinds"].values() if one["scored"]
        ):
            why = "Either they are not written as the grader wants answers, or it looks at something else"
            yield Verdict(f"{right[0].upper()}{right[1:]}, the lowest reward of all: {got}. {why}.", True)
            return
        yield Verdict(f"The grader can be won without the answer: {got}, {right}. A model would learn just that.", True)
    twice = found["won"].get("twice")
    if twice and twice["against"] == "reference" and twice["mean"] > twice["mean_against"]:
        got = f"{twice['mean']:.3g} instead of {twice['mean_against']:.3g}"
        yield Verdict(f"Saying the reference twice gets more than saying it once, {got}: repeating wins.", True)


def _of_model(found: Mapping[str, Any]) -> Iterator[Verdict]:
    model = found["model"]
    if not model or not model["measures"]:
        return
    spread = model["measures"]["groups with spread"]["value"]
    if spread < LEAST_SPREAD:
        more = f"of 32 {percent(model['groups']['32'], 0)} or more would have it"
        yield Verdict(
            f"Only {percent(spread, 0)} of the groups of {model['samples']} have answers of different reward, and only "
            f"those teach anything; {more}. Ways out: more answers a prompt; an easier task or a denser grader; "
            "training on references first; or the prompts that are neither solved nor hopeless: --keep 0.05:0.95 "
            "--out kept.jsonl."
        )
    length = model["length"]
    if length is not None and abs(length) > MOST_CORRELATION:
        wins = "length wins" if length > 0 else "shortness wins"
        yield Verdict(
            f"Within a group reward follows the number of tokens (correlation {length:.2f}): {wins}. Let a `length` "
            "grader bound it in a `multi` grader, unless it is what you want."
        )


def lines_of(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(what, value, 95 % interval, distribution) of every measure."""
    for kind, one in found["kinds"].items():
        failed = one["answers"] - one["scored"]
        odd = [f"{failed:,} without reward"] * (failed > 0) + [f"{one['unread']:,} without the JSON"] * (
            one["unread"] > 0
        )
        what = PLAYED[kind] + (f" ({', '.join(odd)})" if odd else "")
        if one["mean"] is None:
            yield what, "–", "", ""
            continue
        bars = "".join(BARS[-((1 - len(BARS)) * num // max(one["counts"]))] for num in one["counts"])
        spread = f"{one['low']:.3g} {bars} {one['high']:.3g}" if one["low"] < one["high"] else f"all {one['low']:.3g}"
        yield what, f"{one['mean']['value']:.3f}", _bounds(one["mean"]), spread
        if kind in ("reference", MODEL):
            yield from ((f"  {name}", f"{mean:.3f}", "", "") for name, mean in one["scores"].items())
    model = found["model"] or {"measures": {}, "groups": {}, "length": None}
    for name, measure in model["measures"].items():
        if name != "reward":
            yield name, f"{measure['value']:.3f}", _bounds(measure), ""
    for size, share in model["groups"].items():
        least = "at least " if int(size) > model["samples"] else ""
        yield f"groups of {size} would have spread", f"{least}{percent(share, 0)}", "", ""
    if model["length"] is not None:
        yield "correlation of reward with tokens", f"{model['length']:.2f}", "", ""
    yield "seconds a grade, median and 99 %", f"{found['seconds']['p50']:.2g}, {found['seconds']['p99']:.2g}", "", ""


def _bounds(interval: Mapping[str, float] | None) -> str:
    return f"{interval['low']:.3f} to {interval['high']:.3f}" if interval else ""
