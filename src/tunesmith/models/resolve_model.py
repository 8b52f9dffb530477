"""Resolution of a model's name to its files, before anything heavy is imported or a weight is read.

A model is a folder as Hugging Face writes it, an id of the hub (a cached one is used without asking the hub),
or a GGUF file. Weights are read from safetensors and GGUF alone; code that comes with a model is never run.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from tunesmith.environment.hub import hub_failures, why_refused
from tunesmith.errors import ModelError
from tunesmith.models.folder import INDEX, PICKLES, SINGLE, check_code, check_folder, refuse_pickles, shards
from tunesmith.models.gguf import read_gguf
from tunesmith.phrases import near_file
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.atomic import storing

_GIVE = " Give a folder, a .gguf file or a hub id."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model that exists and whose files are sound as far as their headers tell."""

    kind: Literal["folder", "hub", "gguf"]
    path: Path
    """The folder, the hub's snapshot in the cache, or the GGUF file."""
    name: str
    """The model as it was given, or the hub id."""
    revision: str | None = None
    """Commit of a hub id."""
    headers: TemporaryDirectory[str] | None = field(default=None, compare=False, repr=False)
    """For a hub id whose weights are not here: keeps the folder with their headers."""

    @property
    def has_weights(self) -> bool:
        return self.headers is None

    @property
    def is_gguf(self) -> bool:
        return self.kind == "gguf"


def resolve_model(model: str, *, revision: str | None = None, offline: bool = False, weights: bool = True) -> ModelRef:
    """The model that `model` names: a folder, a .gguf file, or a hub id, downloaded unless cached.

    `revision` is for hub ids, which can also have it in their name: owner/name@revision. Without `weights` only
    the headers of weight files are fetched, which is all that a plan reads; a second call fetches the rest.
    `offline` opens no socket. Raises ModelError if there is no such model, or if it cannot be used.
    """
    if not model.strip():
        raise ModelError("model: no model was named. Give a folder, a .gguf file or a hub id.")
    path = Path(model).expanduser()
    model, revision = split_revision(model, revision)
    if path.is_file():
        located = ModelRef("gguf", _gguf_file(path), model)
    elif path.is_dir():
        located = _in_folder(path, model)
    elif looks_like_path(model):
        raise ModelError(f"{model}: no such folder or file.{near_file(path) or _GIVE}")
    else:
        try:
            located = _from_hub(model, revision=revision, offline=offline, weights=weights)
        except ModelError as error:
            raise ModelError(f"{error}{near_file(path)}") from error
        check_folder(located.path, model)
        return located
    if revision is not None:
        raise ModelError(f"{model}: revision {revision}: a {located.kind} has no revisions. Leave it out.")
    return located


def split_revision(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """The hub id and the revision of owner/name@revision, also after hf://; any other name as it is.

    Raises ModelError if `revision` is another one.
    """
    name, at, named = model.removeprefix("hf://").partition("@")
    if Path(model).expanduser().exists() or not _HUB_ID.fullmatch(name) or (at and not named):
        return model, revision
    if at and revision not in (None, named):
        raise ModelError(f"{model}: revision is {revision} too. Give one of both.")
    return name, named or revision


def resolve_base(recipe: Recipe, *, offline: bool = False, weights: bool = True) -> ModelRef:
    """The model of a recipe; for a run's recipe the place where the model is now, under the typed name.

    Raises ModelError as `resolve_model` does; for a run it says where the model was, and the way out.
    """
    base = recipe.base
    if base is None:
        return resolve_model(recipe.model, revision=recipe.revision, offline=offline, weights=weights)
    is_as_typed = base.place == recipe.model
    revision = recipe.revision if is_as_typed else None
    try:
        located = resolve_model(base.place, revision=revision, offline=offline, weights=weights)
    except ModelError as error:
        if base.missing and not Path(base.place).expanduser().exists():
            raise ModelError(base.missing) from error
        way = " If this run's model is elsewhere on this machine, pass --model PATH." if is_as_typed else ""
        raise ModelError(f"{error}{way}") from error
    return replace(located, name=recipe.model)


def looks_like_path(model: str) -> bool:
    """Whether a name, without a revision, names a file or folder rather than a hub id."""
    path = model.startswith((".", "/", "~")) or model.endswith(".gguf") or not _HUB_ID.fullmatch(model)
    return path or ("/" in model and Path(model).parent.is_dir())


def _gguf_file(path: Path) -> Path:
    if path.suffix.lower() in PICKLES:
        raise ModelError(refuse_pickles(path.parent, str(path.parent), [path.name]))
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise ModelError(f"{path}: one file of a model. Give its folder: {path.parent}")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path}: not a model. Give a folder, a .gguf file or a hub id, and DATA after it.")
    read_gguf(path)
    return path


def _in_folder(path: Path, name: str) -> ModelRef:
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ModelRef("gguf", _gguf_file(ggufs[0]), name)
        if ggufs:
            raise ModelError(f"{name}: {len(ggufs)} GGUF files. Name one of them: {', '.join(map(str, ggufs[:5]))}")
        if (path / "recipe.yaml").is_file() and (path / "model" / "config.json").is_file():
            path = path / "model"  # a finished run of full tuning
    check_folder(path, name)
    return ModelRef("folder", path, name)


_SMALL = (".json", ".jinja", ".model", ".txt")
"""Endings of configs, tokenizers and templates."""
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model", "vocab.json",
    "vocab.txt",
)  # fmt: skip


def _from_hub(model: str, *, revision: str | None, offline: bool, weights: bool) -> ModelRef:
    """The files of a hub id, downloaded unless cached; without `weights` only the headers of weight files.

    Raises ModelError: unknown, gated, out of reach, or without safetensors.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        cached = _cached(model, revision)
    except HFValidationError as error:
        raise ModelError(
            f"{model}: neither a folder nor the form of a hub id ({error}). Check the spelling."
        ) from error
    if cached is not None:
        return ModelRef("hub", cached, model, cached.name)
    if offline:
        raise ModelError(
            f"{model}: neither a folder nor a model in the local cache, and --offline forbids to fetch it. "
            "Run once without --offline, or give a folder."
        )
    return _download(model, revision, weights=weights)


def _cached(model: str, revision: str | None) -> Path | None:
    """The snapshot in the cache if nothing of it is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    has_weights = (folder / SINGLE).is_file() or (
        (folder / INDEX).is_file() and all((folder / name).is_file() for name in shards(folder / INDEX))
    )
    tokenizer = any((folder / name).is_file() for name in _VOCABULARIES)
    return folder if has_weights and tokenizer and (folder / "config.json").is_file() else None


def _download(model: str, revision: str | None, *, weights: bool) -> ModelRef:
    """Small files first: a model that cannot be used is refused before its weights are fetched."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(model, revision=revision)
        names = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
        _check_names(model, names)
        small = [name for name in names if name.endswith(_SMALL)]
        folder = Path(snapshot_download(model, revision=info.sha, allow_patterns=small))
        check_code(folder)
        files = [SINGLE] if SINGLE in names else shards(folder / INDEX)
        if not weights:
            return _with_headers(model, info.sha, folder, files)
        # By the name as it was given, which the cache then knows: by a commit alone it would not be found.
        complete = Path(snapshot_download(model, revision=revision, allow_patterns=small + files))
        return ModelRef("hub", complete, model, complete.name)
    except hub_failures() as error:
        raise ModelError(f"{model}: {why_refused(error, model, 'model', revision)}") from error


def _with_headers(model: str, commit: str, small: Path, files: Sequence[str]) -> ModelRef:
    """A folder whose weight files have their headers and full size, but take no room on the disk."""
    from huggingface_hub import HfApi

    headers = TemporaryDirectory(prefix="tunesmith-headers-")
    folder = Path(headers.name)
    for file in small.iterdir():
        if file.is_file() and file.name not in files:
            shutil.copyfile(file, folder / file.name)
    for name in files:
        metadata = HfApi().parse_safetensors_file_metadata(model, name, revision=commit)
        tensors = {
            key: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for key, info in metadata.tensors.items()
        }
        text = json.dumps({"__metadata__": metadata.metadata or {}, **tensors}).encode()
        with storing(folder / name), open(folder / name, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            ends = [info.data_offsets[1] for info in metadata.tensors.values()]
            out.truncate(out.tell() + max(ends, default=0))
    return ModelRef("hub", folder, model, commit, headers)


def _check_names(model: str, names: list[str]) -> None:
    if SINGLE in names or INDEX in names:
        return
    pickles = [name for name in names if name.endswith(PICKLES)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        raise ModelError(f"{model}: GGUF files only. Download one, such as {ggufs[0]}, and give its path.")
    if pickles:
        raise ModelError(
            f"{model}: its weights are in {', '.join(pickles[:3])} only, a format that can run code when it is "
            "read: refused. Look for a revision with safetensors (often refs/pr/N), or convert it yourself if "
            "you trust it."
        )
    raise ModelError(f"{model}: no {SINGLE} on the hub: not a model that can be tuned.")
