"""Values of runs and plans as text, for commands and pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith import phrases
from tunesmith.evaluation.metrics import info_of, is_restated
from tunesmith.evaluation.series import RunSeries, measures_of
from tunesmith.phrases import about, between, duration, one_line, percent, plural, size, visible
from tunesmith.types import REWARD_KEY, Event, Record

if TYPE_CHECKING:
    from tunesmith.evaluation.bootstrap import Interval

PHASES = {
    "read": "reading rows",
    "hash": "fingerprinting data",
    "join": "waiting for the processes of the other devices",
    "encode": "encoding rows",
    "load": "loading the model",
    "plan": "predicting memory and time",
    "probe": "trying the heaviest step",
    "train": "training",
    "evaluate": "measuring held-out rows",
    "reference": "measuring rows with the untouched model",
    "teacher": "reading rows with the teacher",
    "documents": "reading documents",
    "answer": "answering held-out prompts",
    "draw": "drawing answers",
    "grade": "grading",
    "check": "checking rows",
    "general": "measuring general ability",
    "tuned": "reading the tuned model",
    "report": "drawing the report",
    "surprise": "looking for high-loss training rows",
    "download": "downloading the model",
}
"""Words for the phases whose progress is reported; an unknown phase is shown by its key."""
LIST_METRICS = (
    "accuracy", "macro_f1", "micro_f1", "span_f1", "preference_accuracy", "recall_1", "ndcg_10", "spearman",
    REWARD_KEY, "agreement", "exact_match", "rougeL", "token_accuracy",
)  # fmt: skip
"""A list of runs shows the first of these that was measured; exact matches where no reference has two words."""


MOST_LABELS = 12
"""Classes named in the plan."""


MOST_GIVEN = 12
"""Options of the person named in the plan."""


def count(number: float) -> str:
    """A large number: 134.5 M."""
    for unit, divisor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= divisor * 10 or (number >= divisor and unit != "k"):
            return f"{number / divisor:.1f} {unit}"
    return f"{number:,.0f}"


def age(seconds: float) -> str:
    """A past time in one unit: 3 hours ago."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {unit}{'s' if number > 1 else ''} ago"
    return "just now"


def loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if math.isfinite(value) else str(value)


def option(value: Any) -> str:
    """The value of an option as text, without control characters."""
    return visible(phrases.option(value))


def metric_line(event: Event, series: RunSeries) -> str:
    """An evaluation, answers or general event as one line; before the training of a new head the loss alone."""
    values = event.values
    if values["name"] == "before" and series.has_new_head:
        loss = info_of("loss").text(values["loss"])
        return f"loss {loss} ({_counts(event)}; the head is new and answers at random)"
    measures = {"general_loss": {"value": values["loss"]}} if event.kind == "general" else values.get("measures", {})
    if event.kind == "evaluation":
        measures = measures_of(values)
        measures = {key: value for key, value in measures.items() if not is_restated(key, measures)}
    drawn = values.get("drawn")
    infos = [(info_of(key, drawn), interval) for key, interval in measures.items()]
    shown = [f"{info.label} {info.text(interval['value'])}" for info, interval in infos]
    return f"{', '.join(shown)} ({_counts(event)})"


def _counts(event: Event) -> str:
    if event.kind == "answers":
        return plural(event.values["num"], "answer")
    return f"{event.values['tokens']:,} tokens" if event.kind == "general" else rows_and_targets(event.values)


def rows_and_targets(values: Record) -> str:
    """The size of an evaluation: 60 rows, 1,234 targets; or 9 documents in 60 windows, 1,234 targets."""
    rows = plural(values["rows"], "row")
    if "documents" in values:
        rows = f"{plural(values['documents'], 'document')} in {plural(values['rows'], 'window')}"
    return rows if values["targets"] == values["rows"] else f"{rows}, {values['targets']:,.0f} targets"


def headline_metric(before: Mapping[str, Interval], after: Mapping[str, Interval]) -> str:
    """The most important metric, before and after, or with the majority baseline's; "" if there is none."""
    keys = [key for key in LIST_METRICS if key in after and (key != "exact_match" or "rouge2" not in after)]
    if not keys:
        return ""
    key = next((key for key in keys if key in before), keys[0])
    info = info_of(key)
    if key in before:
        return f"{info.label} {info.text(before[key]['value'])} → {info.text(after[key]['value'])}"
    usual = after.get("majority") if key == "accuracy" else None
    baseline = f" (majority {info.text(usual['value'])})" if usual else ""
    return f"{info.label} {info.text(after[key]['value'])}{baseline}"


def first_facts(plan: Record) -> list[tuple[str, str]]:
    """(name, text) of what a person wants to know before the first step, a line each; `plan_facts` has all."""
    by_name = dict(plan_facts({**plan, "forecast": None, "probe": None}))
    rows = f"{by_name['rows']}; {_steps(plan)}"
    facts = [("model", by_name["model"]), ("task", by_name["task"]), ("rows", rows)]
    facts += [("labels", label_counts(plan["labels"], 4))] if plan.get("labels") else []
    facts += [("runs on", by_name["runs on"])] if by_name.get("runs on") else []
    if forecast := plan.get("forecast"):
        each = " on each device" if forecast.get("group") else ""
        facts.append(("memory", f"{size(forecast['memory']['total'])}{each} at most"))
        facts += [("time", time_span(forecast["seconds"]))] if forecast["seconds"] else []
    return facts


def plan_facts(plan: Record) -> list[tuple[str, str]]:
    """(name, text) of the facts of a plan besides its choices."""
    rows, trained, total = plan["rows"], plan["trained_parameters"], plan["total_parameters"]
    share = f"{count(trained)} weights are trained ({percent(trained / total)})" if trained else "adapted"
    held_out = f"{plural(rows['train'], 'row')} to train on, {rows['held_out']:,} held out"
    skipped = f", {rows['skipped']:,} skipped" if rows.get("skipped") else ""
    facts = [
        ("model", f"{visible(str(plan.get('model', '')))}, {count(total)} weights"),
        ("task", f"{plan['task']}, by {plan['method']}: {share}"),
        ("rows", held_out + skipped),
        ("work", f"{_steps(plan)}, {plan['tokens_per_epoch']:,.0f} tokens an epoch"),
    ]
    if plan.get("mix"):
        facts.append(("mix", visible(mix_text(plan["mix"]))))
    if plan.get("given"):
        facts.append(("given", given_options(plan["given"])))
    if plan.get("labels"):
        facts.append(("labels", label_counts(plan["labels"])))
    if plan.get("windows"):
        facts.append(("windows", visible(str(plan["windows"]))))
    if plan.get("device"):
        facts.append(("runs on", f"{plan['device']} in {plan.get('precision', '')}".removesuffix(" in ")))
    if plan.get("took"):
        facts.append(("took", plan["took"]))
    if plan.get("forecast"):
        facts += forecast_facts(plan["forecast"], plan.get("probe"))
    if plan.get("probe"):
        probed = probe_facts(plan["probe"], plan.get("forecast"))
        facts += [(f"measured {name}", text) for name, text in probed]
    return [fact for fact in facts if fact[1]]


def mix_text(sources: Sequence[Record]) -> str:
    """Shares of sources of rows: a.jsonl 70 % (a row 1 × an epoch), b.jsonl 30 % (a row 0.43 × an epoch)."""
    return ", ".join(
        f"{source['path']} {100 * source['share']:.3g} % (each row {source['times']:.3g} × an epoch)"
        for source in sources
    )


def _steps(plan: Record) -> str:
    """The steps, and in epochs where the plan says how many make one: 30 steps (1.5 epochs)."""
    steps = plural(plan["steps"], "step")
    epochs = plan["steps"] / plan.get("steps_per_epoch", math.inf)
    shown = "less than 0.1" if epochs < 0.1 else f"{epochs:,.1f}".removesuffix(".0")
    return f"{steps} ({shown} {'epoch' if shown == '1' else 'epochs'})" if epochs else steps


def given_options(given: Record) -> str:
    """The options that a person set: optim.lr 0.0001, train.epochs 2."""
    shown = [f"{key} {one_line(option(value), 40)}" for key, value in list(given.items())[:MOST_GIVEN]]
    more = [f"{len(given) - MOST_GIVEN} more"] if len(given) > MOST_GIVEN else []
    return ", ".join([*shown, *more])


def label_counts(rows_of: Mapping[str, int], most: int = MOST_LABELS) -> str:
    """Classes by number of rows, most first: 3 classes: good 120, bad 80, odd 2; of numbers 4: 17, 5: 9."""
    by_size = sorted(rows_of.items(), key=lambda item: -item[1])
    names = [one_line(name, 40) if name == name.strip() else repr(name[:40]) for name, _ in by_size[:most]]
    pairs = zip(names, by_size, strict=False)
    shown = ", ".join(f"{name}{':' * name[-1:].isdigit()} {rows:,}" for name, (_, rows) in pairs)
    more = f", … and {len(by_size) - most} more" if len(by_size) > most else ""
    return f"{plural(len(rows_of), 'class')}: {shown}{more}"


Facts = list[tuple[str, str]]


LEAST_PART = 2**20 / 10
"""Bytes of a part of the memory that is named at least."""


SETTLED_SHOWN = 8
"""Steps of usual size that count in a probe, the last ones."""


LEAST_BUSY, MOST_BUSY = 0.15, 0.7
"""Shares of the processor that others take: named from the first on, counted up to the second at most."""


def forecast_facts(forecast: Record, probe: Record | None = None) -> Facts:
    """(name, text) of what is estimated, the most important first; after a probe what it measured too."""
    facts = [("memory", _memory(forecast))]
    seconds = (probe and probe["seconds"]) or forecast["seconds"]
    if seconds:
        facts.append(("time", _time(seconds)))
    if group := forecast.get("group"):
        facts.append(("devices", _group(group)))
    disk = forecast["disk"]
    parts = ", ".join(f"{name} {size(num)}" for name, num in disk.items() if name != "total" and num)
    facts.append(("disk", f"{size(disk['total'])}: {parts}"))
    return facts


def probe_facts(probe: Record, forecast: Record | None) -> Facts:
    """(name, text) of what a probe measured, and what was estimated."""
    facts, peak = [], probe["memory"]
    if peak:
        total = forecast["memory"]["total"] if forecast else 0
        away = f", estimated {size(total)} ({100 * total / peak - 100:+.0f} %)" if total else ""
        facts.append(("memory", f"{size(peak)}{away}"))
    if usual := probe["steps"][1:][-SETTLED_SHOWN:]:
        tokens, taken = (sum(step[key] for step in usual) / len(usual) for key in ("count", "seconds"))
        facts.append(("step", f"{taken:.3g} s, of {tokens:,.0f} tokens"))
    facts += [("note", text) for text in probe["notes"]]
    return facts + ([("ended", f"early: {probe['ended']}")] if probe["ended"] else [])


def _memory(forecast: Record) -> str:
    memory, heavy_pass = forecast["memory"], forecast["pass"]
    heavy = f"{plural(heavy_pass['rows'], 'row')}, {heavy_pass['tokens']:,} tokens, {heavy_pass['targets']:,} targets"
    parts = ", ".join(f"{name} {size(num)}" for name, num in memory["parts"].items() if num > LEAST_PART)
    each = " on each device" if forecast.get("group") else ""
    where = f"of {size(forecast['room'])}, in step {heavy_pass['step']} ({heavy})"
    return f"{size(memory['total'])}{each} at most, {where}: {parts}"


def _group(group: Record) -> str:
    has = "the whole model"
    if group.get("split"):
        has = f"{size(group['split'] // group['devices'])} of the layers and all other weights"
    seconds = f"{group['exchange_seconds']:.2g} s a step"
    return f"{group['devices']}, each with {has} and a part of each step; they exchange numbers {seconds}"


def _time(seconds: Record) -> str:
    span, _, others = time_span(seconds).partition("; ")
    training = seconds["work"]["training"]
    each = f"{about(training['seconds'])} to train ({training['price']:.2g} s a step)"
    rest = f"{about(seconds['total'] - training['seconds'])} for all else"
    return f"{span}: {each}, {rest}{f'; {others}' if others else ''}"


def time_bounds(seconds: Record) -> tuple[float, float, float]:
    """Seconds that a run is expected to take, and from which to which it may."""
    total, low, high = seconds["total"], 1 - seconds["spread"], 1 + seconds["spread"]
    busy = seconds.get("busy", 0.0)  # which an earlier version did not look for
    if busy >= LEAST_BUSY:
        high /= 1 - min(busy, MOST_BUSY)
    return total, low * total, high * total


def time_span(seconds: Record) -> str:
    """The whole time with its range, and what else the processor does: about 5 min (2–7)."""
    busy = seconds.get("busy", 0.0)
    others = f"; other programs take {percent(busy, 0)} of the processor" if busy >= LEAST_BUSY else ""
    return f"{between(*time_bounds(seconds))}{others}"


def took(report: Record) -> str:
    """The time and memory that a finished run took."""
    parts = {"prepare": "to prepare", "train": "to train", "evaluate": "to measure"}
    spans = [f"{duration(report['seconds'][part])} {words}" for part, words in parts.items()]
    return f"{', '.join(spans)}; at most {size(report['peak_memory_bytes'])} of memory"


def step_line(series: RunSeries, *, is_at_work: bool = True) -> str:
    """The newest step: loss, learning rate, speed, memory, and of a run at work the time left."""
    last, left = series.steps[series.step], series.seconds_left if is_at_work else None
    reward = "" if last.reward is None else f"reward {last.reward:.3f}, "
    return (
        f"step {last.step}/{series.total_steps}: {reward}loss {loss(last.loss)}, lr {last.lr:.3g}, "
        f"{last.tokens_per_second:,.0f} tokens/s, {size(series.peak_bytes)}"
        + (f", {duration(left)} left" if left is not None and last.step < series.total_steps else "")
    )


def choice_line(choice: Record) -> str:
    return f"chosen: {choice['key']} = {option(choice['value'])}: {choice['reason']}"
