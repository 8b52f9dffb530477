"""report.json and report.md: what was done and what it changed, made from the run's own event log."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.files import write_atomic
from tunesmith.run import Run
from tunesmith.types import Event


def write_report(run: Run, facts: Mapping[str, Any], progress: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a finished run, written as report.json and report.md into its folder."""
    events = list(run.events())
    steps = [event for event in events if event.kind == "step"]
    report = {
        **facts,
        "metrics": {name: _score(events, name) for name in ("before", "after")},
        "tokens": {"processed": progress["tokens"], "trained": progress["targets"]},
        "steps": progress["step"],
        "seconds": {part: round(progress[f"{part}_seconds"], 3) for part in ("prepare", "train", "evaluate")},
        "tokens_per_second": round(progress["tokens"] / max(progress["train_seconds"], 1e-9), 2),
        "peak_memory_bytes": max((event.timing["peak_bytes"] for event in steps), default=0),
        "best": progress["best"],
        "held_out_curve": [[e.step, e.values["loss"]] for e in events if e.kind == "evaluation"],
        "samples": _samples(events),
    }
    run.write_json("report.json", report)
    write_atomic(run.path / "report.md", as_markdown(report, str(run.path)).encode())
    return report


def _score(events: Sequence[Event], name: str) -> dict[str, Any] | None:
    """What the evaluation of that name found; None if nothing was held out."""
    for event in reversed(events):
        if event.kind == "evaluation" and event.values["name"] == name:
            score = {key: value for key, value in event.values.items() if key != "name"}
            return {**score, "perplexity": math.exp(min(score["loss"], 700.0))}
    return None


def _samples(events: Sequence[Event]) -> list[dict[str, Any]]:
    by_index: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.kind == "sample":
            values = event.values
            sample = by_index.setdefault(
                values["index"],
                {"prompt": values["prompt"], "reference": values["reference"], "source": values["source"]},
            )
            sample[values["name"]] = values["answer"]
            sample[f"{values['name']}_stopped"] = values["stopped"]
    return [by_index[index] for index in sorted(by_index)]


def as_markdown(report: Mapping[str, Any], run_path: str) -> str:
    """The report for people: one paragraph, the measures, the answers side by side, and how to repeat it."""
    before, after, rows = report["metrics"]["before"], report["metrics"]["after"], report["rows"]
    lines = [
        f"# {report['name']}",
        "",
        f"`{report['model']}` was tuned for the task `{report['task']}` with `{report['method']}` on "
        f"{rows['train']:,} rows ({report['tokens']['trained']:,} trained of {report['tokens']['processed']:,} tokens, "
        f"{report['steps']:,} steps) and measured on {rows['held_out']:,} rows it was not trained on.",
        "",
        *_measures(before, after),
        "",
        f"{report['tokens_per_second']:,.0f} tokens/s, {report['seconds']['train']:,.0f} s of training, "
        f"peak memory {report['peak_memory_bytes'] / 2**30:.2f} GiB, {report['precision']} on {report['device']}.",
    ]
    if rows["skipped"]:
        lines += ["", f"{rows['skipped']:,} rows could not be used and were skipped; `rows/problems.jsonl` lists them."]
    if report["samples"]:
        lines += ["", "## Answers", ""]
        for sample in report["samples"]:
            lines += [
                _fenced("Prompt", sample["prompt"]),
                _fenced("Reference", sample["reference"]),
                _fenced("Before", sample.get("before", "")),
                _fenced("After", sample.get("after", "")),
                "---",
            ]
    lines += [
        "",
        "## Repeat",
        "",
        "```",
        f"tunesmith train --recipe {shlex.quote(run_path + '/recipe.yaml')}",
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {version} |" for name, version in report["versions"].items()),
        "",
    ]
    return "\n".join(lines)


def _measures(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    if before is None or after is None:
        return ["Nothing was held out, so nothing was measured."]
    return [
        "| measure | before | after |",
        "|---|---:|---:|",
        f"| held-out loss, nats per target | {before['loss']:.4f} | {after['loss']:.4f} |",
        f"| perplexity | {before['perplexity']:.2f} | {after['perplexity']:.2f} |",
        f"| token accuracy | {before['token_accuracy']:.1%} | {after['token_accuracy']:.1%} |",
    ]


def _fenced(title: str, text: str) -> str:
    """Text of a row as text: a fence longer than any inside it, so that no row can write into the report."""
    longest = max((len(run) for run in _backticks(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{title}:\n\n{fence}text\n{text}\n{fence}\n"


def _backticks(text: str) -> list[str]:
    runs, current = [], ""
    for character in text + " ":
        if character == "`":
            current += character
        elif current:
            runs.append(current)
            current = ""
    return runs
