"""Exports: the targets, the checks of their options, and the way of an export, which is written next to its
place, compared, described, and only then moved there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.environment.version import __version__
from tunesmith.errors import ExportError, InputError, RecipeError
from tunesmith.export import verify
from tunesmith.export.adapter import ADAPTER
from tunesmith.export.gguf import GGUF
from tunesmith.export.hub import CHECK_FILE, comparison_lines, comparison_section, write_card
from tunesmith.export.merged import MERGED
from tunesmith.export.ollama import OLLAMA
from tunesmith.export.onnx import ONNX
from tunesmith.export.proof_plan import ProofPlan, plan_proof
from tunesmith.export.run_result import RunResult, open_result
from tunesmith.export.target import DTYPES, EXACT, ROUNDED, ExportOptions, ExportTarget, Tolerances
from tunesmith.export.verify import ExportComparison, TunedOutputs
from tunesmith.methods import METHODS
from tunesmith.models.load import load_config
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.resolve_model import resolve_base
from tunesmith.models.vision import is_seeing
from tunesmith.phrases import command
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.atomic import REPLACED, at_work, clean, remove, replace_folder, storing, temporary_folder, to_json
from tunesmith.runs.folder import Run
from tunesmith.types import JsonObject, OnProgress

ABANDONED_S = 3600.0
"""Age at which an unfinished export of the same name counts as a dead process's if locks do not say."""


TARGETS: dict[str, ExportTarget] = {target.name: target for target in (MERGED, ADAPTER, GGUF, OLLAMA, ONNX)}


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


CARRY_TOWERS = (MERGED.name, ADAPTER.name)
"""Targets that hold a model that sees whole, or leave its tower where it is."""


def check(result: RunResult, target: str, options: ExportOptions) -> list[str]:
    """Notes about an export before it is made. Raises InputError for a result that the target cannot carry."""
    _check_method(target, result.recipe.method)
    if target not in CARRY_TOWERS:
        _refuse_tower(target, result.config, result.recipe.model)
    return TARGETS[target].check(result, options)


def _refuse_tower(target: str, config: Any, name: str) -> None:
    """Raise InputError for a model that sees: the target has no place for its tower."""
    if is_seeing(config):
        raise InputError(
            f"--to {target}: {name} sees, and {target} would hold its language part alone. Use --to merged, and "
            "convert that folder by the target's own programs: llama.cpp's convert_hf_to_gguf.py, once plainly and "
            "once with --mmproj."
        )


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
        if target not in CARRY_TOWERS:
            _refuse_tower(target, config, recipe.model)
        TARGETS[target].check_base(config, recipe.model, options)


def parse_export(word: str) -> tuple[str, ExportOptions]:
    """TARGET or TARGET:VALUE of `export.to`; VALUE is the --dtype of `merged`, the --quant of other targets.

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
    on_note: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Export the result of a finished run, whole or not at all. `out` None: into the run's folder `exports`.
    `on_note` gets what should be known before it is done, such as the minutes that the comparison will take.

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
        with at_work(holder):
            export = _Export(result, chosen, options, holder, on_note=on_note)
            done = export.make(proof=proof, notes=notes)
            replace_folder(done.path, out, swap=True)
    finally:
        # What cannot be removed now is removed by the next export here; an earlier error matters more.
        with suppress(OSError):
            remove(holder)
    return replace(done, path=out)


@dataclass
class _Export:
    """An export on its way: written, compared, and where the dtype is ours to choose, in a finer one too."""

    result: RunResult
    target: ExportTarget
    options: ExportOptions
    holder: Path
    on_note: Callable[[str], None]
    _seen: dict[tuple[str, str, int], TunedOutputs] = field(default_factory=dict)
    """Outputs of the tuned model, by device, dtype and number of tokens."""

    def make(self, *, proof: bool, notes: Sequence[str]) -> Exported:
        """Raises ExportError if no dtype that may be taken passes."""
        rows, num_tokens = self._rows() if proof else (None, 0)
        refused: list[str] = []
        for dtype in self.target.dtypes(self.result, self.options):
            options = replace(self.options, dtype=dtype) if dtype else self.options
            folder, work = (self.holder / f"{name}{dtype}" for name in ("export", "work"))
            with storing(self.holder):
                folder.mkdir()
                work.mkdir()
            plan = None if rows is None else plan_proof(self.result, self.target, dtype, num_tokens=num_tokens)
            if rows is not None and plan is not None:
                if text := plan.note():
                    self.on_note(text)
                seen = self._tuned(rows, plan)
            self.result.on_progress("write", 0, 1)
            with storing(folder):
                written = [*notes, *self.target.write(self.result, folder, options)]
            free_cached_memory()
            done = Exported(
                folder, self.target.name, _tolerances(self.target, self.result, options, plan), None, "", "", written
            )
            problems: list[str] = []
            if rows is not None and plan is not None:
                done, problems = _compared(self.result, self.target, done, rows, plan, seen=seen, work=work)
            if not problems:
                done = replace(done, notes=[*done.notes, *self._chosen(dtype, refused, is_proven=proof)])
                with storing(folder):
                    _describe(self.result, self.target, options, done, plan)
                return done
            refused.append(f"{dtype}: {'; '.join(problems)}" if dtype else "; ".join(problems))
            if done.found is not None and not done.found.same_ids:
                break  # no dtype changes tokens
            remove(folder)
        raise ExportError(self._refusal(refused))

    def _rows(self) -> tuple[verify.CheckRows, int]:
        self.result.on_progress("tuned", 0, 1)
        rows, result = verify.find_rows(self.result), self.result
        settings: dict[str, Any] = {"labels": result.labels, "masked": result.recipe.train.masked}
        encoded = verify.encode_rows(result.renderer, rows.examples, head=result.head, **settings)
        return rows, sum(len(row.ids) for row in encoded)

    def _tuned(self, rows: verify.CheckRows, plan: ProofPlan) -> TunedOutputs:
        key = (plan.device, plan.tuned, plan.tokens)
        if key not in self._seen:
            self._seen[key] = verify.tuned_outputs(self.result, rows, plan)
        return self._seen[key]

    def _chosen(self, dtype: str, refused: Sequence[str], *, is_proven: bool) -> list[str]:
        """A note on the dtype that was chosen, and why, unless the user named it."""
        if not dtype or self.options.dtype != "auto":
            return []
        if not is_proven:
            return [f"dtype: {dtype}: not compared, so whether a finer one is needed is not known"]
        why = "the first that agrees with the tuned model" if refused else "it agrees with the tuned model"
        return ["; ".join([f"dtype: {dtype}: {why}", *(f"not {text}" for text in refused)])]

    def _refusal(self, refused: Sequence[str]) -> str:
        name, target = f"{self.result.run.path.name} to {self.target.name}", self.target
        text = f"{name}: not what was tuned, nothing was kept: {'. '.join(refused)}."
        words = ["export", self.result.run.path, "--to", target.name]
        if "dtype" in target.reads and self.options.dtype not in ("auto", "float32"):
            way = command(*words, "--dtype", "auto")
            text += f" If rounding is the cause, `{way}` takes the first dtype that agrees, at the latest float32."
        if "quant" in target.reads and self.options.quant != "f32":
            text += f" If rounding is the cause, `{command(*words, '--quant', self._finer())}` has less of it."
        return text

    def _finer(self) -> str:
        quants = self.target.quants
        return next(name for name in ("q8_0", "f16", "f32") if quants.index(name) < quants.index(self.options.quant))


def _compared(
    result: RunResult, target: ExportTarget, done: Exported, rows: verify.CheckRows, plan: ProofPlan, *,
    seen: TunedOutputs, work: Path,
) -> tuple[Exported, list[str]]:  # fmt: skip
    """The export with the numbers of its check, and every tolerance that it exceeds."""
    result.on_progress("verify", 0, 1)
    exported = verify.exported_outputs(result, target, done.path, rows, plan, work=work)
    comparison = verify.compare(seen.tuned, exported, base=seen.base, labels=result.labels)
    notes = [*done.notes]
    if seen.base is not None and comparison.carried is None:
        notes.append("the adapter changes nothing on these rows")
    if seen.quantized_loss is not None and comparison.loss_exported is not None:
        change = f"the loss of these rows changes by {comparison.loss_exported - seen.quantized_loss:+.4f}"
        notes.append(f"trained on its base in {result.quant}, exported on the original base: {change}")
    done = replace(done, found=comparison, loaded_by=exported.loaded_by, rows=rows.described, notes=notes)
    return done, comparison.problems(done.allowed)


def _describe(
    result: RunResult, target: ExportTarget, options: ExportOptions, done: Exported, plan: ProofPlan | None
) -> None:
    """Write the model card and verify.json."""
    write_card(
        result, done.path, fields=target.card(result, done.path, options), license=options.license,
        checked=comparison_section(done.found, done.allowed, done.loaded_by, done.rows), notes=done.notes,
    )  # fmt: skip
    facts: JsonObject = {
        "verified": done.found is not None, "target": target.name, "tunesmith": __version__, "rows_are": done.rows,
        "loaded_by": done.loaded_by, "bounds": asdict(done.allowed),
    }  # fmt: skip
    facts |= {} if done.found is None else asdict(done.found)
    facts |= {} if plan is None else {"device": plan.device, "computed": {"tuned": plan.tuned, "export": plan.exported}}
    lines = [] if done.found is None else comparison_lines(done.found, done.allowed)
    facts |= {"lines": [list(line) for line in lines], "notes": list(done.notes)}
    (done.path / CHECK_FILE).write_bytes(to_json(facts, indent=True) + b"\n")


def _tolerances(target: ExportTarget, result: RunResult, options: ExportOptions, plan: ProofPlan | None) -> Tolerances:
    """The target's tolerances, at least as wide as 16 bits need if one side is computed in 16 bits."""
    allowed = target.tolerances(result, options)
    if plan is None or plan.is_exact:
        return allowed
    return ROUNDED if allowed == EXACT else replace(allowed, kl=max(allowed.kl, ROUNDED.kl))


def _clean_up(out: Path) -> None:
    """Put back what a killed export had moved aside, and remove what it was writing."""
    aside = out.with_name(REPLACED + out.name)
    if aside.exists() and not out.exists():
        aside.rename(out)
    clean(out.parent, name=out.name, older_than_s=ABANDONED_S)


def export_planned(
    run: Run, word: str, *, on_progress: OnProgress = lambda what, done, total: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Exported:  # fmt: skip
    """Make one of the exports of a finished run's recipe. Its base is on this machine."""
    target, options = parse_export(word)
    return export_run(run, target, options=options, offline=True, on_progress=on_progress, on_note=on_note)


if __name__ == "__main__":  # the new process of the check
    verify.do_job(Path(sys.argv[1]), TARGETS)
