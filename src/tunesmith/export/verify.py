"""The proof: what was exported is loaded in a new process and held against the tuned model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tunesmith.errors import ExportError
from tunesmith.export import probe
from tunesmith.export.asked import Asks, TorchAsked
from tunesmith.export.comparing import Comparison, compare
from tunesmith.export.gguf_file import write_base
from tunesmith.export.llama_cpp_read import LLAMA_CPP, is_installed
from tunesmith.export.options import Bounds, Export
from tunesmith.export.probe import POSITIONS, Seen
from tunesmith.export.process import in_new_process
from tunesmith.export.rows import MOST_ROWS, Probes
from tunesmith.export.sketches import sketch_all
from tunesmith.export.source import Source, tuned_tensors
from tunesmith.inference.load import LoadedModel, load_base, load_run
from tunesmith.models.pooling import find_pooling
from tunesmith.models.size import model_size
from tunesmith.runs.atomic import storing


def look_at_tuned(source: Source, probes: Probes, asks: Asks) -> tuple[Seen, Seen | None]:
    """What the tuned model makes of the probes, with its adapter live on its base, and what the base makes of them."""
    speaker = load_run(source.run, offline=True)
    tuned = _look(speaker, source, probes, asks, answered=True)
    base = None
    if source.is_off_its_base:
        # An export is on the base as it is. What tuning changed cannot be told there from what quantising changed; that
        # every weight is base plus delta can.
        speaker = load_run(source.run, offline=True, as_trained=False)
    elif speaker.has_base:
        with speaker.adapter_disabled():
            base = _look(speaker, source, probes, asks, answered=False)
    elif speaker.attachment is not None:
        base = _look(load_base(source.run, offline=True), source, probes, asks, answered=False)
    body = f"{speaker.model.base_model_prefix}." if asks == "vector" else ""
    tensors = tuned_tensors(speaker.model, speaker.attachment)
    weights = sketch_all((name, tensor) for name, tensor in tensors if name.startswith(body))
    return replace(tuned, weights=weights), base


def _look(speaker: LoadedModel, source: Source, probes: Probes, asks: Asks, *, answered: bool) -> Seen:
    pooling = find_pooling(source.weights.path).kind if asks == "vector" else "mean"
    return probe.look(
        TorchAsked(speaker.model, speaker.renderer, asks, pooling),
        speaker.renderer,
        probes.examples,
        head=asks,
        labels=source.labels,
        masked=source.recipe.train.masked,
        answered=answered,
    )


def look_at_exported(source: Source, loader: str, exported: Path, probes: Probes, *, work: Path) -> Seen:
    """What the exported model makes of the probes, loaded in a new process from its files alone. `work`: an empty
    folder for what the processes tell each other. Raises ExportError where it cannot be loaded."""
    job = work / "job.json"
    probe.write_job(
        job, loader=loader, exported=exported, recipe=source.run.recipe_path, model=source.recipe.place,
        examples=probes.examples,
    )  # fmt: skip
    launch(job)
    return Seen.load(work)


def look_in_llama_cpp(source: Source, export: Export, exported: Path, probes: Probes, *, work: Path) -> Seen | None:
    """What llama.cpp makes of them; None where it is not installed, or the export is not for it."""
    if not _asks_llama_cpp(export):
        return None
    with storing(work):
        work.mkdir()
        base = write_base(source, work / "base.gguf") if _needs_base(source, export) else None
    if export.loader == "gguf-adapter" and base is None:
        base = source.base.path
    job = work / "job.json"
    probe.write_job(
        job, loader=LLAMA_CPP, exported=exported, recipe=source.run.recipe_path, model=source.recipe.place,
        examples=probes.examples, base=base,
    )  # fmt: skip
    launch(job)
    return Seen.load(work)


def room_for_proof(source: Source, export: Export) -> int:
    """Bytes on disk that the proof takes, at most: what is seen, and a base for llama.cpp to put an adapter on."""
    sizes = model_size(source.weights)
    seen = MOST_ROWS * POSITIONS * sizes.vocab_size * 4
    if not _asks_llama_cpp(export):
        return seen
    return 2 * seen + (4 * sizes.num_params if _needs_base(source, export) else 0)


def _asks_llama_cpp(export: Export) -> bool:
    return is_installed() and export.loader.startswith("gguf")


def _needs_base(source: Source, export: Export) -> bool:
    return export.loader == "gguf-adapter" and not source.base.is_gguf


def launch(job: Path) -> None:
    """Do a job in a new process. Raises ExportError with the last words of one that failed."""
    in_new_process("tunesmith.export.probe", str(job), what="what was exported cannot be used in a new process")


def judge(
    source: Source, *, tuned: Seen, base: Seen | None, seen: Seen, bounds: Bounds, name: str, rounds_less: str
) -> Comparison:
    """How far the export is from the tuned model. Raises ExportError past the bounds, naming the worst tensor;
    `rounds_less` is the option to try where rounding alone is the cause."""
    found = compare(tuned, seen, base=base, labels=source.labels)
    if problems := found.problems(bounds):
        is_rounding = found.same_ids and found.distance <= bounds.weights and rounds_less
        way_out = f" Every weight is as near as rounding allows: try {rounds_less}." if is_rounding else ""
        if source.is_off_its_base and found.distance <= bounds.weights:
            way_out = (
                " It was tuned on a quantised base, and does worse on the base as it was: --merge-into dequantized "
                "takes the weights that it was tuned on."
            )
        raise ExportError(f"{name}: not what was tuned, nothing was kept: {'; '.join(problems)}.{way_out}")
    return found
