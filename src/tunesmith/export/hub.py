"""The Hugging Face hub: the model card of an export, README.md, and its upload in one commit."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tunesmith.environment.version import __version__
from tunesmith.errors import ExportError, InputError
from tunesmith.evaluation.metrics import METRICS, info_of, with_bounds
from tunesmith.evaluation.report.values import kept_report, metric_lines, sides
from tunesmith.export.run_result import RunResult
from tunesmith.methods import METHODS
from tunesmith.phrases import percent
from tunesmith.runs.atomic import from_json
from tunesmith.tasks import TASKS
from tunesmith.types import JsonObject, Record

if TYPE_CHECKING:
    from tunesmith.export.target import Tolerances
    from tunesmith.export.verify import ExportComparison

CHECK_FILE = "verify.json"
"""The numbers of the check, in every export."""

_PIPELINES = {
    "sequence": "text-classification", "tokens": "token-classification", "masked_token": "fill-mask",
    "next_token": "text-generation", "vector": "sentence-similarity",
}  # fmt: skip


def write_card(
    result: RunResult, folder: Path, *, fields: Record, license: str | None, checked: str,
    notes: Sequence[str],
) -> None:  # fmt: skip
    """Write README.md into an exported folder. `fields` come from the target, `checked` from the check."""
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
    from huggingface_hub import ModelCard

    card = result.base.path / "README.md" if result.is_adapter and result.base.path.is_dir() else None
    text = card.read_text("utf-8", errors="replace") if card is not None and card.is_file() else ""
    with suppress(ValueError, yaml.YAMLError):  # a header that is not a mapping states nothing
        stated = ModelCard(text, ignore_metadata_errors=True).data.get("license") if text.startswith("---") else None
        if isinstance(stated, str):
            return stated, "as the base model's card states it."
    return "unknown", "nobody has stated one. The license of the base model holds here too: look it up."


def _head(result: RunResult, name: str, fields: Record, license: str, report: Record) -> JsonObject:
    pipeline = str(fields.get("pipeline", _PIPELINES[result.head]))
    if result.kind == "encoder_decoder":
        pipeline = "summarization" if TASKS[result.renderer.task_name].has_prompt else "text2text-generation"
    head: JsonObject = {"license": license, "library_name": fields["library"], "pipeline_tag": pipeline}
    if (base := base_id(result)) is not None:
        head |= {"base_model": base, "base_model_relation": fields["relation"]}
    head["tags"] = ["tunesmith", result.recipe.method.name, str(result.recipe.task)]
    after: Record = (report.get("metrics") or {}).get("after") or {}
    results: Record = after.get("measures", {})
    metrics = [
        {"type": key, "name": info_of(key, after.get("drawn")).label, "value": round(float(interval["value"]), 6)}
        for key, interval in results.items()
        if key in METRICS
    ]
    if metrics:
        dataset = {"name": "held-out rows", "type": "private"}
        task = {"type": pipeline, "name": str(result.recipe.task)}
        measured = {"task": task, "dataset": dataset, "metrics": metrics}
        head["model-index"] = [{"name": name, "results": [measured]}]
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
    method_text = METHODS[method.name].describe(method)
    base = base_id(result) or Path(result.recipe.model).name
    revision = f" at {result.base.revision}" if result.base.revision else ""
    names = result.labels.names if result.labels else ()
    labels = f" Classes: {', '.join(map(_escape, names))}." if names else ""
    return f"`{_escape(base)}`{revision} tuned for the task {result.recipe.task}. {method_text}{labels}"


def _data(report: Record) -> str:
    rows = report.get("rows", {})
    if not rows:
        return "Not known: the run has no report."
    files = ", ".join(f"`{_escape(Path(path).name)}`" for path in report.get("data", []))
    tokens = report.get("tokens", {})
    return (
        f"{rows['train']:,} rows to learn from, {rows['held_out']:,} held out, {rows['skipped']:,} skipped; "
        f"{files}. {report.get('steps', 0):,} steps over {tokens.get('processed', 0):,.0f} tokens, "
        f"{tokens.get('trained', 0):,.0f} of them trained."
    )


def _results(report: Record) -> str:
    lines = metric_lines(report) if report else []
    if not lines:
        return "Nothing was held out, so nothing was measured."
    other, ours = sides(report)
    columns = ["On held-out rows", *([other] if other else []), ours]
    table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in lines:
        cells = [line.label, *([line.other] if other else []), with_bounds(line.after, line.after_bounds)]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join([*table, "", _escape(" ".join(report["headline"]))])


def comparison_section(found: ExportComparison | None, allowed: Tolerances, loaded_by: str, rows: str) -> str:
    """The section of the card about the check; None: it was left out."""
    if found is None:
        return "**Not verified**: it was exported with --no-verify, and nobody has compared it with the tuned model."
    table = comparison_lines(found, allowed)
    lines = "\n".join(f"| {what} | {value} | {bound} |" for what, value, bound in table)
    head = f"Loaded in a new process by {loaded_by} and compared with the tuned model on {found.rows} {rows}:"
    return f"{head}\n\n| | found | limit |\n|---|---|---|\n{lines}\n\nThe same numbers are in verify.json."


def comparison_lines(found: ExportComparison, allowed: Tolerances) -> list[tuple[str, str, str]]:
    """Each number of the check, its value, and what is allowed."""
    unit = " nats" if found.measure == "KL divergence" else ""
    value = f"{found.kl:.2g} ({found.kl_max:.2g}){unit}"
    lines = [
        ("tokens of rows and prompts", "identical" if found.same_ids else "different", "must be identical"),
        (f"{found.measure} at {found.positions:,} positions, mean (max)", value, f"mean allowed {allowed.kl:g}"),
    ]
    if found.carried is not None:
        share = percent(found.carried, 2), f"allowed 100 % ± {percent(allowed.carried, 0)}"
        lines.append(("change from the base that it keeps, over all logits", *share))
    if found.loss_tuned is not None and found.loss_exported is not None:
        losses = f"{found.loss_tuned:.4f}, {found.loss_exported:.4f}"
        lines.append(("loss on these rows, tuned and exported", losses, f"allowed ± {allowed.loss:g}"))
    return lines


def _escape(text: str) -> str:
    """Text of the data as Markdown."""
    return " ".join(text.split()).translate({ord(c): f"\\{c}" for c in "\\`*_[]<>|#"})


@dataclass(frozen=True, slots=True)
class Pushed:
    """A finished upload."""

    url: str
    num_files: int
    is_proven: bool


def push(folder: Path, name: str, *, private: bool = True, endpoint: str | None = None) -> Pushed:
    """Upload an exported folder as the model `name` (owner/name), in one commit; it is made if it is missing.

    `endpoint` None: the hub, or what HF_ENDPOINT says. The token comes from `hf auth login` or HF_TOKEN.

    Raises:
        InputError: the folder is not an export or has a link in it, or the name is none of a model.
        ExportError: the hub refuses or is out of reach; what was there before is there still.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not (folder / CHECK_FILE).is_file():
        raise InputError(f"{folder}: no export: it has no {CHECK_FILE}. Make one with `tunesmith export`.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{name}: not a name of the hub ({error}). Write owner/name.") from error
    files = list(_files(folder, name))
    operations = [CommitOperationAdd(path, content) for path, content in files]
    api = HfApi(endpoint=endpoint)
    with_private: dict[str, Any] = {"private": private, "exist_ok": True}
    try:
        repository = api.create_repo(name, **with_private)
        api.create_commit(repository.repo_id, operations, commit_message="Export of tunesmith")
    # The root of the HTTP library's errors: httpx in huggingface_hub 1, httpx2 in 2.
    except (HfHubHTTPError.__bases__[0], OSError, ValueError) as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        way = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there; and check the connection."
        raise ExportError(f"{name}: the hub did not take it: {text}. {way}") from error
    is_proven = bool(from_json((folder / CHECK_FILE).read_bytes())["verified"])
    return Pushed(str(repository), len(files), is_proven)


def _files(folder: Path, name: str) -> Iterator[tuple[str, Path | io.BytesIO]]:
    """Every file of the folder; its card says how to use it by its name on the hub."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise InputError(f"{path}: a link, and what it points to would be published. Put the file itself there.")
        if not path.is_file():
            continue
        where = path.relative_to(folder).as_posix()
        if where == "README.md":
            text = path.read_text("utf-8").replace('"PATH"', f'"{name}"').replace("=PATH`", f"={name}`")
            yield where, io.BytesIO(text.encode())
        else:
            yield where, path
