"""Finding a model and saying what is wrong with it, before anything heavy is imported or a weight is read.

A model is a folder as Hugging Face writes it, an id of the hub (what is cached is taken without asking the hub), or a
GGUF file. Weights are read from safetensors and GGUF alone; code that comes with a model is never run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from tunesmith.errors import ModelError
from tunesmith.models.folder import PICKLES, check_folder, refuse_pickles
from tunesmith.models.headers import read_gguf
from tunesmith.models.hub import from_hub
from tunesmith.recipe.schema import Recipe

_WHAT = " Give a folder, a .gguf file or a hub id."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


@dataclass(frozen=True, slots=True)
class Located:
    """A model that was found, and looked at from outside."""

    kind: Literal["folder", "hub", "gguf"]
    path: Path
    """The folder, the hub's snapshot in the cache, or the GGUF file."""
    name: str
    """What the person wrote, or the hub id."""
    revision: str | None = None
    """Commit of a hub id."""
    headers: TemporaryDirectory[str] | None = field(default=None, compare=False, repr=False)
    """Of a hub id whose weights are not here: keeps the folder, in which they are headers and holes."""

    @property
    def has_weights(self) -> bool:
        return self.headers is None

    @property
    def is_gguf(self) -> bool:
        return self.kind == "gguf"


def locate(model: str, *, revision: str | None = None, offline: bool = False, weights: bool = True) -> Located:
    """The model that `model` names: a folder, a .gguf file, or a hub id, downloaded unless cached.

    `revision` is for hub ids; without `weights` only the headers of theirs are fetched, which is all that a plan reads;
    `locate` again fetches the rest. `offline` opens no socket. Raises ModelError if there is none, or if it cannot be
    used.
    """
    if not model.strip():
        raise ModelError("model: no model was named. Give a folder, a .gguf file or a hub id.")
    path = Path(model).expanduser()
    if path.is_file():
        located = Located("gguf", _gguf_file(path), model)
    elif path.is_dir():
        located = _in_folder(path, model)
    elif _looks_like_path(model):
        raise ModelError(f"{model}: no such folder or file.{_near(path) or _WHAT}")
    else:
        try:
            found = from_hub(model, revision=revision, offline=offline, weights=weights)
        except ModelError as error:
            raise ModelError(f"{error}{_near(path)}") from error
        check_folder(found.folder, model)
        return Located("hub", found.folder, model, found.commit, found.headers)
    if revision is not None:
        raise ModelError(f"{model}: revision {revision} was asked for, but a {located.kind} has none. Leave it out.")
    return located


def locate_base(recipe: Recipe, *, offline: bool = False, weights: bool = True) -> Located:
    """The model of a recipe; of a run's recipe where it is now, under the name that was typed.

    Raises ModelError as `locate` does; of a run it says where the model was, and the way out.
    """
    base = recipe.base
    if base is None:
        return locate(recipe.model, revision=recipe.revision, offline=offline, weights=weights)
    is_as_typed = base.place == recipe.model
    revision = recipe.revision if is_as_typed else None
    try:
        located = locate(base.place, revision=revision, offline=offline, weights=weights)
    except ModelError as error:
        if base.missing and not Path(base.place).expanduser().exists():
            raise ModelError(base.missing) from error
        way = " If this run's model is elsewhere on this machine, pass --model PATH." if is_as_typed else ""
        raise ModelError(f"{error}{way}") from error
    return replace(located, name=recipe.model)


def _looks_like_path(model: str) -> bool:
    path = model.startswith((".", "/", "~")) or model.endswith(".gguf") or not _HUB_ID.fullmatch(model)
    return path or ("/" in model and Path(model).parent.is_dir())


def _near(path: Path) -> str:
    """A question after a folder or file of nearly this name, if there is one."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        return ""
    near = get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def _gguf_file(path: Path) -> Path:
    if path.suffix.lower() in PICKLES:
        raise ModelError(refuse_pickles(path.parent, str(path.parent), [path.name]))
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise ModelError(f"{path}: one file of a model. Give its folder: {path.parent}")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path}: not a model. A model is a folder, a .gguf file or a hub id.")
    read_gguf(path)
    return path


def _in_folder(path: Path, name: str) -> Located:
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return Located("gguf", _gguf_file(ggufs[0]), name)
        if ggufs:
            raise ModelError(f"{name}: {len(ggufs)} GGUF files. Name one of them: {', '.join(map(str, ggufs[:5]))}")
        if (path / "recipe.yaml").is_file() and (path / "model" / "config.json").is_file():
            path = path / "model"  # a finished run of full tuning
    check_folder(path, name)
    return Located("folder", path, name)
