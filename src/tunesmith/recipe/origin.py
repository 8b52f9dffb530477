"""Finds the model and the data of a run again, whatever the current folder.

run.json records `made` = {"in": the current folder then, "root": the folder of the run, "places": {typed:
absolute path}}. Runs of earlier versions have no record: their paths are used as typed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.recipe.reinforcement import file_of
from tunesmith.types import JsonObject

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Base:
    """Places of what a run's recipe names, now."""

    model: str
    """As it was typed."""
    place: str
    """Place of the model."""
    missing: str = ""
    """Message if nothing is there; empty: the reader's."""
    grader: str = ""
    teacher: str = ""
    """Places of the grader and the teacher."""


def record(typed: Iterable[tuple[str, str]], root: Path) -> JsonObject:
    """The record for run.json of a run in `root` with these `typed_places`; empty if
    there is no current folder."""
    with suppress(OSError):
        paths = {name: Path(at).expanduser() for name, at in typed}
        places = {name: str(path.absolute()) for name, path in paths.items() if path.exists()}
        return {"in": str(Path.cwd()), "root": str(root.absolute()), "places": places}
    return {}


def typed_places(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every path of a recipe and where it is read; its model may be a hub id."""
    data = recipe.data
    yield recipe.model, recipe.place
    yield from ((file.path, file.at) for file in (*data.train, *data.eval, *data.replay))
    if data.template is not None:
        yield data.template, data.template_at or data.template
    if recipe.reinforce.grader is not None:
        yield file_of(recipe.reinforce.grader), file_of(recipe.grader_at)
    if recipe.distil.teacher is not None:
        yield recipe.distil.teacher, recipe.teacher_at


@dataclass(frozen=True, slots=True)
class Origin:
    """The places recorded when a run was made."""

    run: Path
    """Its folder now."""
    base: str | None = None
    """Place of its base now, as given by the user."""
    made_in: str = ""
    root: str = ""
    places: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Path, facts: object, *, base: str | None) -> Origin:
        """From the content of run.json, which may be from anywhere."""
        made = facts.get("made") if isinstance(facts, dict) else None
        if not isinstance(made, dict) or not isinstance(made.get("places"), dict):
            return cls(run, base)
        places = {key: value for key, value in made["places"].items() if isinstance(value, str)}
        return cls(run, base, str(made.get("in", "")), str(made.get("root", "")), places)

    def find(self, typed: str) -> str:
        """The place now: as recorded, moved with the run, or as typed; else as recorded, for a message."""
        then = self.places.get(typed)
        if then is None:
            return typed
        candidates = [then, typed]
        with suppress(ValueError):  # of another drive
            moved = Path(self.run.absolute().parent, os.path.relpath(then, self.root))
            candidates.insert(1, os.path.normpath(moved))  # as far from the run's folder as it was then
        return next((path for path in candidates if os.path.exists(os.path.expanduser(path))), then)

    def put(self, recipe: Recipe) -> Recipe:
        """The run's recipe, knowing where its files are now; what was typed stays what it says."""
        data = recipe.data
        sides = {
            side: tuple(file.at_place(self.find(file.path)) for file in getattr(data, side))
            for side in ("train", "eval", "replay")
        }
        if data.template is not None:
            data = data.with_template_at(self.find(data.template))
        recipe = recipe.model_copy(update={"data": data.model_copy(update=sides)})
        model, grader = recipe.model, recipe.reinforce.grader or ""
        file = file_of(grader)
        at = f"{self.find(file)}{grader[len(file) :]}" if grader else ""
        teacher = self.find(recipe.distil.teacher) if recipe.distil.teacher else ""
        return recipe.on_base(Base(model, self.base or self.find(model), self._missing(model), at, teacher))

    def _missing(self, model: str) -> str:
        """The message for a base that is not found."""
        if self.base is not None:
            return ""
        if then := self.places.get(model):
            return (
                f"{model}: this run was made in {self.made_in} from {model}; it is not there now ({then}): "
                "pass --model PATH."
            )
        return ""


def moved_to(recipe: Recipe) -> Recipe:
    """A run's recipe as one would type it now: every path is where the file is."""
    data = recipe.data
    sides: JsonObject = {
        side: tuple(file.model_copy(update={"path": file.at}) for file in getattr(data, side))
        for side in ("train", "eval", "replay")
    }
    data = data.model_copy(update={**sides, "template": data.template_at})
    reinforce = recipe.reinforce.model_copy(update={"grader": recipe.grader_at or None})
    distil = recipe.distil.model_copy(update={"teacher": recipe.teacher_at or None})
    return recipe.model_copy(update={"data": data, "model": recipe.place, "reinforce": reinforce, "distil": distil})
