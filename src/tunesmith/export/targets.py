"""The export targets, one row each in TARGETS, and the checks of a target's name and options."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tunesmith.errors import InputError, RecipeError
from tunesmith.export.adapter import ADAPTER
from tunesmith.export.gguf import GGUF
from tunesmith.export.merged import MERGED
from tunesmith.export.ollama import OLLAMA
from tunesmith.export.onnx import ONNX
from tunesmith.export.run_result import RunResult
from tunesmith.export.target import DTYPES, ExportOptions, ExportTarget
from tunesmith.methods import METHODS
from tunesmith.runs.folder import Run

TARGETS: dict[str, ExportTarget] = {one.name: one for one in (MERGED, ADAPTER, GGUF, OLLAMA, ONNX)}


def check_options(target: str, options: ExportOptions) -> ExportTarget:
    """The target. Raises InputError if there is none of this name, or it does not read an option."""
    chosen = _find(target)
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


def _find(target: str) -> ExportTarget:
    if target not in TARGETS:
        raise InputError(f"--to: {target}: there is no such target. One of {', '.join(TARGETS)}.")
    return TARGETS[target]


def check(result: RunResult, target: str, options: ExportOptions) -> list[str]:
    """Notes about an export before it is made. Raises InputError for a result that the target cannot carry."""
    method = result.recipe.method
    row, name = METHODS[method.name], getattr(method, "kind", method.name)
    if target != ADAPTER.name and row.is_adapter and not row.can_merge(method):
        raise InputError(
            f"--to {target}: {name} is not a change of the model's weights, so it cannot be merged into them. "
            "Use --to adapter."
        )
    return TARGETS[target].check(result, options)


def default_folder(run: Run, target: str, options: ExportOptions | None = None) -> Path:
    """The folder of an export unless another is named. Raises InputError if there is no such target."""
    quant = f"-{(options or ExportOptions()).quant}" if _find(target).quants else ""
    return run.path / "exports" / f"{target}{quant}"


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
