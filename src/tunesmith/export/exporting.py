"""An export from start to end: checked, written beside its place, proven, described, and only then put there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith import __version__
from tunesmith.errors import InputError, StorageError
from tunesmith.export import verify
from tunesmith.export.adapter import ADAPTER
from tunesmith.export.card import in_brief, write_card
from tunesmith.export.comparing import Comparison
from tunesmith.export.gguf_adapter import GGUF_ADAPTER
from tunesmith.export.gguf_file import GGUF
from tunesmith.export.merged import MERGED
from tunesmith.export.ollama import OLLAMA
from tunesmith.export.onnx_file import ONNX
from tunesmith.export.options import DTYPES, MERGE_INTO, QUANTIZED, ROUNDED, UNQUANTIZED_KL, Bounds, Export, Options
from tunesmith.export.rows import find_probes
from tunesmith.export.source import Source, open_source
from tunesmith.methods import METHODS
from tunesmith.runs.atomic import (
    REPLACED,
    TEMPORARY,
    WRITER,
    abandoned,
    being_written,
    clean,
    remove,
    replace_folder,
    storing,
    temporary_folder,
    to_json,
)
from tunesmith.runs.folder import Run

EXPORTS: dict[str, Export] = {export.name: export for export in (MERGED, ADAPTER, GGUF, GGUF_ADAPTER, OLLAMA, ONNX)}

PROOF = "verify.json"
STALE_S = 24 * 3600.0
"""Age at which what another process was writing is taken for that of a dead one."""

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """What an export left."""

    path: Path
    target: str
    bounds: Bounds
    found: Comparison | None
    """None: not verified."""
    loaded_by: str
    rows: str
    """Which rows it was compared on."""
    notes: Sequence[str]
    in_llama_cpp: Comparison | None = None
    """The same of llama.cpp; None where it is not installed, or does not read the target."""


def export_run(
    run: Run,
    target: str,
    *,
    out: Path | None = None,
    options: Options | None = None,
    proof: bool = True,
    offline: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Exported:
    """Export what a finished run made; `out` None: into the run's folder `exports`. There is all of it, or nothing.

    Raises:
        InputError: the run has no result, or not one that this target can carry; nothing was written.
        ExportError: what was written is not what was tuned; it was removed.
        StorageError: the disk is full, or refuses.
    """
    options = options or Options()
    export = check_words(target, options)
    run.refuse_links()
    out = out or default_folder(run, target, options)
    _refuse_to_overwrite(out)
    source = open_source(run, offline=offline)
    if options.merge_into == "dequantized":
        _check_quantized(source)
        source = replace(source, merges_into_dequantized=True)
    notes = [*filter(None, [source.unchecked]), *check(source, target, options)]
    needed = export.num_bytes(source, options) + (verify.room_for_proof(source, export) if proof else 0)
    _tidy(out)
    _check_room(out, needed)
    holder = temporary_folder(out.parent, out.name)
    try:
        with being_written(holder):
            done = _export(source, export, holder, options, proof=proof, notes=notes, on_progress=on_progress)
            replace_folder(done.path, out, swap=True)
    finally:
        # The next export here removes what cannot be removed now; what went wrong before counts more.
        with suppress(OSError):
            remove(holder)
    return replace(done, path=out)


def _export(
    source: Source,
    export: Export,
    holder: Path,
    options: Options,
    *,
    proof: bool,
    notes: Sequence[str],
    on_progress: OnProgress,
) -> Exported:
    folder, work = holder / "export", holder / "work"
    with storing(holder):
        folder.mkdir()
        work.mkdir()
    if proof:
        on_progress("tuned", 0, 1)
        probes = find_probes(source)
        tuned, base = verify.look_at_tuned(source, probes, export.asks(source))
    on_progress("write", 0, 1)
    with storing(folder, num_bytes=export.num_bytes(source, options)):
        notes = [*notes, *export.write(source, folder, options)]
    bounds = _for_precision(export.bounds(source, options), source)
    found, loaded_by, rows = None, "", ""
    in_llama_cpp: Comparison | None = None
    if proof:
        on_progress("verify", 0, 1)
        seen = verify.look_at_exported(source, export.loader, folder, probes, work=work)
        name = f"{source.run.path.name} to {export.name}"
        found = verify.judge(
            source, tuned=tuned, base=base, seen=seen, bounds=bounds, name=name, rounds_less=export.rounds_less(options)
        )
        loaded_by, rows = seen.loaded_by, probes.said
        notes = [*notes, *_changed_base(source, found)]
        theirs = verify.look_in_llama_cpp(source, export, folder, probes, work=work / "llama.cpp")
        if theirs is not None:
            in_llama_cpp = verify.judge(
                source, tuned=tuned, base=base, seen=theirs, bounds=_for_llama_cpp(bounds, source, export),
                name=f"{name}, in {theirs.loaded_by}", rounds_less=export.rounds_less(options),
            )  # fmt: skip
            notes = [*notes, f"in {theirs.loaded_by} it is the same too: {in_brief(in_llama_cpp)}"]
        if base is not None and found.carried is None:
            notes = [*notes, "the adapter changes nothing on these rows"]
    with storing(folder):
        write_card(
            source, folder, fields=export.card(source, folder, options), license=options.license, found=found,
            bounds=bounds, loaded_by=loaded_by, rows=rows, notes=notes,
        )  # fmt: skip
        values = {"verified": found is not None, "target": export.name, "tunesmith": __version__, "rows_are": rows}
        numbers = {} if found is None else found.values()
        facts = {**values, "loaded_by": loaded_by, "bounds": asdict(bounds), **numbers, "notes": list(notes)}
        facts["llama_cpp"] = None if in_llama_cpp is None else in_llama_cpp.values()
        (folder / PROOF).write_bytes(to_json(facts, indent=True) + b"\n")
    return Exported(folder, export.name, bounds, found, loaded_by, rows, notes, in_llama_cpp)


def _check_quantized(source: Source) -> None:
    if source.quant is None:
        raise InputError(
            f"--merge-into: dequantized: {source.run.path} was not tuned on a quantised base (method "
            f"{source.recipe.method.name}), so there is nothing to unpack. Leave it out."
        )


def _changed_base(source: Source, found: Comparison) -> list[str]:
    """What to say of an adapter that is on another base now than the one it was tuned on."""
    if not source.is_off_its_base:
        return []
    losses = ""
    if found.loss_tuned is not None and found.loss_exported is not None:
        moved = found.loss_exported - found.loss_tuned
        losses = f": held-out loss {found.loss_exported:.4f}, {moved:+.4f} from the tuned model's"
    return [f"tuned on its base in {source.quant}, and here on the base as it was{losses}"]


def _for_precision(bounds: Bounds, source: Source) -> Bounds:
    """What the tuned model is known to in 16 bits is not asked to be nearer, nor one on another base to be the same."""
    if source.is_off_its_base:
        kl, weights = UNQUANTIZED_KL, max(bounds.weights, ROUNDED.weights)
        return replace(bounds, kl=max(bounds.kl, kl), loss=max(bounds.loss, ROUNDED.loss), weights=weights,
                       loss_may_fall=True)  # fmt: skip
    if source.recipe.precision == "float32":
        return bounds
    return replace(bounds, kl=max(bounds.kl, ROUNDED.kl), weights=max(bounds.weights, ROUNDED.weights))


def _for_llama_cpp(bounds: Bounds, source: Source, export: Export) -> Bounds:
    """On a base in blocks it rounds what goes into each product too, which the unpacked model does not."""
    return QUANTIZED if export.loader == "gguf-adapter" and source.base.is_gguf else bounds


def _chosen(target: str) -> Export:
    if target not in EXPORTS:
        raise InputError(f"--to: {target}: there is no such target. One of {', '.join(EXPORTS)}.")
    return EXPORTS[target]


def check_words(target: str, options: Options) -> Export:
    """The target, where there is one and it reads these options. Raises InputError where not."""
    export = _chosen(target)
    if options.license is not None and not options.license.isprintable():
        raise InputError(f"--license: {options.license!r}: a licence is named on one line, such as apache-2.0.")
    for key, default in asdict(Options()).items():
        if key not in (*export.reads, "license") and getattr(options, key) != default:
            readers = ", ".join(name for name, other in EXPORTS.items() if key in other.reads)
            raise InputError(f"--{key.replace('_', '-')}: means nothing to --to {export.name}, only to {readers}.")
    offered = {"merge_into": MERGE_INTO, "dtype": DTYPES, "quant": export.quants}
    for key, known in offered.items():
        value = getattr(options, key)
        if key in export.reads and value not in known:
            raise InputError(f"--{key.replace('_', '-')}: {value}: not offered here. One of {', '.join(known)}.")
    return export


def check(source: Source, target: str, options: Options) -> list[str]:
    """What to say of an export before it is made. Raises InputError for what its target cannot carry."""
    _check_method(source.recipe.method, target)
    return EXPORTS[target].check(source, options)


def _check_method(method: Any, target: str) -> None:
    """Raise InputError where the result of a method is not what a target takes."""
    row = METHODS[method.name]
    if target == ADAPTER.name or not row.is_adapter:
        return
    name = getattr(method, "kind", method.name)
    if target == GGUF_ADAPTER.name and not row.low_rank:
        raise InputError(f"--to {target}: method {row.name} ({name}): llama.cpp reads what --method lora leaves.")
    if not row.can_merge(method):
        raise InputError(
            f"--to {target}: {name} is not a change of the model's weights, so it cannot be merged into them. "
            "Use --to adapter."
        )


def default_folder(run: Run, target: str, options: Options | None = None) -> Path:
    """Where an export goes unless another folder is named."""
    quant = f"-{(options or Options()).quant}" if "quant" in _chosen(target).reads else ""
    return run.path / "exports" / f"{target}{quant}"


def _refuse_to_overwrite(out: Path) -> None:
    """What stood there may be replaced if it was an export, or an empty folder."""
    if out.is_dir() and (not any(out.iterdir()) or (out / PROOF).is_file()):
        return
    if out.exists():
        raise InputError(
            f"{out}: already exists, and is no earlier export: it has no {PROOF}. Name another folder with --out."
        )


def _tidy(out: Path) -> None:
    """Put back what a killed export had moved aside, and remove what dead ones left: those that hold no lock, and of
    earlier versions, which took none, those of long ago."""
    aside = out.with_name(REPLACED + out.name)
    if aside.exists() and not out.exists():
        aside.rename(out)
    for left in abandoned(out.parent):
        with storing(left):
            remove(left)
    held = [path for path in out.parent.glob(f"{TEMPORARY}*") if (path / WRITER).is_file()]
    if not held:
        clean(out.parent, name=out.name, older_than_s=STALE_S)


def _check_room(out: Path, num_bytes: int) -> None:
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        files = [path for left in place.glob(f"{TEMPORARY}*") for path in left.rglob("*") if path.is_file()]
        held = sum(path.stat().st_size for path in files)
        others = f" (exports under way hold {held:,})" if held else ""
        raise StorageError(
            f"{out}: {num_bytes:,} bytes are needed, {free:,} are free{others}. Free some space, or name a folder on "
            "another disk with --out.",
            path=str(out), errno_name="ENOSPC", bytes_needed=num_bytes,
        )  # fmt: skip
