"""Values as text, and parts of the screen: each a function from values to something that rich can print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tunesmith import phrases
from tunesmith.evaluation.metrics import VERDICTS, info_of, with_bounds
from tunesmith.evaluation.series import RunSeries, measures_of
from tunesmith.phrases import about, between, mix_text, one_line, percent, plural, size, visible
from tunesmith.types import Event, Record

if TYPE_CHECKING:
    from tunesmith.evaluation.bootstrap import Interval


ACCENT, MUTED, TRAINED = "cyan", "bright_black", "bold green"
BETTER, WORSE = "green", "red"
COLOURS = {"better": BETTER, "worse": WORSE}
MARKS = {"right": ("✓ ", "green"), "wrong": ("✗ ", "red"), "": ("", "")}
LIST_METRICS = (
    "accuracy", "macro_f1", "micro_f1", "span_f1", "preference_accuracy", "recall_1", "ndcg_10", "spearman",
    "exact_match", "rougeL", "token_accuracy",
)  # fmt: skip
"""A list of runs shows the first of these that was measured; exact matches where no reference has two words."""
MOST_LABELS = 12
"""Classes named in the plan."""
MOST_GIVEN = 12
"""Options of the person named in the plan."""
MAX_SPAN = 600
"""Most characters shown of one span of the sample row."""


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
        measures = {key: value for key, value in measures.items() if key != "loss" or "reward" not in measures}
    shown = [f"{info_of(key).label} {info_of(key).text(interval['value'])}" for key, interval in measures.items()]
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


def print_table(
    screen: Console, heads: Sequence[str], rows: Iterable[Sequence[str | Text]], *, spare: Sequence[str] = ()
) -> None:
    """Columns on a terminal, tab-separated lines elsewhere. `spare`: what a narrow terminal has no room for,
    the first to go first."""
    rows = list(rows)
    if not screen.is_terminal:
        for row in (heads, *rows):
            print("\t".join(visible(str(cell)) for cell in row), file=screen.file)
        return
    left_out: set[str] = set()
    for name in (None, *spare):
        left_out |= {name} if name else set()
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for head in heads:
            if head not in left_out:
                table.add_column(head, overflow="fold")
        for row in rows:
            cells = (cell if isinstance(cell, Text) else Text(visible(cell)) for cell in row)
            table.add_row(*(cell for head, cell in zip(heads, cells, strict=True) if head not in left_out))
        if Measurement.get(screen, screen.options.update(width=100_000), table).maximum <= screen.width:
            break
    screen.print(table)


def print_result(screen: Console, report: Record) -> None:
    """A run's result in a sentence or two, and a table of its metrics; nothing where nothing was measured."""
    from tunesmith.evaluation.report import values

    if not report.get("headline") or report["metrics"]["after"] is None:
        return
    screen.print(visible(" ".join(report["headline"])), "", sep="\n")
    leading = info_of(values.leading_key(report)).label  # which the sentence has said
    lines = [line for line in values.metric_lines(report) if line.label != leading]
    if not lines:
        return
    counted = rows_and_targets(report["metrics"]["after"])
    screen.print(f"held out: {counted}; each value with its 95 % interval", style=MUTED)
    other, ours = values.sides(report)
    constant = [report["baseline"]["name"]] if any(line.baseline for line in lines) else []
    rows: list[list[str | Text]] = []
    for line in lines:
        words = ", ".join(filter(None, [line.change, VERDICTS[line.verdict]]))
        compared = [with_bounds(line.other, line.other_bounds)] if other else []
        after = Text(with_bounds(line.after, line.after_bounds), style="bold")
        change = [Text(words, style=COLOURS.get(line.verdict, MUTED))] if other else []
        rows.append([line.label, *compared, after, *change, *([line.baseline] if constant else [])])
    heads = ["", *([other] if other else []), ours, *(["difference"] if other else []), *constant]
    print_table(screen, heads, rows)


def headline_metric(before: Mapping[str, Interval], after: Mapping[str, Interval]) -> str:
    """The most important metric, before and after, or with the majority baseline's; "" if there is none."""
    if not (keys := [key for key in LIST_METRICS if key in after and (key != "exact_match" or "rouge2" not in after)]):
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
        facts += [("time", _span(forecast["seconds"]))] if forecast["seconds"] else []
    return facts


def facts_grid(facts: Iterable[tuple[str, str]], *, a_line_each: bool = False) -> Table:
    """Names and texts in two columns; `a_line_each`: what is too long for its line ends in …."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=MUTED, no_wrap=True)
    grid.add_column(overflow="ellipsis" if a_line_each else "fold", no_wrap=a_line_each)
    for name, text in facts:
        grid.add_row(name, Text(text))
    return grid


def plan_panel(plan: Record) -> RenderableType:
    """Facts of the plan, then each choice that was made for the person."""
    parts: list[RenderableType] = [facts_grid(plan_facts(plan))]
    if plan.get("choices"):
        parts += [Text(), choices_table(plan["choices"])]
    return Panel(Group(*parts), title="plan", title_align="left", box=ROUNDED, border_style=ACCENT, padding=(1, 2))


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


def choices_table(choices: Sequence[Record]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=MUTED, show_header=True, pad_edge=False)
    table.add_column("chosen for you", style=ACCENT, no_wrap=True)
    table.add_column("", max_width=36)
    table.add_column("because", style=MUTED, overflow="fold")
    for choice in choices:
        table.add_row(choice["key"], Text(option(choice["value"])), Text(visible(choice["reason"])))
    return table


def sample_row(spans: Iterable[tuple[str, bool]], *, in_color: bool) -> Text:
    """One row of tokens, its targets coloured, or in brackets where there are no colours."""
    first, last = ("", "") if in_color else ("⟦", "⟧")
    text = Text("one row of your data: ", style=MUTED)
    text.append(f"{first}what is learnt{last}", style=TRAINED)
    text.append(" and what is only read\n", style=MUTED)
    for piece, trained in spans:
        shown = visible(piece)
        if len(shown) > MAX_SPAN:
            shown = f"{shown[: MAX_SPAN // 2]} … {shown[-MAX_SPAN // 2 :]}"
        text.append(f"{first}{shown}{last}" if trained else shown, style=TRAINED if trained else "default")
    return text


def answers_table(samples: Mapping[int, Record], *, width: int, most: int) -> RenderableType:
    """Held-out prompts, their reference answers and the two answers to each, side by side."""
    from tunesmith.evaluation.report.values import mark

    table = Table(box=ROUNDED, border_style=MUTED, header_style="bold", show_lines=True, width=min(width, 120))
    table.add_column("prompt", ratio=2, overflow="fold", style=ACCENT)
    table.add_column("reference", ratio=2, overflow="fold")
    table.add_column("before", ratio=3, overflow="fold")
    table.add_column("after", ratio=3, overflow="fold", style=TRAINED)
    longest = 44 if width < 100 else 110
    for index in sorted(samples)[:most]:
        sample = samples[index]
        reference = sample.get("reference", "")
        cells = [Text(one_line(sample.get(key, ""), longest) or "(nothing)") for key in ("prompt", "reference")]
        for when in ("before", "after"):
            if when not in sample:
                cells.append(Text("not yet" if when == "after" or "after" not in sample else "not asked", style=MUTED))
                continue
            answer = one_line(sample.get(when, ""), longest) or "(nothing)"
            answer += "" if sample.get(f"{when}_stopped", True) or answer.endswith("…") else " …"
            cells.append(Text.assemble(MARKS[mark(sample.get(when, ""), reference)], answer))
        table.add_row(*cells)
    return table


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
    span, _, others = _span(seconds).partition("; ")
    training = seconds["work"]["training"]
    each = f"{about(training['seconds'])} to train ({training['price']:.2g} s a step)"
    rest = f"{about(seconds['total'] - training['seconds'])} for all else"
    return f"{span}: {each}, {rest}{f'; {others}' if others else ''}"


def _span(seconds: Record) -> str:
    """The whole time with its range, and what else the processor does: about 5 min (2–7)."""
    total, low, high = seconds["total"], 1 - seconds["spread"], 1 + seconds["spread"]
    busy = seconds.get("busy", 0.0)  # which an earlier version did not look for
    others = ""
    if busy >= LEAST_BUSY:
        high /= 1 - min(busy, MOST_BUSY)
        others = f"; other programs take {percent(busy, 0)} of the processor"
    return f"{between(total, low * total, high * total)}{others}"
