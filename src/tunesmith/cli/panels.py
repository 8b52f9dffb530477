"""Parts of the screen, each a function from values to something rich can print. Data is always `Text`, never markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tunesmith.cli.forecasts import forecast_facts, probe_facts
from tunesmith.cli.scores import MUTED, rows_and_targets, score_table
from tunesmith.cli.text import count, one_line, option, percent, visible
from tunesmith.formatting import plural

ACCENT = "cyan"
TRAINED = "bold green"
MOST_LABELS = 12
"""Classes named in the plan."""
MOST_GIVEN = 12
"""Settings of the person named in the plan."""
MAX_SPAN = 600
"""Most characters shown of one stretch of the sample row."""


def plan_panel(plan: Mapping[str, Any]) -> RenderableType:
    """What will be done, and why: facts, then each choice that was made for the person."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style=MUTED, no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in plan_facts(plan):
        facts.add_row(name, Text(text))
    parts: list[RenderableType] = [facts]
    if plan.get("choices"):
        parts += [Text(), choices_table(plan["choices"])]
    return Panel(Group(*parts), title="plan", title_align="left", box=ROUNDED, border_style=ACCENT, padding=(1, 2))


def plan_facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of what a plan says beside its choices, also for plain output."""
    rows, trained, total = plan["rows"], plan["trained_parameters"], plan["total_parameters"]
    share = f"{count(trained)} weights are trained ({percent(trained / total)})" if trained else "adapted"
    held_out = f"{plural(rows['train'], 'row')} to train on, {rows['held_out']:,} held out"
    skipped = f", {rows['skipped']:,} skipped" if rows.get("skipped") else ""
    padded = ""
    if "padding" in plan:
        padded = f", {percent(plan['padding'])} of what is computed is padding" if plan["padding"] else ", no padding"
    facts = [
        ("model", f"{visible(str(plan.get('model', '')))}, {count(total)} weights"),
        ("task", f"{plan['task']}, by {plan['method']}: {share}"),
        ("rows", held_out + skipped),
        ("work", f"{plural(plan['steps'], 'step')}, {plan['tokens_per_epoch']:,.0f} tokens an epoch{padded}"),
    ]
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
        found = probe_facts(plan["probe"], plan.get("forecast"), plan["tokens_per_step"])
        facts += [(f"measured {name}", text) for name, text in found]
    return [fact for fact in facts if fact[1]]


def given_options(given: Mapping[str, Any]) -> str:
    """What a person set: optim.lr 0.0001, train.epochs 2."""
    shown = [f"{key} {one_line(option(value), 40)}" for key, value in list(given.items())[:MOST_GIVEN]]
    more = [f"{len(given) - MOST_GIVEN} more"] if len(given) > MOST_GIVEN else []
    return ", ".join([*shown, *more])


def label_counts(rows_of: Mapping[str, int]) -> str:
    """Classes by how many rows have them, most first: 3 classes: good 120, bad 80, odd 2."""
    by_size = sorted(rows_of.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{one_line(name, 40)} {rows:,}" for name, rows in by_size[:MOST_LABELS])
    more = f", … and {len(by_size) - MOST_LABELS} more" if len(by_size) > MOST_LABELS else ""
    return f"{plural(len(rows_of), 'class')}: {shown}{more}"


def choices_table(choices: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=MUTED, show_header=True, pad_edge=False)
    table.add_column("chosen for you", style=ACCENT, no_wrap=True)
    table.add_column("", max_width=36)
    table.add_column("because", style=MUTED, overflow="fold")
    for choice in choices:
        table.add_row(choice["key"], Text(option(choice["value"])), Text(visible(choice["reason"])))
    return table


def sample_row(spans: Iterable[tuple[str, bool]]) -> Text:
    """One row of tokens, what is trained coloured."""
    text = Text("one row of your data: ", style=MUTED)
    text.append("what is learnt", style=TRAINED)
    text.append(" and what is only read\n", style=MUTED)
    for piece, trained in spans:
        shown = visible(piece)
        if len(shown) > MAX_SPAN:
            shown = f"{shown[: MAX_SPAN // 2]} … {shown[-MAX_SPAN // 2 :]}"
        text.append(shown, style=TRAINED if trained else "default")
    return text


def scores(report: Mapping[str, Any]) -> RenderableType:
    """What came of a run in a sentence or two, and each measure beside what it is compared with."""
    from tunesmith.evaluation.report.text import metric_lines, sides

    after = report["metrics"]["after"]
    title = f"held out: {rows_and_targets(after)}; beside each value its 95 % interval"
    table = score_table(metric_lines(report), title=title, columns=sides(report))
    return Group(Text(visible(" ".join(report["headline"]))), Text(), table)


MARKS = {"right": ("✓ ", "green"), "wrong": ("✗ ", "red"), "": ("", "")}


def answers(samples: Iterable[Mapping[str, Any]], *, width: int, most: int) -> RenderableType:
    """Held-out prompts, their reference answers and the two answers to each, side by side."""
    from tunesmith.evaluation.report.text import mark

    table = Table(box=ROUNDED, border_style=MUTED, header_style="bold", show_lines=True, width=min(width, 120))
    table.add_column("prompt", ratio=2, overflow="fold", style=ACCENT)
    table.add_column("reference", ratio=2, overflow="fold")
    table.add_column("before", ratio=3, overflow="fold")
    table.add_column("after", ratio=3, overflow="fold", style=TRAINED)
    room = 44 if width < 100 else 110
    for sample in list(samples)[:most]:
        reference = sample.get("reference", "")
        cells = [Text(one_line(sample.get(key, ""), room) or "(nothing)") for key in ("prompt", "reference")]
        for when in ("before", "after"):
            answer = one_line(sample.get(when, ""), room) or "(nothing)"
            cells.append(Text.assemble(MARKS[mark(sample.get(when, ""), reference)], answer))
        table.add_row(*cells)
    return table
