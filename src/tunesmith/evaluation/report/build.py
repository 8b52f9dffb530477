"""The report as plain values: the run's events and its folder `evaluation`, joined and judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.evaluation.compare import answer_baseline, changes, row_baseline
from tunesmith.evaluation.report.text import headline
from tunesmith.evaluation.scores import ANSWER_SCORES, RowResult, are_short, by_key, sureness
from tunesmith.evaluation.series import RunSeries
from tunesmith.runs.atomic import from_json
from tunesmith.runs.folder import Run
from tunesmith.types import has_new_head

MOST_LISTED = 40
"""Rows of each list that a report names; all are counted."""
MOST_WORSE = 10
RowsByKey = Mapping[tuple[str, int], RowResult]
"""Rows by hash, and how many with that hash came before."""


def build(run: Run, series: RunSeries, facts: Mapping[str, Any], progress: Mapping[str, Any]) -> dict[str, Any]:
    """Values of report.json; see docs/report.md."""
    new_head = has_new_head({**series.plan, **facts})  # a head of random numbers has no meaningful "before"
    before, after = {} if new_head else rows_of(run, "before"), rows_of(run, "after")
    flipped = flips(before, after) if before else None
    kept = facts.get("kept") or progress.get("kept") or {}
    report = {
        **facts,
        "new_head": new_head,
        "metrics": {"before": None if new_head else series.score("before"), "after": series.score("after")},
        "tokens": {"processed": progress["tokens"], "trained": progress["targets"]},
        "steps": progress["step"],
        "seconds": {part: round(progress[f"{part}_seconds"], 3) for part in ("prepare", "train", "evaluate")},
        "tokens_per_second": round(progress["tokens"] / max(progress["train_seconds"], 1e-9), 2),
        "peak_memory_bytes": series.peak_bytes,
        "best": progress["best"],
        "kept": kept,
        "held_out_curve": [
            [step, values["loss"]] for step, values in series.course(kept.get("step", progress["step"]))
        ],
        "samples": [series.samples[index] for index in sorted(series.samples)],
        "short_answers": are_short([sample["reference"] for sample in series.samples.values()]),
        "details": {
            "before": {} if new_head else _optional(run, "evaluation/before.json", {}),
            "after": _optional(run, "evaluation/after.json", {}),
        },
        "flips": flipped,
        "worse_rows": regressions(before, after) if flipped is None else [],
        "surprising": _optional(run, "evaluation/surprising.json", {"looked_at": 0, "rows": []}),
        "general": _general_ability(series),
    }
    return _judged(run, report)


def _optional(run: Run, name: str, absent: Any) -> Any:
    return run.read_json(name) if (run.path / name).exists() else absent


def _general_ability(series: RunSeries) -> dict[str, Any] | None:
    """Change of general ability; None where it was not measured on both sides."""
    if not {"before", "after"} <= set(series.general):
        return None
    from tunesmith.evaluation.general import assess, loss_change

    before, after = series.general["before"], series.general["after"]
    change = loss_change(before["passages"]["losses"], after["passages"]["losses"], after["passages"]["tokens"])
    text, past_bound = assess(before["loss"], after["loss"], change)
    return {
        "verdict": text,
        "past_bound": past_bound,
        "before": before["loss"],
        "after": after["loss"],
        "change": change,
    }


def _judged(run: Run, report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with its `changes`, `baseline` and `headline`. Raises RunError for a broken file of the evaluation."""
    details = report["details"]["after"]
    classes = details.get("labels", ())
    after = list(rows_of(run, "after").values())
    baseline = row_baseline(after, details.get("constant"), classes)
    if baseline is None and "answers" in (report["metrics"]["after"] or {}):
        baseline = answer_baseline(answers_of(run, "after"))
    found: dict[str, Any] = {"changes": {}, "baseline": baseline}
    if report["metrics"]["before"] is not None:
        before = list(rows_of(run, "before").values())
        answers = [answers_of(run, name) for name in ("before", "after")]
        found["changes"] = changes(before, after, *answers, classes=classes)
        if report.get("general"):
            change = report["general"]["change"]
            found["changes"]["general_loss"] = {**change, "is_clear": change["low"] > 0 or change["high"] < 0}
    whole = {**report, **found}
    return {**whole, "headline": list(headline(whole))}


def kept_report(run: Run) -> dict[str, Any]:
    """The report of a finished run. Raises RunError where there is none, or one of an early form."""
    report = run.read_json("report.json")
    if "headline" not in report:
        raise RunError(f"{run.report_path}: an early version wrote it, in a form that is no longer read.")
    return dict(report)


def rows_of(run: Run, name: str) -> dict[tuple[str, int], RowResult]:
    """Results of the held-out rows in the evaluation `name`, windows of a document added up; none without its file.

    Raises RunError naming the line that is no row.
    """
    path = run.path / "evaluation" / f"{name}.jsonl"
    return by_key(_lines(path, ("source", "hash", "loss", "count"))) if path.exists() else {}


def answers_of(run: Run, name: str) -> list[RowResult]:
    """The answers to held-out prompts in the evaluation `name`, with their scores; none without its file."""
    path = run.path / "evaluation" / f"answers-{name}.jsonl"
    return list(_lines(path, ("source", "prompt", "reference", *ANSWER_SCORES))) if path.exists() else []


def _lines(path: Path, keys: Sequence[str]) -> Iterator[RowResult]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = from_json(line)
            _ = [row[key] for key in keys]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}:{number}: not a row ({error!r}): the file was changed by hand or by a fault."
            ) from error
        yield row


def flips(before: RowsByKey, after: RowsByKey) -> dict[str, Any] | None:
    """Rows that were right and are wrong, and the reverse, surest first; None where no row is right or wrong."""
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for key in before.keys() & after.keys():
        was, now = _is_right(before[key]), _is_right(after[key])
        if was is None or now is None:
            return None
        if was != now:
            found[was].append(_flip(before[key], after[key]))
    if not after:
        return None
    for rows in found.values():
        rows.sort(key=lambda flip: (-flip["probability"], flip["source"]))
    lost, gained = found[True], found[False]
    counts = {"num_lost": len(lost), "num_gained": len(gained)}
    return {**counts, "lost": lost[:MOST_LISTED], "gained": gained[:MOST_LISTED]}


def _is_right(row: RowResult) -> bool | None:
    return bool(target_of(row) == row["predicted"]) if "label" in row or "tags" in row else None


def target_of(row: RowResult) -> Any:
    """The right answer of a row: its class or classes, tags, or number; "" where it is text."""
    return next((row[key] for key in ("label", "tags", "value") if key in row), "")


def _flip(was: RowResult, now: RowResult) -> dict[str, Any]:
    common = {"source": now["source"], "probability": sureness(now), "text": now["text"]}
    if "tags" not in now:
        values = {"label": now["label"], "before": was["predicted"], "after": now["predicted"]}
        return common | {key: label_text(value) for key, value in values.items()}
    moved = [i for i, pair in enumerate(zip(was["predicted"], now["predicted"], strict=True)) if pair[0] != pair[1]]
    words = {"label": now["tags"], "before": was["predicted"], "after": now["predicted"]}
    return common | {key: ", ".join(f"word {i + 1} {tags[i]}" for i in moved) for key, tags in words.items()}


def label_text(label: Any) -> str:
    """A class, several of them, or a number in one text."""
    if isinstance(label, list):
        return ", ".join(map(str, label)) or "none"
    return f"{label:.6g}" if isinstance(label, float) else str(label)


def regressions(before: RowsByKey, after: RowsByKey) -> list[dict[str, Any]]:
    """The rows whose loss per target rose most: source, text where there is one, and the loss before and after."""
    found = []
    for key in before.keys() & after.keys():
        was, now = (row["loss"] / row["count"] if row["count"] else 0.0 for row in (before[key], after[key]))
        if now > was:
            found.append({"source": after[key]["source"], "text": after[key]["text"], "before": was, "after": now})
    found.sort(key=lambda row: (row["before"] - row["after"], row["source"]))
    return found[:MOST_WORSE]
