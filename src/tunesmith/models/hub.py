"""Models of the Hugging Face hub: what is cached is taken as it is, the rest is downloaded once."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.models.folder import INDEX, PICKLES, SINGLE, check_code, shards
from tunesmith.runs.atomic import storing

_SMALL = (".json", ".jinja", ".model", ".txt")
"""Endings of configs, tokenizers and templates."""
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model of the hub, here."""

    folder: Path
    commit: str
    headers: tempfile.TemporaryDirectory[str] | None = None
    """The folder, for as long as this lives, where of the weights only the headers were fetched; None: it is whole."""


def from_hub(model: str, *, revision: str | None, offline: bool, weights: bool = True) -> Snapshot:
    """A hub id in the local cache, complete, downloaded where it was not; without `weights` of these the headers alone.

    Raises ModelError: unknown, gated, out of reach, or without safetensors.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise ModelError(
            f"{model}: neither a folder nor the form of a hub id ({error}). Check the spelling."
        ) from error
    cached = _cached(model, revision)
    if cached is not None:
        return Snapshot(cached, cached.name)
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
    whole = (folder / SINGLE).is_file() or (
        (folder / INDEX).is_file() and all((folder / name).is_file() for name in shards(folder / INDEX))
    )
    tokenizer = any((folder / name).is_file() for name in _VOCABULARIES)
    return folder if whole and tokenizer and (folder / "config.json").is_file() else None


def _download(model: str, revision: str | None, *, weights: bool) -> Snapshot:
    """Small files first: a model that cannot be used is refused before its weights are fetched."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    # The root of the HTTP library's errors: httpx in huggingface_hub 1, httpx2 in 2.
    no_connection = HfHubHTTPError.__bases__[0]
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
        # By the name that was asked for, which the cache then knows: by a commit alone it would not be found again.
        whole = Path(snapshot_download(model, revision=revision, allow_patterns=small + files))
        return Snapshot(whole, whole.name)
    except GatedRepoError as error:
        raise ModelError(
            f"{model}: its owner asks you to accept terms first: https://huggingface.co/{model}. Then `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{model}: no revision {revision!r} on the hub. Name a branch, tag or commit.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{model}: neither a folder nor a model on the hub. Check the spelling; "
            "a private model needs `hf auth login`."
        ) from error
    except (no_connection, OSError) as error:
        raise ModelError(
            f"{model}: not a folder, not in the local cache, and the hub cannot be reached ({error}). "
            "Check the network, or give a folder or a .gguf file."
        ) from error


def _with_headers(model: str, commit: str, small: Path, files: Sequence[str]) -> Snapshot:
    """A folder that says of every weight what it is, as the whole one would: files of full size that take no room."""
    from huggingface_hub import HfApi

    headers = tempfile.TemporaryDirectory(prefix="tunesmith-headers-")
    folder = Path(headers.name)
    for file in small.iterdir():
        if file.is_file() and file.name not in files:
            shutil.copyfile(file, folder / file.name)
    for name in files:
        told = HfApi().parse_safetensors_file_metadata(model, name, revision=commit)
        tensors = {
            key: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": list(one.data_offsets)}
            for key, one in told.tensors.items()
        }
        text = json.dumps({"__metadata__": told.metadata or {}, **tensors}).encode()
        with storing(folder / name), open(folder / name, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(out.tell() + max((one.data_offsets[1] for one in told.tensors.values()), default=0))
    return Snapshot(folder, commit, headers)


def _check_names(model: str, names: list[str]) -> None:
    if SINGLE in names or INDEX in names:
        return
    pickles = [name for name in names if name.endswith(PICKLES)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        raise ModelError(f"{model}: GGUF files only. Download one, such as {ggufs[0]}, and give its path.")
    if pickles:
        raise ModelError(
            f"{model}: its weights are in {', '.join(pickles[:3])} only, a format that can run code when it is read: "
            "refused. Look for a revision with safetensors (often refs/pr/N), or convert it yourself if you trust it."
        )
    raise ModelError(f"{model}: no {SINGLE} on the hub: not a model that can be tuned.")
