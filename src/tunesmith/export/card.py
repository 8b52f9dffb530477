"""The model card: README.md in the format of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tunesmith import __version__
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.report.build import kept_report
from tunesmith.export.run_result import RunResult
from tunesmith.methods import METHODS
from tunesmith.tasks import TASKS

if TYPE_CHECKING:
    from tunesmith.export.target import Tolerances
    from tunesmith.export.verify import ExportComparison

UNKNOWN = "unknown"
"""The hub's word for a license that nobody has stated."""

_PIPELINES = {
    "sequence": "text-classification", "tokens": "token-classification", "masked_token": "fill-mask",
    "next_token": "text-generation", "vector": "sentence-similarity",
}  # fmt: skip


def write_card(
    result: RunResult, folder: Path, *, fields: Mapping[str, Any], license: str | None, checked: str,
    notes: Sequence[str],
) -> None:  # fmt: skip
    """Write README.md into an exported folder. `fields` are those of the target; `checked` is what the check found."""
    chosen, origin = find_license(result, license)
    report = kept_report(result.run) if result.run.report_path.is_file() else {}
    name = str(report.get("name") or result.run.path.name)
    parts = [
        f"# {_escape(name)}",
        _description(result),
        "## Use",
        *(f"```{language}\n{code}\n```" for language, code in fields["use"]),
        *([fields["servers"]] if "servers" in fields else []),
        "## Data",
        _data(report),
        "## Results",
        _results(report),
        "## Comparison with the tuned model",
        checked,
        *(["## Notes", "\n".join(f"- {_escape(note)}" for note in notes)] if notes else []),
        "## License",
        f"{_escape(chosen)}: {origin}",
        f"Made with tunesmith {__version__}.",
    ]
    head = yaml.safe_dump(_head(result, name, fields, chosen, report), sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text("\n\n".join([f"---\n{head}---", *parts]) + "\n", encoding="utf-8")


def find_license(result: RunResult, given: str | None) -> tuple[str, str]:
    """The license of the card, and where it is from."""
    if given is not None:
        return given, "as given by the person who exported it."
    card = result.base.path / "README.md" if result.is_adapter and result.base.path.is_dir() else None
    if card is not None and card.is_file():
        text = card.read_text("utf-8", errors="replace")
        try:
            stated = yaml.safe_load(text[4:].partition("\n---")[0]) if text.startswith("---\n") else None
        except yaml.YAMLError:
            stated = None
        if isinstance(stated, dict) and isinstance(stated.get("license"), str):
            return stated["license"], "that of the base model's card."
    return UNKNOWN, "nobody has stated one. The license of the base model holds here too: look it up."


def _head(
    result: RunResult, name: str, fields: Mapping[str, Any], license: str, report: Mapping[str, Any]
) -> dict[str, Any]:
    pipeline = str(fields.get("pipeline", _PIPELINES[result.head]))
    if result.kind == "encoder_decoder":
        pipeline = "summarization" if TASKS[result.renderer.task_name].has_prompt else "text2text-generation"
    head: dict[str, Any] = {"license": license, "library_name": fields["library"], "pipeline_tag": pipeline}
    if (base := base_id(result)) is not None:
        head |= {"base_model": base, "base_model_relation": fields["relation"]}
    head["tags"] = ["tunesmith", result.recipe.method.name, str(result.recipe.task)]
    results = _measured(report, "after")
    metrics = [
        {"type": key, "name": METRICS[key].label, "value": round(float(interval["value"]), 6)}
        for key, interval in results.items()
        if key in METRICS
    ]
    if metrics:
        dataset = {"name": "held-out rows", "type": "private"}
        task = {"type": pipeline, "name": str(result.recipe.task)}
        head["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return head


def base_id(result: RunResult) -> str | None:
    """The hub id of the tuned model, if it came from the hub."""
    if result.is_adapter:
        return result.base.name if result.base.kind == "hub" else None
    model = result.recipe.model
    is_id = model.count("/") == 1 and not Path(model).exists() and model[0] not in "./~"
    return model if is_id and result.recipe.place == model else None


def _description(result: RunResult) -> str:
    method = result.recipe.method
    how = METHODS[method.name].describe(method)
    base = base_id(result) or Path(result.recipe.model).name
    revision = f" at {result.base.revision}" if result.base.revision else ""
    names = result.labels.names if result.labels else ()
    labels = f" Classes: {', '.join(map(_escape, names))}." if names else ""
    return f"`{_escape(base)}`{revision} tuned for the task {result.recipe.task}. {how}{labels}"


def _data(report: Mapping[str, Any]) -> str:
    rows = report.get("rows", {})
    if not rows:
        return "Not known: the run has no report."
    files = ", ".join(f"`{_escape(Path(path).name)}`" for path in report.get("data", []))
    tokens = report.get("tokens", {})
    return (
        f"{rows['train']:,} rows to learn from, {rows['held_out']:,} held out, {rows['skipped']:,} skipped; {files}. "
        f"{report.get('steps', 0):,} steps over {tokens.get('processed', 0):,.0f} tokens, "
        f"{tokens.get('trained', 0):,.0f} of them trained."
    )


def _results(report: Mapping[str, Any]) -> str:
    before, after = (_measured(report, name) for name in ("before", "after"))
    keys = [key for key in after if key in METRICS]
    if not keys:
        return "Nothing was held out, so nothing was measured."
    columns = ["On held-out rows", *(["before", "after"] if before else ["tuned"]), "95 % interval"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for key in keys:
        info, then = METRICS[key], before.get(key)
        # The general text is one text: its loss has no interval.
        ends = [info.text(float(after[key][end])) for end in ("low", "high") if end in after[key]]
        was = [info.text(float(then["value"])) if then else "–"] if before else []
        cells = [info.label, *was, info.text(float(after[key]["value"])), " to ".join(ends) or "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _escape(" ".join(report["headline"]))])


def comparison_section(found: ExportComparison | None, allowed: Tolerances, loaded_by: str, rows: str) -> str:
    """The section of the card about the check; None: it was left out."""
    if found is None:
        return "**Not verified**: it was exported with --no-verify, and nobody has compared it with the tuned model."
    lines = "\n".join(f"| {what} | {value} | {bound} |" for what, value, bound in comparison_lines(found, allowed))
    head = f"Loaded in a new process by {loaded_by} and compared with the tuned model on {found.rows} {rows}:"
    return f"{head}\n\n| | found | allowed |\n|---|---|---|\n{lines}\n\nThe same numbers are in verify.json."


def comparison_lines(found: ExportComparison, allowed: Tolerances) -> list[tuple[str, str, str]]:
    """Each number of the check, its value, and what is allowed."""
    value = f"{found.kl:.2g} ({found.kl_max:.2g}){_unit(found)}"
    lines = [
        ("tokens of rows and prompts", "identical" if found.same_ids else "different", "identical"),
        (f"{found.measure} at {found.positions:,} places, mean (max)", value, f"{allowed.kl:g}"),
        ("same first choice", f"{found.top1:.1%}", ""),
    ]
    if found.carried is not None and found.error_to_effect is not None:
        lines.append(("share of the tuning effect", f"{found.carried:.2%}", f"100 % ± {allowed.carried:.0%}"))
        lines.append(("error relative to the tuning effect", f"{found.error_to_effect:.2%}", ""))
    if found.loss_tuned is not None and found.loss_exported is not None:
        losses = f"{found.loss_tuned:.4f}, {found.loss_exported:.4f}"
        lines.append(("held-out loss, tuned and exported", losses, f"± {allowed.loss:g}"))
    if found.furthest:
        distance = f"{found.distance:.2g} of its norm"
        lines.append((f"largest difference of a weight, {found.furthest}", distance, f"{allowed.weights:g}"))
    if found.answers:
        lines.append(("same greedy answer", f"{found.same_answers} of {found.answers}", ""))
    return lines


def in_brief(found: ExportComparison) -> str:
    """The check in one line."""
    carried = "" if found.carried is None else f", {found.carried:.1%} of the tuning effect"
    answers = f", same greedy answer {found.same_answers} of {found.answers}" if found.answers else ""
    return (
        f"the same tokens, {found.measure} {found.kl:.2g}{_unit(found)} (max {found.kl_max:.2g}), same first choice "
        f"{found.top1:.1%}{carried}{answers}"
    )


def _unit(found: ExportComparison) -> str:
    return " nats" if found.measure == "KL divergence" else ""


def _measured(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Intervals by metric, before or after."""
    measured: Mapping[str, Any] = report.get("metrics", {}).get(name) or {}  # null if nothing was held out
    measures: Mapping[str, Any] = measured.get("measures", {})
    return measures


def _escape(text: str) -> str:
    """Text of the data as Markdown."""
    return " ".join(text.split()).translate({ord(c): f"\\{c}" for c in "\\`*_[]<>|#"})
