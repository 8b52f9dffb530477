"""The proof: what was exported is loaded in a new process and held against the tuned model."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import tunesmith
from tunesmith.errors import ExportError
from tunesmith.export import probe
from tunesmith.export.asked import TorchAsked
from tunesmith.export.comparing import Comparison, compare
from tunesmith.export.gguf_file import write_base
from tunesmith.export.llama_cpp_read import LLAMA_CPP, is_installed
from tunesmith.export.options import Bounds, Export
from tunesmith.export.probe import Seen
from tunesmith.export.rows import Probes
from tunesmith.export.sketches import sketch_all
from tunesmith.export.source import Source, tuned_tensors
from tunesmith.loading import Speaker, load_base, load_run

TIMEOUT_S = 3600.0


def look_at_tuned(source: Source, probes: Probes) -> tuple[Seen, Seen | None]:
    """What the tuned model makes of the probes, with its adapter live on its base, and what the base makes of them."""
    speaker = load_run(source.run, offline=True)
    tuned = _look(speaker, source, probes, answered=True)
    base = None
    if source.is_off_its_base:
        # An export is on the base as it is. What tuning changed cannot be told there from what quantising changed; that
        # every weight is base plus delta can.
        speaker = load_run(source.run, offline=True, as_trained=False)
    elif speaker.can_untune:
        with speaker.untuned():
            base = _look(speaker, source, probes, answered=False)
    elif speaker.attachment is not None:
        base = _look(load_base(source.run, offline=True), source, probes, answered=False)
    weights = sketch_all(tuned_tensors(speaker.model, speaker.attachment))
    return replace(tuned, weights=weights), base


def _look(speaker: Speaker, source: Source, probes: Probes, *, answered: bool) -> Seen:
    return probe.look(
        TorchAsked(speaker.model, speaker.renderer, speaker.head),
        speaker.renderer,
        probes.examples,
        head=speaker.head,
        labels=source.labels,
        masked=source.recipe.train.masked,
        answered=answered,
    )


def look_at_exported(source: Source, loader: str, exported: Path, probes: Probes, *, work: Path) -> Seen:
    """What the exported model makes of the probes, loaded in a new process from its files alone. `work`: an empty
    folder for what the processes tell each other. Raises ExportError where it cannot be loaded."""
    job = work / "job.json"
    probe.write_job(
        job, loader=loader, exported=exported, recipe=source.run.recipe_path, examples=probes.examples
    )  # fmt: skip
    launch(job)
    return Seen.load(work)


def look_in_llama_cpp(source: Source, export: Export, exported: Path, probes: Probes, *, work: Path) -> Seen | None:
    """What llama.cpp makes of them; None where it is not installed, or the export is not for it."""
    if not is_installed() or not export.loader.startswith("gguf"):
        return None
    work.mkdir()
    base = None
    if export.loader == "gguf-adapter":
        base = source.base.path if source.base.is_gguf else write_base(source, work / "base.gguf")
    job = work / "job.json"
    probe.write_job(
        job, loader=LLAMA_CPP, exported=exported, recipe=source.run.recipe_path, examples=probes.examples, base=base
    )  # fmt: skip
    launch(job)
    return Seen.load(work)


def launch(job: Path) -> None:
    """Do a job in a new process, without a network. Raises ExportError with the last words of one that failed."""
    paths = [str(Path(tunesmith.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tunesmith.export.probe", str(job)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"what was exported was not compared within {TIMEOUT_S / 60:.0f} minutes: too slow."
        ) from error
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
        raise ExportError(f"what was exported cannot be used in a new process: {last[0][:600]}")


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
