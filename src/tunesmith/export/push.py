"""Upload of an export to the Hugging Face hub, in one commit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import ExportError, InputError
from tunesmith.export.export_run import CHECK_FILE
from tunesmith.runs.atomic import from_json


@dataclass(frozen=True, slots=True)
class Pushed:
    """A finished upload."""

    url: str
    num_files: int
    num_bytes: int
    is_proven: bool


def push(folder: Path, name: str, *, private: bool = True, endpoint: str | None = None) -> Pushed:
    """Upload an exported folder as the model `name` (owner/name), in one commit; a repository is made if there is none.

    `endpoint` None: the hub, or what HF_ENDPOINT says. The token is that of `hf auth login` or HF_TOKEN.

    Raises:
        InputError: the folder is no export or has a link in it, or the name is none of a model.
        ExportError: the hub refuses or is out of reach; what was there before is there still.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not (folder / CHECK_FILE).is_file():
        raise InputError(f"{folder}: no export: it has no {CHECK_FILE}. Make one with `tunesmith export`.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{name}: not a name of the hub ({error}). Write owner/name.") from error
    files = list(_files(folder, name))
    operations = [CommitOperationAdd(path, content) for path, content in files]
    api = HfApi(endpoint=endpoint)
    with_private: dict[str, Any] = {"private": private, "exist_ok": True}
    try:
        repository = api.create_repo(name, **with_private)
        api.create_commit(repository.repo_id, operations, commit_message="Export of tunesmith")
    # The root of the HTTP library's errors: httpx in huggingface_hub 1, httpx2 in 2.
    except (HfHubHTTPError.__bases__[0], OSError, ValueError) as error:
        raise _explained(name, error) from error
    sizes = [
        len(content.getvalue()) if isinstance(content, io.BytesIO) else content.stat().st_size for _, content in files
    ]
    is_proven = bool(from_json((folder / CHECK_FILE).read_bytes())["verified"])
    return Pushed(str(repository), len(files), sum(sizes), is_proven)


def _files(folder: Path, name: str) -> Iterator[tuple[str, Path | io.BytesIO]]:
    """Every file of the folder; its card says how to use it by its name on the hub."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise InputError(f"{path}: a link, and what it points to would be published. Put the file itself there.")
        if not path.is_file():
            continue
        where = path.relative_to(folder).as_posix()
        if where == "README.md":
            text = path.read_text("utf-8").replace('"PATH"', f'"{name}"').replace("=PATH`", f"={name}`")
            yield where, io.BytesIO(text.encode())
        else:
            yield where, path


def _explained(name: str, error: BaseException) -> ExportError:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    ways_out = {
        401: "Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
        403: "Use a token that may write there, or a name of your own.",
        409: "Somebody else wrote at the same time: try again.",
        413: "It is larger than the hub takes.",
        429: "The hub asks to wait: try again later.",
    }
    missing = "Log in with `hf auth login`, or set HF_TOKEN." if "token" in text.lower() else "Check the connection."
    return ExportError(f"{name}: the hub did not take it: {text}. {ways_out.get(status or 0, missing)}")
