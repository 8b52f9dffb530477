"""Pages of a report and of a comparison as sections of blocks: one value, made into HTML and Markdown."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np

from tunesmith.environment.version import __version__
from tunesmith.evaluation.compare import Comparison
from tunesmith.evaluation.metrics import METRICS, VERDICTS, info_of
from tunesmith.evaluation.report import values
from tunesmith.evaluation.report.advice import next_command
from tunesmith.evaluation.report.plots import ACCENT, INK, MUTED, Plot, draw, length_plot, scatter_plot, training_plots
from tunesmith.evaluation.report.rewards import reward_plots, reward_sentences
from tunesmith.evaluation.report.values import MOST_ROWS_LISTED, label_text, target_of
from tunesmith.evaluation.series import RunSeries
from tunesmith.phrases import duration, one_line, option, percent, plural, size
from tunesmith.runs.folder import Run
from tunesmith.types import REWARD_KEY, Record

MOST_MATRIX = 12
"""Most classes whose confusion matrix is shown; of more, the pairs that are confused most."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table."""

    text: str
    note: str = ""
    """An interval, in small print."""
    mark: str = ""
    """right, wrong, better, worse, unclear, or none."""
    images: Sequence[str] = ()
    """Small images before the text, as data URIs of ours."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column; `kind` says how its cells are set: text of the data, a class, a number, or a drawing."""

    title: str
    kind: Literal["text", "name", "source", "number", "result", "head", "verdict"] = "text"


@dataclass(frozen=True, slots=True)
class Table:
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    look: str = ""
    """CSS classes."""
    shown: int = 1000
    """Rows before those that are folded."""
    kind: str = "table"


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a section; `kind` says how report.html.jinja sets its content: a text, notes, plots, (name,
    text) of facts, or prompts with their answers."""

    kind: Literal["paragraph", "warning", "heading", "code", "items", "figures", "facts", "answers"]
    content: Any
    fold: str = ""
    """The words behind which it is folded."""


@dataclass(frozen=True, slots=True)
class PageSection:
    name: str
    title: str
    blocks: Sequence[Block | Table]


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that a report shows."""

    report: Record
    created: float
    summary: str
    sections: Sequence[PageSection]


def make_page(run: Run, series: RunSeries, report: Record) -> Page:
    """The page of a report; sections that would be empty are left out."""
    made = {
        ("measures", "Measures"): _metrics(report),
        ("notes", "Worth knowing"): _notes(series, report),
        ("next", "Try next"): _try_next(run, report),
        ("rewards", "Rewards"): _rewards(series, report),
        ("training", "Training"): _training(series, report),
        ("details", "Right and wrong"): _outcomes(report["details"]["after"]),
        ("answers", "Answers"): _answers(report),
        ("drawn", "Prompts with all answers"): _drawn_answers(report),
        ("flips", "Rows that flipped" if report["flips"] else "Rows that got worse"): _changed_rows(report),
        ("surprising", "High-loss training rows"): _high_loss(report),
        ("general", "General ability"): _general(report["general"]),
        ("data", "Data"): _data(report),
        ("choices", "Choices"): _choices(series),
        ("repeat", "Repeat"): _repeat(run, series, report),
    }
    sections = [PageSection(name, title, list(blocks)) for (name, title), blocks in made.items()]
    filled = [section for section in sections if section.blocks]
    return Page(report, run.created, values.summary(report), filled)


def _metrics(report: Record) -> Iterator[Block | Table]:
    lines, (other, ours) = values.metric_lines(report), values.sides(report)
    if not lines:
        return
    reading = "Each value has its 95 % interval."
    if other:
        reading += (
            " Both sides are measured on the same rows: a difference is called better or worse where its "
            "paired interval excludes 0."
        )
    yield Block("paragraph", f"{values.sample_text(report)} {reading}")
    compared = [Column(other, "number")] if other else []
    columns = [Column("measure", "head"), *compared, Column(ours, "result")]
    columns += [Column("difference", "number"), Column("", "verdict")] if other else []
    columns += [Column(report["baseline"]["name"], "number")] if any(line.baseline for line in lines) else []
    rows = []
    for line in lines:
        cells = [Cell(line.label), *([Cell(line.other, line.other_bounds)] if other else [])]
        cells.append(Cell(line.after, line.after_bounds))
        if other:
            verdict = Cell(VERDICTS[line.verdict], mark=line.verdict)
            cells += [Cell(line.change), verdict]
        cells += [Cell(line.baseline)] if len(cells) < len(columns) else []
        rows.append(cells)
    yield Table(columns, rows, "stack")
    yield Block("facts", [(line.label, line.doc) for line in lines], fold="What each measure is")


def _notes(series: RunSeries, report: Record) -> Iterator[Block | Table]:
    general = report["general"]
    forgotten = [general["verdict"]] if general and general["past_bound"] else []
    notes = dict.fromkeys([*forgotten, *report["notes"], *series.plan.get("warnings", ()), *series.notes])
    if to_act_on := [note for note in notes if note not in series.plan.get("asides", ())]:
        yield Block("items", to_act_on)


def _try_next(run: Run, report: Record) -> Iterator[Block | Table]:
    for advice in report.get("try_next", ()):
        yield Block("paragraph", advice["why"])
        yield Block("code", next_command(run.path, advice))


def _rewards(series: RunSeries, report: Record) -> Iterator[Block | Table]:
    if series.drawn:
        yield Block("figures", reward_plots(series, report))
        for sentence in reward_sentences(series):
            yield Block("paragraph", sentence)


def _training(series: RunSeries, report: Record) -> Iterator[Block | Table]:
    best, step, tokens, seconds = report["best"], values.selected_step(report), report["tokens"], report["seconds"]
    aside = ""
    if best and best["step"] != step:
        aside = f" The best evaluation on the way was at step {best['step']:,}."
    reason = report["kept"].get("reason", "the last step")
    yield Block("paragraph", f"The result has the weights of step {step:,} of {report['steps']:,}: {reason}.{aside}")
    if not series.drawn:  # whose loss is no measure of anything
        yield Block("figures", training_plots(series, report))
    trained, total = (series.plan.get(f"{which}_parameters", 0) for which in ("trained", "total"))
    share = f"{trained:,} of {total:,} parameters were trained ({percent(trained / total)}); " if total else ""
    yield Block(
        "paragraph",
        f"{share}{tokens['processed']:,} tokens, of which {tokens['trained']:,.0f} were targets; "
        f"{report['tokens_per_second']:,.0f} tokens/s in {report['precision']}; "
        f"{duration(seconds['prepare'])} to prepare, {duration(seconds['train'])} to train, "
        f"{duration(seconds['evaluate'])} to measure; at most {size(report['peak_memory_bytes'])} of memory.",
    )


def _outcomes(details: Record) -> Iterator[Block | Table]:
    """Details that `evaluation.scores` keeps: classes, types of spans, numbers, preferences or ranks."""
    if details.get("scatter"):
        yield Block("figures", [scatter_plot(np.asarray(details["scatter"], np.float64))])
    labels = details.get("labels", ())
    if "confusion" in details and len(labels) <= MOST_MATRIX:
        yield Block("heading", "Rows of each true class (down) by the class they were given (across)")
        columns = [Column("true", "name"), *(Column(one_line(label, 16), "number") for label in labels)]
        counts = zip(labels, details["confusion"], strict=True)
        rows = [[Cell(label), *(Cell(f"{num:,}") for num in row)] for label, row in counts]
        yield Table(columns, rows, "fit")
    elif pairs := values.confused_pairs(details):
        columns = [Column("true", "name"), Column("taken for", "name")]
        columns += [Column("rows", "number"), Column("of its rows", "number")]
        yield Block("heading", "Confused most")
        rows = [[Cell(true), Cell(taken), Cell(str(num)), Cell(percent(share, 0))] for true, taken, num, share in pairs]
        yield Table(columns, rows, "fit")
    if table := details.get("per_class") or details.get("per_type"):
        titles = ("precision", "recall", "F1", "rows")
        columns = [Column("", "name"), *(Column(title, "number") for title in titles)]
        cells = []
        for row in sorted(table, key=lambda row: row["f1"]):
            numbers = [*(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
            cells.append([Cell(str(row.get("label", row.get("type")))), *map(Cell, numbers)])
        yield Block("heading", "Class by class, lowest F1 first")
        yield Table(columns, cells, "fit", shown=MOST_ROWS_LISTED)
    if details.get("threshold"):
        best = max(details["threshold"], key=lambda entry: entry["f1"])
        sentence = f"The best F1 of {labels[1]}, {best['f1']:.3f}, comes with a threshold of {best['threshold']:.2f}"
        yield Block("paragraph", f"{sentence} (predict --threshold).")
    if by_length := details.get("by_length"):
        columns = [Column("the chosen answer is"), Column("pairs", "number"), Column("right", "number")]
        rows = []
        for entry in by_length:
            right = "–" if entry["accuracy"] is None else percent(entry["accuracy"])
            rows.append([Cell(entry["chosen"]), Cell(f"{entry['pairs']:,}"), Cell(right)])
        yield Block("paragraph", "A model that learnt length is right where the chosen answer is longer.")
        yield Table(columns, rows, "fit")
    if recall := details.get("recall"):
        columns = [Column("recall of", "head"), *(Column(f"@{rank}", "number") for rank in recall["at"])]
        rows = [
            [Cell(name), *(Cell(percent(share)) for share in shares)] for name, shares in recall.items() if name != "at"
        ]
        yield Block("paragraph", f"Right documents among the nearest, of {details['documents']:,} documents.")
        yield Table(columns, rows, "fit")


def _answers(report: Record) -> Iterator[Block | Table]:
    samples = report["samples"]
    if not samples:
        return
    answered = sum("before" in sample for sample in samples)
    fewer = ""
    if answered < len(samples):
        fewer = f" The untouched model answered {answered:,} of these {len(samples):,}."
    if not report.get("short_answers"):
        yield Block("paragraph", f"Held-out prompts, answered before and after. ✓ is equal to the reference.{fewer}")
        yield Block("answers", samples)
        return
    words = "Held-out prompts, answered before and after. ✓ is equal to the reference, ✗ is not."
    yield Block("paragraph", f"{words}{fewer}")
    columns = [Column("row", "source"), *(Column(title) for title in ("prompt", "reference", "before", "after"))]
    rows = []
    for sample in samples:
        times = [when for when in ("before", "after") if when in sample]
        marks = {when: values.mark(sample[when], sample["reference"]) for when in times}
        cells = [Cell(sample[key]) for key in ("source", "prompt", "reference")]
        cells[1] = Cell(sample["prompt"], images=sample.get("images", ()))
        cells += [Cell(sample.get(when, ""), mark=marks.get(when, "")) for when in ("before", "after")]
        rows.append(cells)
    yield Table(columns, rows, "rows answered stack", shown=MOST_ROWS_LISTED)


def _drawn_answers(report: Record) -> Iterator[Block | Table]:
    """Prompts of task reinforce with all their answers. A line has the two that the same random numbers drew."""
    prompts = report.get("drawn_answers", ())  # which earlier versions did not keep
    if not prompts:
        return
    yield Block(
        "paragraph",
        "The held-out prompts with the lowest, the median and the highest change of their mean reward, and every "
        "answer that was drawn to them. Answers in one line were drawn by the same random numbers.",
    )
    columns = [Column("before"), Column("reward before", "number"), Column("after"), Column("reward after", "number")]
    for prompt in prompts:
        means = [METRICS[REWARD_KEY].text(prompt[side][REWARD_KEY]) for side in ("before", "after")]
        yield Block("heading", f"Mean reward {' → '.join(means)}")
        yield Block("answers", [{"source": prompt["source"], "prompt": prompt["prompt"]}])
        pairs = zip_longest(*(prompt[side]["answers"] for side in ("before", "after")))
        rows = [[cell for answer in pair for cell in _drawn_answer(answer)] for pair in pairs]
        yield Table(columns, rows, "rows stack")


def _drawn_answer(answer: Record | None) -> list[Cell]:
    """The text of an answer and its reward; empty cells where a side has drawn fewer."""
    if answer is None:
        return [Cell(""), Cell("")]
    reward = "none" if answer[REWARD_KEY] is None else f"{answer[REWARD_KEY]:.4g}".replace("-", "−")
    return [Cell(answer["text"]), Cell(reward, "" if answer["ended"] else "cut at the limit")]


def _changed_rows(report: Record) -> Iterator[Block | Table]:
    flips, worse = report["flips"], report["worse_rows"]
    if flips:
        names = [Column(title, "name") for title in ("true", "before", "after")]
        columns = [Column("row", "source"), Column("text"), *names, Column("sure", "number")]
        for key, words in (("lost", "from right to wrong"), ("gained", "from wrong to right")):
            num, listed = flips[f"num_{key}"], flips[key]
            yield Block("heading", f"{plural(num, 'row')} went {words}")
            if len(listed) < num:
                text = f"The {len(listed)} that the model is surest of; evaluation/after.jsonl has all."
                yield Block("paragraph", text)
            keys = ("source", "text", "label", "before", "after")
            sure = [percent(row["probability"], 0) if row["probability"] else "" for row in listed]
            rows = [list(map(Cell, [*(row[k] for k in keys), p])) for row, p in zip(listed, sure, strict=True)]
            if rows:
                yield Table(columns, rows, "rows stack", shown=12)
    elif worse:
        unit = "documents" if "documents" in report["metrics"]["after"] else "rows"
        yield Block("paragraph", f"The held-out {unit} whose loss per target rose most.")
        columns = [Column("row", "source"), Column("text"), Column("before", "number"), Column("after", "number")]
        losses = [(row, [Cell(f"{row[when]:.4f}") for when in ("before", "after")]) for row in worse]
        rows = [[Cell(row["source"]), Cell(row["text"]), *cells] for row, cells in losses]
        yield Table(columns, rows, "rows stack")


def _high_loss(report: Record) -> Iterator[Block | Table]:
    rows = report["surprising"]["rows"]
    if not rows:
        return
    listed, looked = plural(len(rows), "training row"), report["surprising"]["looked_at"]
    which = f"that the tuned model finds least likely, of {looked:,} that were measured"
    if report["surprising"].get("from") == "training":
        which = (
            f"of highest loss, of {looked:,} that were learnt in the last epoch. A loss is the one that "
            "training saw: before the update of the row's own step"
        )
    yield Block("paragraph", f"The {listed} {which}. Wrong labels and broken rows are often among them.")
    has_labels = "predicted" in rows[0]
    names = [Column("label", "name"), Column("model says", "name")] if has_labels else []
    cells = []
    for row in rows:
        labels = [Cell(label_text(target_of(row))), Cell(label_text(row["predicted"]))] if has_labels else []
        cells.append([Cell(row["source"]), Cell(row["text"]), *labels, Cell(f"{row['loss'] / row['count']:.2f}")])
    yield Table([Column("row", "source"), Column("text"), *names, Column("loss", "number")], cells, "rows stack")


def _general(general: Record | None) -> Iterator[Block | Table]:
    if general:
        yield Block("warning" if general["past_bound"] else "paragraph", general["verdict"])


def _data(report: Record) -> Iterator[Block | Table]:
    rows = report["rows"]
    counts = f"{plural(rows['train'], 'row')} to train on, {rows['held_out']:,} held out, {rows['skipped']:,} skipped."
    yield Block("paragraph", counts)
    yield from _sources(report)
    if report.get("lengths"):
        yield Block("figures", [length_plot(report["lengths"])])


def _sources(report: Record) -> Iterator[Block | Table]:
    """Each source's part in training, and its own loss before and after."""
    mix = {source["path"]: source for source in report.get("mix", ())}
    sides = [(report["metrics"][side] or {}).get("sources", {}) for side in ("before", "after")]
    paths = list(dict.fromkeys([*mix, *sides[0], *sides[1]]))
    if len(paths) < 2:
        return
    titles = ("rows trained", "each seen per epoch", "share of training", "held out", "loss before", "loss after")
    rows = []
    for path in paths:
        source, held = mix.get(path), sides[1].get(path)
        trained = [""] * 3
        if source:
            trained = [f"{source['rows']:,}", f"{source['times']:.3g} ×", percent(source["share"])]
        losses = [_loss(side[path]["loss"]) if path in side else Cell("") for side in sides]
        rows.append([Cell(path), *map(Cell, trained), Cell(f"{held['rows']:,}" if held else ""), *losses])
    yield Table([Column("source", "source"), *(Column(title, "number") for title in titles)], rows, "stack")


def _loss(value: Record) -> Cell:
    return Cell(METRICS["loss"].text(value["value"]), METRICS["loss"].bounds(value))


def _choices(series: RunSeries) -> Iterator[Block | Table]:
    choices: Sequence[Record] = series.plan.get("choices", [])
    if details := [*series.plan.get("asides", ()), *series.plan.get("details", ()), *series.details]:
        yield Block("items", details, fold="Notes that need no action")
    if choices:
        yield Block("paragraph", "Settings that were chosen for you, and why.")
        rows = [[Cell(choice["key"]), Cell(option(choice["value"])), Cell(choice["reason"])] for choice in choices]
        yield Table([Column("option", "head"), Column("value"), Column("why")], rows, "fit stack")


def _repeat(run: Run, series: RunSeries, report: Record) -> Iterator[Block | Table]:
    hashes = [(key, digest) for key, digest in series.identity.items() if not key.startswith("setting ")]
    yield Block("code", f"tunesmith train --recipe {shlex.quote(str(run.recipe_path))}")
    yield Block("code", run.recipe_path.read_text("utf-8"), fold="Recipe")
    yield Block("facts", list(report["versions"].items()), fold="Versions")
    yield Block("facts", hashes, fold="Hashes of model, data and tokenizer")


def comparison_page(names: Sequence[str], found: Sequence[Comparison], task: str) -> Page:
    """The page of `evaluation.compare.compare_runs`; `names`: of all runs, the first one first."""
    keys, unit = list(found[0].metrics), "document" if found[0].are_documents else "row"
    plots = [_plot(key, names, found) for key in keys]
    summary = f"{plural(len(names), 'run')} on the {plural(found[0].num_rows, unit)} that all have; A is {names[0]}."
    versions = {"tunesmith": __version__}
    report = {"name": "Comparison", "task": task, "method": plural(len(names), "run"), "versions": versions}
    sections = [
        PageSection("values", "Values", [comparison_table(names, found)]),
        PageSection("differences", "Differences from A", [Block("figures", plots)]),
    ]
    return Page(report, time.time(), summary, sections)


def comparison_table(names: Sequence[str], found: Sequence[Comparison]) -> Table:
    """A row for each run: its values, and their differences from the first run."""
    keys = list(found[0].metrics)
    rows = [[Cell(names[0]), *(Cell(info_of(key).text(found[0].metrics[key].a)) for key in keys)]]
    for name, comparison in zip(names[1:], found, strict=True):
        differences = [(info_of(key), comparison.metrics.get(key)) for key in keys]
        cells = [
            Cell(info.text(comparison.b), info.worth(comparison.as_change())) if comparison else Cell("–")
            for info, comparison in differences
        ]
        rows.append([Cell(name), *cells])
    titles = [info_of(key, found[0].drawn).label for key in keys]
    return Table([Column("run", "name"), *(Column(title, "number") for title in titles)], rows)


def _plot(key: str, names: Sequence[str], found: Sequence[Comparison]) -> Plot:
    info, others = info_of(key, found[0].drawn), [one_line(name, 30) for name in names[1:]]
    differences = [comparison.metrics[key] for comparison in found if key in comparison.metrics]

    def paint(axes: Any) -> None:
        axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        for y, differs in enumerate(differences):
            interval, colour = differs.b_minus_a, ACCENT if differs.is_clear else MUTED
            marker = "o" if differs.is_clear else "$\\sim$"
            axes.plot([interval["low"], interval["high"]], [y, y], color=colour, linewidth=1.6)
            axes.plot(interval["value"], y, color=colour, marker=marker, linestyle="")
        axes.set_yticks(range(len(differences)), others[: len(differences)])
        axes.set_ylim(len(differences) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")

    better = "" if info.better == "neither" else f"; {info.better} is better"
    text = f"Difference from A with its 95 % interval{better}. A dot: clear; a wave: may be chance, or too few rows."
    return draw(f"difference-{key}", info.label.capitalize(), text, paint, height=70 + 24 * len(differences))
