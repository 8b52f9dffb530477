"""Exports: the targets, the checks of their options, and the way of an export, which is written next to its place,
compared, described, and only then moved there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.errors import ExportError, InputError, RecipeError
from tunesmith.export import verify
from tunesmith.export.adapter import ADAPTER
from tunesmith.export.gguf import GGUF
from tunesmith.export.hub import CHECK_FILE, comparison_section, write_card
from tunesmith.export.merged import MERGED
from tunesmith.export.ollama import OLLAMA
from tunesmith.export.onnx import ONNX
from tunesmith.export.run_result import RunResult, open_result
from tunesmith.export.target import DTYPES, ROUNDED, ExportOptions, ExportTarget, Tolerances
from tunesmith.export.verify import ExportComparison, TunedOutputs
from tunesmith.methods import METHODS
from tunesmith.models.load import load_config
from tunesmith.models.resolve_model import resolve_base
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.atomic import REPLACED, clean, remove, replace_folder, storing, temporary_folder, to_json
from tunesmith.runs.folder import Run
from tunesmith.version import __version__

OnProgress = Callable[[str, int, int], None]
DEAD_S = 3600.0
"""Age at which an unfinished export of the same name is taken for that of a dead process."""


TARGETS: dict[str, ExportTarget] = {one.name: one for one in (MERGED, ADAPTER, GGUF, OLLAMA, ONNX)}


def check_options(target: str, options: ExportOptions) -> ExportTarget:
    """The target. Raises InputError if there is none of this name, or it does not read an option."""
    if target not in TARGETS:
        raise InputError(f"--to: {target}: there is no such target. One of {', '.join(TARGETS)}.")
    chosen = TARGETS[target]
    if options.license is not None and not options.license.isprintable():
        raise InputError(f"--license: {options.license!r}: a license is named on one line, such as apache-2.0.")
    for key, default in asdict(ExportOptions()).items():
        if key not in (*chosen.reads, "license") and getattr(options, key) != default:
            readers = ", ".join(name for name, other in TARGETS.items() if key in other.reads)
            raise InputError(f"--{key.replace('_', '-')}: is not for --to {chosen.name}, only for {readers}.")
    for key, known in {"dtype": DTYPES, "quant": chosen.quants}.items():
        value = getattr(options, key)
        if key in chosen.reads and value not in known:
            raise InputError(f"--{key.replace('_', '-')}: {value}: not offered here. One of {', '.join(known)}.")
    return chosen


def check(result: RunResult, target: str, options: ExportOptions) -> list[str]:
    """Notes about an export before it is made. Raises InputError for a result that the target cannot carry."""
    _check_method(target, result.recipe.method)
    return TARGETS[target].check(result, options)


def _check_method(target: str, method: Any) -> None:
    row, name = METHODS[method.name], getattr(method, "kind", method.name)
    if target != ADAPTER.name and row.is_adapter and not row.can_merge(method):
        raise InputError(
            f"--to {target}: {name} is not a change of the model's weights, so it cannot be merged into them. "
            "Use --to adapter."
        )
    if target == ADAPTER.name and not row.is_adapter:
        raise InputError(f"--to {target}: every weight is tuned, so there is no adapter. Use --to merged.")


def refuse_planned(recipe: Recipe, *, offline: bool) -> None:
    """Check the exports of a recipe before its run, as far as its method and the config of its model say.

    Raises RecipeError for a word that means none, InputError for one that method or model cannot have.
    """
    planned = [parse_export(word) for word in recipe.export.to]
    if not planned:
        return
    config = load_config(resolve_base(recipe, offline=offline, weights=False))
    for target, options in planned:
        if recipe.method.name in METHODS:  # else it is chosen later
            _check_method(target, recipe.method)
        TARGETS[target].check_base(config, recipe.model, options)


def parse_export(word: str) -> tuple[str, ExportOptions]:
    """TARGET or TARGET:VALUE of `export.to`, where VALUE is the --dtype of `merged` and the --quant of other targets.

    Raises RecipeError for anything else.
    """
    target, _, value = word.partition(":")
    options = ExportOptions()
    if value:
        options = ExportOptions(dtype=value) if target == MERGED.name else ExportOptions(quant=value)
    try:
        check_options(target, options)
    except InputError as error:
        raise RecipeError(f"export.to: {word}: {error}") from error
    return target, options


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    path: Path
    target: str
    allowed: Tolerances
    found: ExportComparison | None
    """None: not verified."""
    loaded_by: str
    rows: str
    """Description of the rows it was compared on."""
    notes: Sequence[str]


def export_run(
    run: Run,
    target: str,
    *,
    out: Path | None = None,
    options: ExportOptions | None = None,
    proof: bool = True,
    offline: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Exported:
    """Export the result of a finished run, whole or not at all. `out` None: into the run's folder `exports`.

    Raises:
        InputError: the run has no result, or not one that this target can carry; nothing was written.
        ExportError: the export differs from the tuned model; it was removed.
        StorageError: the disk is full, or refuses.
    """
    options = options or ExportOptions()
    chosen = check_options(target, options)
    run.refuse_links()
    out = out or run.export_path(f"{target}:{options.quant}")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / CHECK_FILE).is_file())):
        raise InputError(
            f"{out}: already exists and is not an earlier export: it has no {CHECK_FILE}. Choose another --out."
        )
    result = open_result(run, offline=offline, on_progress=on_progress)
    notes = [*filter(None, [result.unchecked]), *check(result, target, options)]
    _clean_up(out)
    holder = temporary_folder(out.parent, out.name)
    try:
        done = _export(result, chosen, holder, options, proof=proof, notes=notes)
        replace_folder(done.path, out, swap=True)
    finally:
        # What cannot be removed now is removed by the next export here; an earlier error matters more.
        with suppress(OSError):
            remove(holder)
    return replace(done, path=out)


def _export(
    result: RunResult, target: ExportTarget, holder: Path, options: ExportOptions, *, proof: bool, notes: Sequence[str]
) -> Exported:
    folder, work = holder / "export", holder / "work"
    with storing(holder):
        folder.mkdir()
        work.mkdir()
    if proof:
        result.on_progress("tuned", 0, 1)
        rows = verify.find_rows(result)
        seen = verify.tuned_outputs(result, rows)
    result.on_progress("write", 0, 1)
    with storing(folder):
        notes = [*notes, *target.write(result, folder, options)]
    done = Exported(folder, target.name, _tolerances(target, result, options), None, "", "", notes)
    if proof:
        result.on_progress("verify", 0, 1)
        done = _verified(result, target, options, done, rows, seen=seen, work=work)
    with storing(folder):
        _describe(result, target, options, done)
    return done


def _verified(
    result: RunResult, target: ExportTarget, options: ExportOptions, done: Exported, rows: verify.CheckRows, *,
    seen: TunedOutputs, work: Path,
) -> Exported:  # fmt: skip
    """The export with the numbers of its check. Raises ExportError past the tolerances."""
    exported = verify.exported_outputs(result, target, done.path, rows, work=work)
    found = verify.compare(seen.tuned, exported, base=seen.base, labels=result.labels)
    if problems := found.problems(done.allowed):
        is_rounded = found.same_ids and target.reads and getattr(options, target.reads[0]) not in ("f32", "float32")
        way_out = f" If rounding is the cause, a finer --{target.reads[0]} has less of it." if is_rounded else ""
        name = f"{result.run.path.name} to {target.name}"
        raise ExportError(f"{name}: not what was tuned, nothing was kept: {'; '.join(problems)}.{way_out}")
    notes = [*done.notes]
    if seen.base is not None and found.carried is None:
        notes.append("the adapter changes nothing on these rows")
    if seen.quantized_loss is not None and found.loss_exported is not None:
        change = f"the loss of these rows changes by {found.loss_exported - seen.quantized_loss:+.4f}"
        notes.append(f"trained on its base in {result.quant}, exported on the original base: {change}")
    return replace(done, found=found, loaded_by=exported.loaded_by, rows=rows.described, notes=notes)


def _describe(result: RunResult, target: ExportTarget, options: ExportOptions, done: Exported) -> None:
    """Write the model card and verify.json."""
    write_card(
        result, done.path, fields=target.card(result, done.path, options), license=options.license,
        checked=comparison_section(done.found, done.allowed, done.loaded_by, done.rows), notes=done.notes,
    )  # fmt: skip
    facts: dict[str, Any] = {
        "verified": done.found is not None, "target": target.name, "tunesmith": __version__, "rows_are": done.rows,
        "loaded_by": done.loaded_by, "bounds": asdict(done.allowed),
    }  # fmt: skip
    facts |= {} if done.found is None else asdict(done.found)
    facts |= {"notes": list(done.notes)}
    (done.path / CHECK_FILE).write_bytes(to_json(facts, indent=True) + b"\n")


def _tolerances(target: ExportTarget, result: RunResult, options: ExportOptions) -> Tolerances:
    """The target's tolerances; at least those of 16 bits if the run computed in 16 bits."""
    allowed = target.tolerances(result, options)
    return allowed if result.recipe.precision == "float32" else replace(allowed, kl=max(allowed.kl, ROUNDED.kl))


def _clean_up(out: Path) -> None:
    """Put back what a killed export had moved aside, and remove what it was writing."""
    aside = out.with_name(REPLACED + out.name)
    if aside.exists() and not out.exists():
        aside.rename(out)
    clean(out.parent, name=out.name, older_than_s=DEAD_S)


def export_planned(run: Run, word: str, *, on_progress: OnProgress = lambda what, done, total: None) -> Exported:
    """Make one of the exports of a finished run's recipe. Its base is on this machine."""
    target, options = parse_export(word)
    return export_run(run, target, options=options, offline=True, on_progress=on_progress)


if __name__ == "__main__":  # the new process of the check
    verify.do_job(Path(sys.argv[1]), TARGETS)
