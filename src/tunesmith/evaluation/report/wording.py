"""What a report says in words and numbers, the same in every form it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.evaluation.report.log import Interval
from tunesmith.measures import MEASURES, OF_ANSWERS, MeasureInfo
from tunesmith.values import duration

Verdict = Literal["better", "worse", "within", ""]

_GIST: Mapping[str, tuple[str, ...]] = {
    "chat": ("perplexity", "token_accuracy", "rougeL"),
    "generate": ("perplexity", "token_accuracy", "rougeL"),
    "text": ("perplexity", "bits_per_byte", "token_accuracy"),
    "summarize": ("rougeL", "rouge1", "perplexity"),
    "classify": ("accuracy", "macro_f1", "micro_f1", "exact_rows", "spearman", "mse", "calibration_error"),
    "tag": ("span_f1", "span_recall", "tag_accuracy"),
}
"""Of each task the measures that say most, in order."""
_VERDICTS = {
    "better": "better: the two 95 % intervals lie apart",
    "worse": "worse: the two 95 % intervals lie apart",
    "within": "within the intervals: these rows cannot tell the two apart",
}
NUM_GIST = 3


@dataclass(frozen=True, slots=True)
class Line:
    """One measure before and after, as it is printed."""

    label: str
    doc: str
    before: str
    before_bounds: str
    after: str
    after_bounds: str
    change: str
    verdict: Verdict
    whiskers: tuple[tuple[float, float, float], tuple[float, float, float]] | None
    """(low, value, high) before and after on a scale from 0 to 1 that both fill; None without intervals."""


def measure_lines(report: Mapping[str, Any]) -> list[Line]:
    """Every measure that was taken before and after."""
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    if before is None or after is None:
        return []
    return [_line(key, before["measures"][key], after["measures"][key]) for key in _common(before, after)]


def gist_lines(report: Mapping[str, Any]) -> list[Line]:
    """The few of them that say most about this task."""
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    return [_line(key, before["measures"][key], after["measures"][key]) for key in gist_keys(report)[:NUM_GIST]]


def gist_keys(report: Mapping[str, Any]) -> list[str]:
    """What was measured before and after, as far as it says much about this task, what says most first."""
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    if before is None or after is None:
        return []
    common = _common(before, after)
    return [key for key in _GIST.get(report["task"], ()) if key in common] or common


def _common(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [key for key in before["measures"] if key in after["measures"]]


def info_of(key: str) -> MeasureInfo:
    """What is known of a measure; one of a newer version stands under its key."""
    return MEASURES.get(key) or MeasureInfo(key, "number", "neither", "")


def _line(key: str, before: Interval, after: Interval) -> Line:
    info = info_of(key)
    change, verdict = _change(info, before, after)
    return Line(
        label=info.label,
        doc=info.doc,
        before=info.text(before["value"]),
        before_bounds=_bounds(info, before),
        after=info.text(after["value"]),
        after_bounds=_bounds(info, after),
        change=change,
        verdict=verdict,
        whiskers=_whiskers(before, after),
    )


def _change(info: MeasureInfo, before: Interval, after: Interval) -> tuple[str, Verdict]:
    """The difference in words, and what it is worth: nothing where the two intervals meet."""
    difference = after["value"] - before["value"]
    if not math.isfinite(difference):
        return "", ""
    if difference == 0:
        return "same", ""
    if info.form == "percent":
        text = f"{difference * 100:+.1f} points"
    elif info.better == "lower" and before["value"] > 0:
        text = f"{difference / before['value']:+.0%}"
    else:
        text = f"{difference:+.2f}" if info.form == "ratio" else f"{difference:+.4f}"
    text = text.replace("-", "−")
    if info.better == "neither" or not (_is_interval(before) and _is_interval(after)):
        return text, ""
    if before["high"] >= after["low"] and after["high"] >= before["low"]:
        return text, "within"
    return text, "better" if (difference < 0) == (info.better == "lower") else "worse"


def _is_interval(interval: Interval) -> bool:
    return all(math.isfinite(interval.get(end, math.nan)) for end in ("low", "high"))


def _bounds(info: MeasureInfo, interval: Interval) -> str:
    if not _is_interval(interval) or not interval["low"] < interval["high"]:
        return ""
    low, high = interval["low"], interval["high"]
    if info.form == "percent":
        return f"{low * 100:.1f}–{high * 100:.1f}"
    return f"{low:.2f}–{high:.2f}" if info.form == "ratio" else f"{low:.3f}–{high:.3f}"


def _whiskers(
    before: Interval, after: Interval
) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
    if not (_is_interval(before) and _is_interval(after)):
        return None
    low, high = min(before["low"], after["low"]), max(before["high"], after["high"])
    if not high > low:
        return None

    def scaled(one: Interval) -> tuple[float, float, float]:
        a, b, c = ((one[end] - low) / (high - low) for end in ("low", "value", "high"))
        return (a, b, c)

    return scaled(before), scaled(after)


def summary(report: Mapping[str, Any]) -> str:
    """What was done and what came of it, in one paragraph."""
    return " ".join(_sentences(report))


def _sentences(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{report['model']} was tuned for the task {report['task']} with the method {report['method']} on "
        f"{plural(report['rows']['train'], 'row')}: {plural(report['steps'], 'step')} in "
        f"{duration(report['seconds']['train'])} on {report['device']}."
    )
    gist = gist_lines(report)
    if gist:
        best = gist[0]
        yield (
            f"On {_rested_on(report, gist_keys(report)[0])}, {best.label} went from "
            f"{with_bounds(best.before, best.before_bounds)} to {with_bounds(best.after, best.after_bounds)}"
            + (f", {_VERDICTS[best.verdict]}." if best.verdict else ".")
        )
    else:
        yield "Nothing was held out, so nothing was measured."
    flipped = report["flips"]
    if flipped is not None:
        yield (
            f"{plural(flipped['num_gained'], 'row')} went from wrong to right, "
            f"{plural(flipped['num_lost'], 'row')} from right to wrong."
        )
    if report["rows"]["skipped"]:
        yield f"{plural(report['rows']['skipped'], 'row')} could not be used: rows/problems.jsonl lists them."


def _rested_on(report: Mapping[str, Any], key: str) -> str:
    """What a measure was counted on, and whether that was trained on."""
    after = report["metrics"]["after"]
    if key == "general_loss":
        return f"{after['general_tokens']:,} tokens of general text"
    counted = f"{plural(after['answers'], 'answer')} to prompts" if key in OF_ANSWERS else _held_out(after)
    overlap = _overlap(report)
    return f"{counted} that were held out ({overlap})" if overlap else f"{counted} it was not trained on"


def _held_out(after: Mapping[str, Any]) -> str:
    return plural(after["documents"], "document") if "documents" in after else plural(after["rows"], "row")


def _overlap(report: Mapping[str, Any]) -> str:
    rows = report["rows"]
    if not rows["overlap"]:
        return ""
    return f"{rows['overlap']:,} of the {plural(rows['held_out'], 'row')} held out also stand in the training files"


def basis(report: Mapping[str, Any]) -> str:
    """What all measures were counted on."""
    after, overlap = report["metrics"]["after"], _overlap(report)
    windows = f" in {plural(after['rows'], 'window')}" if "documents" in after else ""
    parts = [_held_out(after) + windows]
    parts += [f"{plural(after['answers'], 'answer')}"] if "answers" in after else []
    parts += [f"{after['general_tokens']:,} tokens of general text"] if "general_tokens" in after else []
    fair = f"{overlap}: that flatters the tuned model" if overlap else "Nothing was trained on these rows"
    return f"Counted on {', '.join(parts)}. {fair}."


def kept(report: Mapping[str, Any]) -> str:
    """Which step's weights are the result, and why."""
    best, step = report["best"], kept_step(report)
    aside = f" The best evaluation on the way was at step {best['step']:,}." if best and best["step"] != step else ""
    reason = report["kept"].get("reason", "the last step")
    return f"The result has the weights of step {step:,} of {report['steps']:,}: {reason}.{aside}"


def effort(report: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """What was trained, how fast, and what it took."""
    tokens, seconds = report["tokens"], report["seconds"]
    trained, total = plan.get("trained_parameters", 0), plan.get("total_parameters", 0)
    parts = [f"{trained:,} of {total:,} parameters were trained ({trained / total:.1%})"] if total else []
    parts += [
        f"{tokens['processed']:,} tokens, of which {tokens['trained']:,.0f} were learnt",
        f"{report['tokens_per_second']:,.0f} tokens/s in {report['precision']}",
        f"{duration(seconds['prepare'])} to prepare, {duration(seconds['train'])} to train, "
        f"{duration(seconds['evaluate'])} to measure",
        f"at most {report['peak_memory_bytes'] / 2**30:.2f} GiB of memory",
    ]
    return "; ".join(parts) + "."


def looked_at(report: Mapping[str, Any]) -> str:
    """How the surprising rows were chosen."""
    rows, looked = len(report["surprising"]["rows"]), plural(report["surprising"]["looked_at"], "row")
    return f"The {rows:,} that the tuned model finds least likely of {looked} looked at."


def kept_step(report: Mapping[str, Any]) -> int:
    return int(report["kept"].get("step", report["steps"]))


def with_bounds(value: str, bounds: str) -> str:
    return f"{value} ({bounds})" if bounds else value


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def confused_pairs(details: Mapping[str, Any], most: int = 15) -> list[tuple[str, str, int, float]]:
    """(class, taken for, rows, share of the class's rows), most rows first; none of two classes: the matrix says it."""
    labels, counts = details.get("labels", ()), details.get("confusion", ())
    if len(labels) <= 2:
        return []
    pairs = [
        (labels[i], labels[j], int(count), count / max(sum(row), 1))
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], -pair[3], pair[0], pair[1]))[:most]
