"""Parts of the screen: each a function from values to something that rich can print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tunesmith.evaluation.metrics import VERDICTS, info_of, with_bounds
from tunesmith.phrases import one_line, visible
from tunesmith.summaries.words import option, plan_facts, rows_and_targets
from tunesmith.types import Record

ACCENT_STYLE, MUTED_STYLE, TRAINED_STYLE = "cyan", "bright_black", "bold green"
BETTER, WORSE = "green", "red"
COLOURS = {"better": BETTER, "worse": WORSE}
MARKS = {"right": ("✓ ", "green"), "wrong": ("✗ ", "red"), "": ("", "")}
MAX_SPAN = 600
"""Most characters shown of one span of the sample row."""


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
    screen.print(f"held out: {counted}; each value with its 95 % interval", style=MUTED_STYLE)
    other, ours = values.sides(report)
    constant = [report["baseline"]["name"]] if any(line.baseline for line in lines) else []
    rows: list[list[str | Text]] = []
    for line in lines:
        words = ", ".join(filter(None, [line.change, VERDICTS[line.verdict]]))
        compared = [with_bounds(line.other, line.other_bounds)] if other else []
        after = Text(with_bounds(line.after, line.after_bounds), style="bold")
        change = [Text(words, style=COLOURS.get(line.verdict, MUTED_STYLE))] if other else []
        rows.append([line.label, *compared, after, *change, *([line.baseline] if constant else [])])
    heads = ["", *([other] if other else []), ours, *(["difference"] if other else []), *constant]
    print_table(screen, heads, rows)


def facts_grid(facts: Iterable[tuple[str, str]], *, a_line_each: bool = False) -> Table:
    """Names and texts in two columns; `a_line_each`: what is too long for its line ends in …."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=MUTED_STYLE, no_wrap=True)
    grid.add_column(overflow="ellipsis" if a_line_each else "fold", no_wrap=a_line_each)
    for name, text in facts:
        grid.add_row(name, Text(text))
    return grid


def plan_panel(plan: Record) -> RenderableType:
    """Facts of the plan, then each choice that was made for the person."""
    parts: list[RenderableType] = [facts_grid(plan_facts(plan))]
    if plan.get("choices"):
        parts += [Text(), choices_table(plan["choices"])]
    return Panel(
        Group(*parts), title="plan", title_align="left", box=ROUNDED, border_style=ACCENT_STYLE, padding=(1, 2)
    )


def choices_table(choices: Sequence[Record]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=MUTED_STYLE, show_header=True, pad_edge=False)
    table.add_column("chosen for you", style=ACCENT_STYLE, no_wrap=True)
    table.add_column("", max_width=36)
    table.add_column("because", style=MUTED_STYLE, overflow="fold")
    for choice in choices:
        table.add_row(choice["key"], Text(option(choice["value"])), Text(visible(choice["reason"])))
    return table


def sample_row(spans: Iterable[tuple[str, bool]], *, in_color: bool) -> Text:
    """One row of tokens, its targets coloured, or in brackets where there are no colours."""
    first, last = ("", "") if in_color else ("⟦", "⟧")
    text = Text("one row of your data: ", style=MUTED_STYLE)
    text.append(f"{first}what is learnt{last}", style=TRAINED_STYLE)
    text.append(" and what is only read\n", style=MUTED_STYLE)
    for piece, trained in spans:
        shown = visible(piece)
        if len(shown) > MAX_SPAN:
            shown = f"{shown[: MAX_SPAN // 2]} … {shown[-MAX_SPAN // 2 :]}"
        text.append(f"{first}{shown}{last}" if trained else shown, style=TRAINED_STYLE if trained else "default")
    return text


def answers_table(samples: Mapping[int, Record], *, width: int, most: int) -> RenderableType:
    """Held-out prompts, their reference answers and the two answers to each, side by side."""
    from tunesmith.evaluation.report.values import mark

    table = Table(box=ROUNDED, border_style=MUTED_STYLE, header_style="bold", show_lines=True, width=min(width, 120))
    table.add_column("prompt", ratio=2, overflow="fold", style=ACCENT_STYLE)
    table.add_column("reference", ratio=2, overflow="fold")
    table.add_column("before", ratio=3, overflow="fold")
    table.add_column("after", ratio=3, overflow="fold", style=TRAINED_STYLE)
    longest = 44 if width < 100 else 110
    for index in sorted(samples)[:most]:
        sample = samples[index]
        reference = sample.get("reference", "")
        cells = [Text(one_line(sample.get(key, ""), longest) or "(nothing)") for key in ("prompt", "reference")]
        for when in ("before", "after"):
            if when not in sample:
                words = "not yet" if when == "after" or "after" not in sample else "not asked"
                cells.append(Text(words, style=MUTED_STYLE))
                continue
            answer = one_line(sample.get(when, ""), longest) or "(nothing)"
            answer += "" if sample.get(f"{when}_stopped", True) or answer.endswith("…") else " …"
            cells.append(Text.assemble(MARKS[mark(sample.get(when, ""), reference)], answer))
        table.add_row(*cells)
    return table
