"""Why the hub refuses a model or a data set, and the way out."""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

from tunesmith.formatting import listed

Kind = Literal["model", "dataset"]
_MISSING = {"model": "neither a folder nor a model on the hub", "dataset": "no such data set on the hub"}


def hub_failures() -> tuple[type[Exception], ...]:
    """Every kind of error of a call of the hub."""
    from huggingface_hub.errors import HfHubHTTPError

    # The root of the HTTP library's errors: httpx in huggingface_hub 1, httpx2 in 2.
    return HfHubHTTPError.__bases__[0], OSError


def why_refused(error: Exception, repo: str, kind: Kind, revision: str | None) -> str:
    """The reason of one of `hub_failures`, and the way out, for a message that begins with the name."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    has_token, hub = bool(get_token()), constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", 0)
    text = " ".join(str(error).split())[:300]
    if isinstance(error, GatedRepoError):
        page = f"{hub}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        whose = "The token here was not granted access." if has_token else "Then `hf auth login`."
        return f"gated: its owner asks you to accept terms first: {page}. {whose}"
    if isinstance(error, RevisionNotFoundError):
        return f"no revision {revision!r} on the hub. There are: {_revisions(repo, kind)}."
    if has_token and status == 401:
        return f"{hub} does not accept the token here ({text}). `hf auth login` again, or correct HF_TOKEN."
    if isinstance(error, RepositoryNotFoundError):
        way = "the token here may not read it if it is private" if has_token else "a private one needs `hf auth login`"
        return f"{_MISSING[kind]}, {hub}. Check the spelling; {way}."
    if status == 403:
        return f"{hub}: the token here has no right to read it ({text}). Give the token that right."
    place = "not a folder, not in the local cache, and the hub" if kind == "model" else "the hub"
    return f"{place} cannot be reached: {hub} ({text}). Check the network, or give local files."


def _revisions(repo: str, kind: Kind) -> str:
    from huggingface_hub import HfApi

    with suppress(Exception):  # which only adds to a message
        refs = HfApi().list_repo_refs(repo, repo_type=kind)
        return listed([ref.name for ref in (*refs.branches, *refs.tags)], 20)
    return "branches, tags and commits"
