"""Exports that a recipe asks for: refused before the first step where they cannot be, made after the last."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError, RecipeError
from tunesmith.export.exporting import Exported, OnProgress, check, check_words, export_run
from tunesmith.export.options import Options
from tunesmith.export.source import Source
from tunesmith.methods import METHODS
from tunesmith.models.resolve_model import ModelRef
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.folder import Run
from tunesmith.training.inputs import Start, begin


@dataclass(frozen=True)
class Planned(Source):
    """What a run will make, as far as its recipe says."""

    adapter: dict[str, Any] = field(default_factory=dict)
    """What will stand in the adapter's config."""

    @property
    def weights(self) -> ModelRef:
        return self.base

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        return self.adapter

    @property
    def adapted(self) -> list[str]:
        """Not known before the model is loaded."""
        return []


def parse(word: str) -> tuple[str, Options]:
    """TARGET or TARGET:KIND, where the kind is the --dtype of a merged model and the --quant of the others.

    Raises RecipeError for what is neither.
    """
    target, _, kind = word.partition(":")
    options = Options()
    if kind:
        options = Options(dtype=kind) if target == "merged" else Options(quant=kind)
    try:
        check_words(target, options)
    except InputError as error:
        raise RecipeError(f"export.to: {word}: {error}") from error
    return target, options


def check_planned(recipe: Recipe, *, root: Path, offline: bool) -> list[str]:
    """What to say of the exports that a recipe asks for, before its run is made.

    Raises:
        RecipeError: there is no such export.
        ModelError, RunError: this model, task or method cannot be exported so.
    """
    asked = [parse(word) for word in recipe.export.to]
    if not asked:
        return []
    source = _planned(begin(recipe, root=root, offline=offline))
    return [f"{target}: {note}" for target, options in asked for note in check(source, target, options)]


def export_planned(run: Run, word: str, *, on_progress: OnProgress = lambda what, done, total: None) -> Exported:
    """Make one of the exports that a finished run's recipe asks for; its base is on this machine."""
    target, options = parse(word)
    return export_run(run, target, options=options, offline=True, on_progress=on_progress)


def _planned(start: Start) -> Source:
    run = Run(Path(start.recipe.name or "run"))
    recipe, method = start.recipe, start.recipe.method
    config = METHODS[method.name].adapter_config(method)
    return Planned(
        run=run,
        recipe=recipe,
        base=start.located,
        result=run.adapter_path if METHODS[method.name].is_adapter else run.model_path,
        tokenizer=start.renderer.tokenizer,
        kind=start.kind,
        head=start.head,
        labels=None,
        base_hashes={},
        adapter=config,
    )
