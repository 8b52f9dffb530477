"""The report as plain values: all of it that repeats when the run is repeated, and a few times and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.evaluation import forgetting
from tunesmith.evaluation.report.held_out import flips, rows_of, worse_rows
from tunesmith.evaluation.report.judging import judged
from tunesmith.evaluation.report.log import Log
from tunesmith.evaluation.scores import are_short
from tunesmith.runs.folder import Run
from tunesmith.types import has_new_head


def build(run: Run, log: Log, facts: Mapping[str, Any], progress: Mapping[str, Any]) -> dict[str, Any]:
    """Values of report.json; see docs/report.md."""
    new_head = has_new_head({**log.plan, **facts})  # what a head of random numbers answers is no "before"
    before, after = {} if new_head else rows_of(run, "before"), rows_of(run, "after")
    flipped = flips(before, after) if before else None
    kept = facts.get("kept") or progress.get("kept") or {}
    report = {
        **facts,
        "new_head": new_head,
        "metrics": {"before": None if new_head else log.score("before"), "after": log.score("after")},
        "tokens": {"processed": progress["tokens"], "trained": progress["targets"]},
        "steps": progress["step"],
        "seconds": {part: round(progress[f"{part}_seconds"], 3) for part in ("prepare", "train", "evaluate")},
        "tokens_per_second": round(progress["tokens"] / max(progress["train_seconds"], 1e-9), 2),
        "peak_memory_bytes": max((step.peak_bytes for step in log.steps), default=0),
        "best": progress["best"],
        "kept": kept,
        "held_out_curve": [[step, values["loss"]] for step, values in log.course(kept.get("step", progress["step"]))],
        "samples": [log.samples[index] for index in sorted(log.samples)],
        "short_answers": are_short([sample["reference"] for sample in log.samples.values()]),
        "details": {
            "before": {} if new_head else _optional(run, "evaluation/before.json", {}),
            "after": _optional(run, "evaluation/after.json", {}),
        },
        "flips": flipped,
        "worse_rows": worse_rows(before, after) if flipped is None else [],
        "surprising": _optional(run, "evaluation/surprising.json", {"looked_at": 0, "rows": []}),
        "general": _general_ability(log),
    }
    return judged(run, report)


def _optional(run: Run, name: str, absent: Any) -> Any:
    return run.read_json(name) if (run.path / name).exists() else absent


def _general_ability(log: Log) -> dict[str, Any] | None:
    """How general ability moved; None where it was not measured on both sides."""
    if not {"before", "after"} <= set(log.general):
        return None
    before, after = log.general["before"], log.general["after"]
    told = before["passages"], after["passages"]
    moved = forgetting.loss_change(told[0]["losses"], told[1]["losses"], told[1]["tokens"])
    text, past_bound = forgetting.assess(before["loss"], after["loss"], moved)
    pairs = zip(before["answers"], after["answers"], strict=True)
    return {
        "verdict": text,
        "past_bound": past_bound,
        "before": before["loss"],
        "after": after["loss"],
        "change": moved,
        "answers": [{"prompt": a["prompt"], "before": a["answer"], "after": b["answer"]} for a, b in pairs],
    }
