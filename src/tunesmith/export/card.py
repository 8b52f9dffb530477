"""The model card, README.md in the form of the Hugging Face hub: what it is, of what data, how good, how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith import __version__
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.report.build import up_to_date
from tunesmith.export.comparing import COSINE, KL, Comparison
from tunesmith.export.options import Bounds
from tunesmith.export.source import Source
from tunesmith.methods import METHODS
from tunesmith.models.folder import read_json
from tunesmith.runs.folder import Run
from tunesmith.tasks import TASKS

UNKNOWN = "unknown"
"""The hub's own word for a licence that nobody has stated."""

_PIPELINES = {
    "sequence": "text-classification", "tokens": "token-classification", "masked_token": "fill-mask",
    "next_token": "text-generation",
}  # fmt: skip


def write_card(
    source: Source,
    folder: Path,
    *,
    fields: Mapping[str, Any],
    license: str | None,
    found: Comparison | None,
    bounds: Bounds,
    loaded_by: str,
    rows: str,
    notes: Sequence[str],
) -> None:
    """Write README.md into an exported folder. `fields` are the target's own; `found` None: it was not verified."""
    chosen, whose = find_license(source, license)
    report = _report(source.run)
    name = str(report.get("name") or source.run.path.name)
    head = _head(source, name, fields, chosen, report)
    parts = [
        f"# {_plain(name)}",
        _what(source),
        "## Use",
        *(f"```{language}\n{code}\n```" for language, code in fields["use"]),
        *([fields["servers"]] if "servers" in fields else []),
        "## Data",
        _data(report),
        "## Measures",
        _measures(report),
        "## Same as what was tuned",
        _proof(found, bounds, loaded_by, rows),
        *(["## Notes", "\n".join(f"- {_plain(note)}" for note in notes)] if notes else []),
        "## Licence",
        f"{_plain(chosen)}: {whose}",
        f"Made with tunesmith {__version__}.",
    ]
    text = "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---\n\n" + "\n\n".join(parts) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def find_license(source: Source, given: str | None) -> tuple[str, str]:
    """The licence of the card and where it is from."""
    if given is not None:
        return given, "as given by the person who exported it."
    card = source.base.path / "README.md" if source.is_adapter and source.base.path.is_dir() else None
    if card is not None and card.is_file():
        text = card.read_text("utf-8", errors="replace")
        if text.startswith("---\n"):
            try:
                stated = yaml.safe_load(text[4:].partition("\n---")[0])
            except yaml.YAMLError:
                stated = None
            if isinstance(stated, dict) and isinstance(stated.get("license"), str):
                return stated["license"], "that of the base model's card."
    return UNKNOWN, "nobody has stated one. What the base model's licence asks for holds here too: look it up."


def _head(
    source: Source, name: str, fields: Mapping[str, Any], license: str, report: Mapping[str, Any]
) -> dict[str, Any]:
    pipeline = str(fields.get("pipeline", _PIPELINES[source.head]))
    if source.kind == "encoder_decoder":
        pipeline = "summarization" if TASKS[source.renderer.task_name].has_prompt else "text2text-generation"
    head: dict[str, Any] = {"license": license, "library_name": fields["library"], "pipeline_tag": pipeline}
    if (base := base_id(source)) is not None:
        head |= {"base_model": base, "base_model_relation": fields["relation"]}
    head["tags"] = ["tunesmith", source.recipe.method.name, str(source.recipe.task)]
    results = _measured(report, "after")
    metrics = [
        {"type": key, "name": METRICS[key].label, "value": round(float(interval["value"]), 6)}
        for key, interval in results.items()
        if key in METRICS
    ]
    if metrics:
        dataset = {"name": "held-out rows", "type": "private"}
        task = {"type": pipeline, "name": str(source.recipe.task)}
        head["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return head


def base_id(source: Source) -> str | None:
    """The hub id of what was tuned, if it came from there."""
    located = source.base if source.is_adapter else None
    if located is not None and located.kind == "hub":
        return located.name
    model = source.recipe.model
    was_here = source.recipe.place != model
    is_id = not was_here and model.count("/") == 1 and not Path(model).exists() and model[0] not in "./~"
    return model if not source.is_adapter and is_id else None


def _what(source: Source) -> str:
    method = source.recipe.method
    how = METHODS[method.name].describe(method)
    base = base_id(source) or Path(source.recipe.model).name
    revision = f" at {source.base.revision}" if source.base.revision else ""
    labels = (
        f" Answers with: {', '.join(map(_plain, source.labels.names))}."
        if source.labels and source.labels.names
        else ""
    )
    return f"`{_plain(base)}`{revision} tuned for the task {source.recipe.task}. {how}{labels}"


def _data(report: Mapping[str, Any]) -> str:
    rows = report.get("rows", {})
    if not rows:
        return "Not known: the run has no report."
    files = ", ".join(f"`{_plain(Path(path).name)}`" for path in report.get("data", []))
    tokens = report.get("tokens", {})
    return (
        f"{rows['train']:,} rows to learn from, {rows['held_out']:,} held out, {rows['skipped']:,} skipped; {files}. "
        f"{report.get('steps', 0):,} steps over {tokens.get('processed', 0):,.0f} tokens, "
        f"{tokens.get('trained', 0):,.0f} of them trained."
    )


def _measures(report: Mapping[str, Any]) -> str:
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
    return "\n".join([*lines, "", _plain(" ".join(report["headline"]))])


def _proof(found: Comparison | None, bounds: Bounds, loaded_by: str, rows: str) -> str:
    if found is None:
        return "**Not verified**: it was exported with --no-verify, and nobody has compared it with the tuned model."
    lines = "\n".join(f"| {what} | {value} | {bound} |" for what, value, bound in proof_lines(found, bounds))
    table = f"| | found | allowed |\n|---|---|---|\n{lines}"
    said = f"Loaded in a new process by {loaded_by} and compared with the tuned model on {found.rows} {rows}:"
    return f"{said}\n\n{table}\n\nThe same numbers are in verify.json."


def proof_lines(found: Comparison, bounds: Bounds) -> list[tuple[str, str, str]]:
    """What was found, its value, and what is allowed."""
    lines = [
        ("tokens of rows and prompts", "identical" if found.same_ids else "other", "identical"),
        (f"{found.measure} at {found.positions:,} places, mean (most)",
         f"{found.kl:.2g} ({found.kl_max:.2g}){_unit(found)}",
         f"{bounds.cosine if found.measure == COSINE else bounds.kl:g}"),
        (_choice(found), f"{found.top1:.1%}", ""),
    ]  # fmt: skip
    if found.carried is not None and found.error_to_effect is not None:
        lines.append(("of what tuning changed", f"{found.carried:.2%}", f"100 % ± {bounds.carried:.0%}"))
        lines.append(("error over what tuning changed", f"{found.error_to_effect:.2%}", ""))
    if found.loss_tuned is not None and found.loss_exported is not None:
        lines.append(
            (
                "held-out loss, tuned and exported",
                f"{found.loss_tuned:.4f}, {found.loss_exported:.4f}",
                f"± {bounds.loss:g}",
            )
        )
    if found.furthest:
        lines.append((f"furthest weight, {found.furthest}", f"{found.distance:.2g} of its size", f"{bounds.weights:g}"))
    if found.answers:
        lines.append(("same greedy answer", f"{found.same_answers} of {found.answers}", ""))
    return lines


def in_brief(found: Comparison) -> str:
    """In one line."""
    carried = "" if found.carried is None else f", {found.carried:.1%} of what tuning changed"
    answers = f", same greedy answer {found.same_answers} of {found.answers}" if found.answers else ""
    return (
        f"the same tokens, {found.measure} {found.kl:.2g}{_unit(found)} (most {found.kl_max:.2g}), {_choice(found)} "
        f"{found.top1:.1%}{carried}{answers}"
    )


def _unit(found: Comparison) -> str:
    return " nats" if found.measure == KL else ""


def _choice(found: Comparison) -> str:
    return "same nearest text" if found.measure == COSINE else "same first choice"


def _measured(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Intervals by measure, before or after."""
    measured: Mapping[str, Any] = report.get("metrics", {}).get(name) or {}  # null where nothing was held out
    measures: Mapping[str, Any] = measured.get("measures", {})
    return measures


def _report(run: Run) -> Mapping[str, Any]:
    return up_to_date(run, read_json(run.report_path)) if run.report_path.is_file() else {}


def _plain(text: str) -> str:
    """Text of the data as text of a page."""
    return " ".join(text.split()).translate({ord(c): f"\\{c}" for c in "\\`*_[]<>|#"})
