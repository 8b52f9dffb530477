"""A prepared run in plain values, for its first events and its report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.data.addresses import short_name
from tunesmith.data.branches import lines_of
from tunesmith.data.check import spans_of
from tunesmith.data.in_memory import IN_MEMORY
from tunesmith.data.labels import count_classes
from tunesmith.data.splits import mix
from tunesmith.environment.version import __version__
from tunesmith.methods import METHODS
from tunesmith.optim import OPTIMIZERS
from tunesmith.planning.defaults import total_steps
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.runs.folder import Run, model_shown
from tunesmith.tasks import TASKS
from tunesmith.training.resolve import ResolvedRun, sampler_of
from tunesmith.training.setup import Setup
from tunesmith.types import Aside, Choice, Event, JsonObject

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
PLAN = "plan"
"""Key of run.json: values and timing of the first "plan" event."""


def run_name(setup: Setup) -> str:
    """Name of the run folder without its four hex digits: the recipe's name, or the first data file's; for rows
    in memory, whose file has a hash for a name, model and task."""
    file = short_name(setup.recipe.data.train[0].path)
    in_memory = f"{Path(setup.recipe.model).name.removesuffix('.gguf')[:30]}-{setup.recipe.task}"
    return setup.recipe.name or (in_memory if IN_MEMORY.fullmatch(file) else file.split(".")[0])


def start_values(setup: Setup) -> JsonObject:
    """Values of the "start" event: versions and hashes."""
    return {"model": setup.located.name, "versions": versions(setup.recipe), "identity": dict(setup.identity)}


def _in_short(run: Setup | ResolvedRun, model: str) -> JsonObject:
    """Values that every account of a run begins with. `model`: its name."""
    recipe = run.recipe
    kinds = {"model": model_shown(model), "task": recipe.task, "method": recipe.method.name}
    return {**kinds, "precision": recipe.precision, "mix": mix(run.rows.data, run.rows.trained_per_file)}


def _choices(choices: Sequence[Choice]) -> list[JsonObject]:
    return [{"key": choice.key, "value": plain(choice.value), "reason": choice.reason} for choice in choices]


_UNUSUAL: Mapping[str, Callable[[Choice], bool]] = {
    "data.columns": lambda choice: True,  # the rows mean something else if this guess is wrong
    "data.label_kind": lambda choice: choice.value == "number",
    "task": lambda choice: "chat template" in choice.reason and not TASKS[choice.value].is_chat,
    "precision": lambda choice: "too large" in choice.reason,
    "shard": lambda choice: choice.value is True,
    "train.checkpointed_layers": lambda choice: choice.value > 0,
    "train.tokens_per_pass": lambda choice: "would need" in choice.reason,
}
"""Choices that a person would not expect, or that are right only if a guess is; all others are as usual."""


def unusual(choices: Sequence[Choice]) -> list[str]:
    """Keys of the choices that are shown before the first step, in their order."""
    return [choice.key for choice in choices if choice.key in _UNUSUAL and _UNUSUAL[choice.key](choice)]


def plan_values(setup: Setup) -> JsonObject:
    """Values of the "plan" event: what will be done, and why."""
    sampler = setup.sampler
    return {
        **_in_short(setup, setup.located.name),
        "given": setup.user_options,
        "choices": _choices(setup.choices),
        "unusual": unusual(setup.choices),
        "rows": row_counts(setup),
        "tokens_per_epoch": int(sampler.lengths_I @ sampler.weights_I),
        "longest_row": int(sampler.lengths_I.max()),
        "rows_per_step": sampler.rows_per_step,
        "tokens_per_pass": sampler.tokens_per_pass,
        "layout": sampler.layout,
        "steps": setup.total_steps,
        "steps_per_epoch": sampler.steps_per_epoch,
        "trained_parameters": setup.attachment.num_trained,
        "total_parameters": setup.num_parameters,
        "device": _named(setup.device, setup.world.size),
        "labels": label_counts(setup),
        "new_head": setup.new_head,
        "windows": window_count(setup),
        "sample": sample_spans(setup),
        "warnings": setup.notes,
        "asides": [note for note in setup.notes if isinstance(note, Aside)],
        "details": list(setup.attachment.details),
    }


def plan_timing(setup: Setup) -> JsonObject:
    """The predicted memory and time; empty if there is no prediction."""
    return {} if setup.forecast is None else {"forecast": setup.forecast.values()}


def resolved_values(found: ResolvedRun) -> JsonObject:
    """Output of `tunesmith plan`: the values of a "plan" event that are known before the model is loaded."""
    recipe, rows, forecast = found.recipe, found.rows, found.forecast
    sampler = (
        forecast.sampler if forecast else sampler_of(recipe.train, rows, "padded", recipe.device, seed=recipe.seed)
    )
    return {
        **_in_short(found, found.inputs.located.name),
        "given": found.user_options,
        "choices": _choices(found.choices),
        "rows": {
            "train": len(rows.train_rows),
            "held_out": len(rows.held_rows),
            "skipped": rows.skipped,
        },
        "tokens_per_epoch": int(sampler.lengths_I @ sampler.weights_I),
        "tokens_per_step": float(sampler.lengths_I @ sampler.weights_I) / sampler.steps_per_epoch,
        "steps": total_steps(recipe.train, sampler.steps_per_epoch),
        "steps_per_epoch": sampler.steps_per_epoch,
        "trained_parameters": 0 if forecast is None else forecast.sizes.trained_parameters,
        "total_parameters": found.inputs.size.num_params,
        "device": _named(recipe.device if forecast is None else forecast.device.name, resolved(recipe.devices)),
        "warnings": [*found.inputs.notes, *found.notes, *rows.notes, *(forecast.sizes.notes if forecast else ())],
        "recipe": recipe.model_dump(mode="json"),
        "forecast": None if forecast is None else forecast.values(),
    }


def _named(device: str, number: int) -> str:
    return device if number == 1 else f"{number} × {device}"


def report_facts(setup: Setup) -> JsonObject:
    """Facts for the report, without its metrics."""
    return {
        "name": run_name(setup),
        **_in_short(setup, setup.located.name),
        "rows": row_counts(setup),
        "device": _named(setup.device, setup.world.size),
        "threads": resolved(setup.recipe.threads),
        "versions": versions(setup.recipe),
        "data": [file.path for file in (*setup.recipe.data.train, *setup.recipe.data.eval)],
        "labels": label_counts(setup),
        "new_head": setup.new_head,
        "lengths": length_histogram(setup),
        "notes": setup.notes,
    }


def label_counts(setup: Setup) -> dict[str, int]:
    """Training rows (for tags: words) of each class, by id; empty for other tasks."""
    labels = setup.rows.labels
    if labels is None or labels.kind == "number":
        return {}
    counts_C = count_classes(setup.rows.store.count_labels(setup.rows.train_rows), labels.names)
    return {name: int(num) for name, num in zip(labels.names, counts_C, strict=True)}


def window_count(setup: Setup) -> str:
    """A sentence on how documents were cut; empty for other tasks."""
    if not setup.task.in_windows:
        return ""
    store, rows_I = setup.rows.store, setup.rows.train_rows
    places = np.stack([store.file_index[rows_I], store.lines[rows_I]])
    documents = np.unique(places, axis=1).shape[1]
    stride = setup.recipe.data.stride
    apart = "" if stride == "auto" else f", {stride:,} tokens from one beginning to the next"
    return (
        f"{documents:,} documents in {len(rows_I):,} windows of at most {setup.recipe.data.max_tokens:,} tokens{apart}"
    )


def length_histogram(setup: Setup) -> JsonObject:
    """Tokens of the training rows in at most 40 bins of equal width."""
    lengths_I = setup.sampler.lengths_I
    counts, edges = np.histogram(lengths_I, bins=min(40, int(np.ptp(lengths_I)) + 1))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "max_tokens": resolved(setup.recipe.data.max_tokens)}


def row_counts(setup: Setup) -> dict[str, int]:
    """`overlap`: held-out rows that are trained on too."""
    rows = setup.rows
    return {
        "train": len(rows.train_rows),
        "held_out": len(rows.held_rows),
        "skipped": rows.skipped,
        "overlap": int(np.isin(rows.held_store.hashes[rows.held_rows], rows.store.hashes[rows.train_rows]).sum()),
    }


def sample_spans(setup: Setup) -> list[tuple[str, bool]]:
    """The first training row as (text, trained) pieces, so that users see what is learnt."""
    row = lines_of(setup.rows.store.row(int(setup.rows.train_rows[0])))[0]
    return list(spans_of(row, setup.renderer.tokenizer.decode))


def versions(recipe: Recipe | None = None) -> dict[str, str]:
    """Versions of this package, Python and libraries that numbers depend on, with the extras of `recipe`."""
    used = {OPTIMIZERS[recipe.optim.name].extra if recipe else None}
    method = METHODS.get(recipe.method.name) if recipe else None  # "auto" before the recipe is resolved
    used |= {method.package} if method else set()
    return {
        "tunesmith": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in (*LIBRARIES, *sorted(filter(None, used)))},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }


def plain(value: Any) -> Any:
    """An option's value as JSON."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return dict(value) if isinstance(value, Mapping) else value


def first_plan(run: Run) -> Event | None:
    """The plan of the run's first start: as it was logged, else as run.json has it. None: the run is of an earlier
    version, and was killed before it logged its plan."""
    logged = next((event for event in run.events() if event.kind == "plan"), None)
    planned = run.read_json("run.json").get(PLAN)
    return logged or (Event("plan", 0, run.created, **planned) if planned else None)


def plan_of(setup: Setup, planned: Event | None) -> tuple[JsonObject, JsonObject]:
    """Values and timing of the "plan" event. A run that starts over repeats the choices and predictions of its
    first start, because its recipe is resolved by now."""
    values, timing = plan_values(setup), plan_timing(setup)
    if planned is None:
        return values, timing
    warnings = list(dict.fromkeys([*planned.values.get("warnings", ()), *values["warnings"]]))
    asides = list(dict.fromkeys([*planned.values.get("asides", ()), *values["asides"]]))
    choices = {key: planned.values[key] for key in ("given", "choices", "unusual") if key in planned.values}
    return {**values, **choices, "warnings": warnings, "asides": asides}, {**planned.timing, **timing}
