"""The values of a report: the run's events and its folder `evaluation`, joined and judged, with sentences and
formatted metrics that are the same in every form of the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.evaluation.compare import (
    answer_baseline,
    baseline_sentence,
    capitalized,
    changes,
    left_out,
    named,
    never_right,
    row_baseline,
    too_few,
)
from tunesmith.evaluation.metrics import ANSWER_METRICS, BASELINES, FEW_ROWS, MetricInfo, Verdict, info_of, is_restated
from tunesmith.evaluation.report.advice import try_next
from tunesmith.evaluation.report.drawn_answers import telling_prompts
from tunesmith.evaluation.scores import ANSWER_SCORES, RowResult, are_short, by_key, is_short, sureness
from tunesmith.evaluation.series import RunSeries
from tunesmith.phrases import duration, plural
from tunesmith.runs.atomic import from_json
from tunesmith.runs.folder import Run
from tunesmith.tasks import TASKS
from tunesmith.types import JsonObject, Record

MOST_ROWS_LISTED = 40
"""Rows of each list that a report names; all are counted."""
MOST_WORSE = 10
RowsByKey = Mapping[tuple[str, int], RowResult]
"""Rows by hash, and how many with that hash came before."""


def build(run: Run, series: RunSeries, facts: Record, progress: Record) -> JsonObject:
    """Values of report.json; see docs/guide/report.md."""
    new_head = series.has_new_head or bool(facts.get("new_head"))  # random numbers have no meaningful "before"
    before, after = {} if new_head else rows_of(run, "before"), rows_of(run, "after")
    flipped = flips(before, after) if before else None
    kept_facts = facts.get("kept") or progress.get("kept") or {}
    course = series.course(kept_facts.get("step", progress["step"]))
    looks = {step for step, values in series.evaluations if values["name"] == "step"}
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
        "kept": kept_facts,
        "chosen_from": len(looks) if run.recipe().evaluation.keep == "best" and progress["best"] else 0,
        "held_out_curve": [[step, values["loss"]] for step, values in course],
        "samples": [series.samples[index] for index in sorted(series.samples)],
        "class_weights": run.recipe().train.class_weights,
        "short_answers": are_short([sample["reference"] for sample in series.samples.values()]),
        "details": {
            "before": {} if new_head else _optional(run, "evaluation/before.json", {}),
            "after": _optional(run, "evaluation/after.json", {}),
        },
        "flips": flipped,
        "worse_rows": regressions(before, after) if flipped is None else [],
        "drawn_answers": telling_prompts(before, after),
        "surprising": _optional(run, "evaluation/surprising.json", {"looked_at": 0, "rows": []}),
        "general": _general_ability(series),
    }
    judged, recipe = _judged(run, report), run.recipe()
    advices = try_next(judged, course, optim=recipe.optim, train=recipe.train, has_eval=bool(recipe.data.eval))
    return {**judged, "try_next": [asdict(advice) for advice in advices]}


def _optional(run: Run, name: str, absent: Any) -> Any:
    return run.read_json(name) if (run.path / name).exists() else absent


def _general_ability(series: RunSeries) -> JsonObject | None:
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


def _judged(run: Run, report: Record) -> JsonObject:
    """The report with its `changes`, `baseline` and `headline`. Raises RunError for a broken file."""
    details = report["details"]["after"]
    classes = details.get("labels", ())
    after = list(rows_of(run, "after").values())
    baseline = row_baseline(after, details.get("constant"), classes)
    if baseline is None and "answers" in (report["metrics"]["after"] or {}):
        baseline = answer_baseline(answers_of(run, "after"))
    judged: JsonObject = {"changes": {}, "baseline": baseline}
    if report["metrics"]["before"] is not None:
        before = list(rows_of(run, "before").values())
        answers = [answers_of(run, name) for name in ("before", "after")]
        judged["changes"] = changes(before, after, *answers, classes=classes)
        if report.get("general"):
            change = report["general"]["change"]
            judged["changes"]["general_loss"] = {**change, "is_clear": change["low"] > 0 or change["high"] < 0}
    judged_report = {**report, **judged}
    return {**judged_report, "headline": list(headline(judged_report))}


def kept_report(run: Run) -> JsonObject:
    """The report of a finished run. Raises RunError where there is none, or one of an early form."""
    report = run.read_json("report.json")
    if "headline" not in report:
        raise RunError(f"{run.report_path}: an early version wrote it, in a form that is no longer read.")
    return dict(report)


def rows_of(run: Run, name: str) -> dict[tuple[str, int], RowResult]:
    """Results of held-out rows in the evaluation `name`, windows of a document summed; none without its file.

    Raises RunError naming the line that is not a row.
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


def flips(before: RowsByKey, after: RowsByKey) -> JsonObject | None:
    """Rows that were right and are wrong, and the reverse, surest first; None if no row is right or wrong."""
    by_direction: dict[bool, list[JsonObject]] = {True: [], False: []}
    for key in before.keys() & after.keys():
        was, now = _is_right(before[key]), _is_right(after[key])
        if was is None or now is None:
            return None
        if was != now:
            by_direction[was].append(_flip(before[key], after[key]))
    if not after:
        return None
    for rows in by_direction.values():
        rows.sort(key=lambda flip: (-flip["probability"], flip["source"]))
    lost, gained = by_direction[True], by_direction[False]
    counts = {"num_lost": len(lost), "num_gained": len(gained)}
    return {**counts, "lost": lost[:MOST_ROWS_LISTED], "gained": gained[:MOST_ROWS_LISTED]}


def _is_right(row: RowResult) -> bool | None:
    return bool(target_of(row) == row["predicted"]) if "label" in row or "tags" in row else None


def target_of(row: RowResult) -> Any:
    """The right answer of a row: its class or classes, tags, or number; "" where it is text."""
    return next((row[key] for key in ("label", "tags", "value") if key in row), "")


def _flip(was: RowResult, now: RowResult) -> JsonObject:
    common = {"source": now["source"], "probability": sureness(now), "text": now["text"]}
    if "tags" not in now:
        values = {"label": now["label"], "before": was["predicted"], "after": now["predicted"]}
        return common | {key: label_text(value) for key, value in values.items()}
    pairs = zip(was["predicted"], now["predicted"], strict=True)
    moved = [i for i, (before, after) in enumerate(pairs) if before != after]
    words = {"label": now["tags"], "before": was["predicted"], "after": now["predicted"]}
    return common | {key: ", ".join(f"word {i + 1} {tags[i]}" for i in moved) for key, tags in words.items()}


def label_text(label: Any) -> str:
    """A class, several of them, or a number in one text."""
    if isinstance(label, list):
        return ", ".join(map(str, label)) or "none"
    return f"{label:.6g}" if isinstance(label, float) else str(label)


def regressions(before: RowsByKey, after: RowsByKey) -> list[JsonObject]:
    """Rows whose loss per target rose most: source, text if there is one, and the loss before and after."""
    worse = []
    for key in before.keys() & after.keys():
        was, now = (row["loss"] / row["count"] if row["count"] else 0.0 for row in (before[key], after[key]))
        if now > was:
            worse.append({"source": after[key]["source"], "text": after[key]["text"], "before": was, "after": now})
    worse.sort(key=lambda row: (row["before"] - row["after"], row["source"]))
    return worse[:MOST_WORSE]


Interval = Mapping[str, float]
"""{"value"} and, where rows were resampled, {"low", "high"} of its 95 % interval."""


@dataclass(frozen=True, slots=True)
class MetricLine:
    """One metric of the tuned model and of its comparison, formatted."""

    label: str
    doc: str
    other: str
    """Before training, or of the constant answer; "–" where that has none."""
    other_bounds: str
    after: str
    after_bounds: str
    change: str
    """The paired difference with its interval."""
    verdict: Verdict
    baseline: str = ""
    """Measures of the constant answer, where `other` is another side; empty where that has none."""


def sides(report: Record) -> tuple[str, str]:
    """Titles of the two columns of metrics; the first is empty where there is no comparison."""
    if report["metrics"]["before"] is not None:
        return "before", "after"
    return (report["baseline"]["name"] if report["baseline"] else ""), "tuned"


def metric_lines(report: Record) -> list[MetricLine]:
    """Every metric of the result."""
    after = report["metrics"]["after"]
    return [] if after is None else [_line(report, key) for key in after["measures"] if _is_shown(report, key)]


def headline_metrics(report: Record) -> list[str]:
    """Keys of the metrics that matter for this task, most important first."""
    after = report["metrics"]["after"]
    if after is None:
        return []
    shown = [key for key in after["measures"] if _is_shown(report, key)]
    task = TASKS.get(report["task"])
    wanted = [key for key in (task.headline_metrics if task else ()) if key in shown] or shown
    if not (report.get("short_answers") and "exact_match" in shown):
        return wanted
    others = [key for key in wanted if not key.startswith("rouge")]
    leads = after["answers"] >= min(after["rows"], FEW_ROWS)  # two answers are less evidence than all rows
    return ["exact_match", *others] if leads else [*others[:1], "exact_match", *others[1:]]


def _is_shown(report: Record, key: str) -> bool:
    """Neither a constant's metric, which is in the other column, nor one that was not measured
    before, or is there in other words."""
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    if (key in BASELINES and report["baseline"]) or is_restated(key, after["measures"]):
        return False
    return before is None or key in before["measures"]


def _line(report: Record, key: str) -> MetricLine:
    side = report["metrics"]["after"]
    info, after = info_of(key, side.get("drawn")), side["measures"][key]
    other, change = _compared(report, key)
    before, constant = report["metrics"]["before"], _constant(report, key)
    return MetricLine(
        label=info.label,
        doc=info.doc,
        other="–" if other is None else info.text(other["value"]),
        other_bounds="" if other is None else info.bounds(other),
        after=info.text(after["value"]),
        after_bounds=info.bounds(after),
        change=_change(info, after, other, change),
        verdict="" if change is None else info.verdict(change),
        baseline=info.text(constant["value"]) if constant is not None and before is not None else "",
    )


def _compared(report: Record, key: str) -> tuple[Interval | None, Record | None]:
    """The value that a metric is compared with, and the paired difference."""
    if report["metrics"]["before"] is not None:
        return report["metrics"]["before"]["measures"][key], report["changes"].get(key)
    constant = _constant(report, key)
    return (None, None) if constant is None else ({"value": constant["value"]}, constant["change"])


def _constant(report: Record, key: str) -> Record | None:
    """The metric of a constant answer, with the difference from it."""
    constant: Record | None = (report["baseline"] or {"measures": {}})["measures"].get(key)
    return constant


def _change(info: MetricInfo, after: Interval, other: Interval | None, change: Record | None) -> str:
    if other is None or not math.isfinite(difference := after["value"] - other["value"]):
        return ""
    if difference == 0 or (change is not None and change["value"] == 0):
        return "unchanged"
    return info.difference(change or {"value": difference})


def summary(report: Record) -> str:
    """The run and its result in one paragraph."""
    task = TASKS.get(report["task"])
    purpose = (task.purpose if task else "") or report["task"]
    tuned = (
        f"{report['model']} was tuned to {purpose} (method "
        f"{report['method']}) on {plural(report['rows']['train'], 'row')}: {plural(report['steps'], 'step')} "
        f"in {duration(report['seconds']['train'])} on {report['device']}."
    )
    skipped = report["rows"]["skipped"]
    unused = [f"{plural(skipped, 'row')} could not be used: rows/problems.jsonl lists them."] if skipped else []
    return " ".join([tuned, *report["headline"], *unused])


def headline(report: Record) -> Iterator[str]:
    """The result in sentences: its most important metric, against the comparisons that are fair."""
    after, before = report["metrics"]["after"], report["metrics"]["before"]
    if after is None:
        yield "Nothing was held out, so nothing was measured."
        return
    key = leading_key(report)
    info, value, baseline = info_of(key), after["measures"][key], report["baseline"]
    now = info.whole(value)
    where = f"On {_counted_on(report, key)}, "
    if before is not None:
        change = report["changes"].get(key)
        moved = f"{info.label} went from {info.whole(before['measures'][key])} to {now}"
        worth = info.worth(change) if change else ""
        yield f"{where}{moved}{f': {worth}' if worth else ''}."
        if "loss" not in report["changes"]:
            yield (
                "Whether the change may be chance is not known: evaluation/before.jsonl and after.jsonl, which "
                "hold the results of each row, are not both in the run's folder."
            )
    elif baseline is None or baseline["key"] != key:
        yield f"{where}{info.label} is {now}."
    if baseline is not None:
        sentence = baseline_sentence(after["measures"], baseline)
        is_judged = before is None and baseline["key"] == key
        yield f"{where}{sentence}." if is_judged else f"{capitalized(sentence)}."
    if report.get("chosen_from", 0) > 1:
        num = report["chosen_from"]
        yield f"These very rows chose the step, as the best of {num}, which flatters it a little."
    yield from _one_answer(report)
    yield from never_right(report["details"]["after"], weights=report.get("class_weights"))
    yield from left_out(report["details"]["after"])
    num, unit = _num_counted(after, key)
    yield from too_few(num, unit)
    flipped = report["flips"]
    if flipped is not None and before is not None:
        yield (
            f"{plural(flipped['num_gained'], 'row')} went from wrong to right, "
            f"{plural(flipped['num_lost'], 'row')} from right to wrong."
        )


def _one_answer(report: Record) -> Iterator[str]:
    """A sentence where all answers are one, which no measure says as plainly."""
    answers = [sample["after"].strip() for sample in report["samples"] if "after" in sample]
    references = {sample["reference"].strip() for sample in report["samples"] if sample.get("reference")}
    if len(answers) > 1 and len(set(answers)) == 1 < len(references) and is_short(answers[0]):
        yield f"All {len(answers):,} answers are {named(answers[0])}."


def leading_key(report: Record) -> str:
    """The most important metric that is a number on both sides: a constant model has no rank correlation."""
    keys = headline_metrics(report)
    measured = [side["measures"] for side in report["metrics"].values() if side is not None]
    are_finite = (key for key in keys if all(math.isfinite(measures[key]["value"]) for measures in measured))
    return next(are_finite, keys[0])


def _num_counted(after: Record, key: str) -> tuple[int, str]:
    """Number and unit of the items behind a metric."""
    if key in ANSWER_METRICS:
        return after["answers"], "answer"
    return (after["documents"], "document") if "documents" in after else (after["rows"], "row")


def _counted_on(report: Record, key: str) -> str:
    """The items behind a metric, and whether they were trained on."""
    after = report["metrics"]["after"]
    if key == "general_loss":
        return f"{after['general_tokens']:,} tokens of general text"
    counted = plural(*_num_counted(after, key)) + (" to prompts" if key in ANSWER_METRICS else "")
    overlap = _overlap(report)
    return f"{counted} that were held out ({overlap})" if overlap else f"{counted} it was not trained on"


def _overlap(report: Record) -> str:
    rows = report["rows"]
    if not rows["overlap"]:
        return ""
    verb = "is" if rows["overlap"] == 1 else "are"
    return f"{rows['overlap']:,} of the {plural(rows['held_out'], 'row')} held out {verb} also in the training files"


def sample_text(report: Record) -> str:
    """The items behind all metrics."""
    after, overlap = report["metrics"]["after"], _overlap(report)
    windows = f" in {plural(after['rows'], 'window')}" if "documents" in after else ""
    parts = [plural(*_num_counted(after, "loss")) + windows]
    parts += [f"{plural(after['answers'], 'answer')}"] if "answers" in after else []
    parts += [f"{after['general_tokens']:,} tokens of general text"] if "general_tokens" in after else []
    fair = f"{overlap}: that flatters the tuned model" if overlap else "Nothing was trained on these rows"
    if report.get("chosen_from", 0) > 1:
        fair += ", but they chose the step: `tunesmith eval RUN FILE` with rows of neither file is free of that"
    return f"Counted on {', '.join(parts)}. {fair}."


def mark(answer: str, reference: str | None) -> str:
    """right: equal to the reference; wrong: not, if that is so short that nothing else counts; else empty."""
    if not reference:
        return ""
    return "right" if answer.strip() == reference.strip() else "wrong" if is_short(reference) else ""


def selected_step(report: Record) -> int:
    return int(report["kept"].get("step", report["steps"]))


def confused_pairs(details: Record, most: int = 15) -> list[tuple[str, str, int, float]]:
    """(class, taken for, rows, share of the class's rows), most rows first."""
    labels, counts = details.get("labels", ()), details.get("confusion", ())
    pairs = [
        (labels[i], labels[j], int(count), count / max(sum(row), 1))
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], -pair[3], pair[0], pair[1]))[:most]
