"""Why the hub refuses a model or a data set."""

from __future__ import annotations

from typing import Literal

from tunesmith.errors import one_line

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
    text = one_line(error)
    if isinstance(error, GatedRepoError):
        page = f"{hub}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        whose = "The token here was not granted access." if has_token else "Then `hf auth login`."
        return f"gated: accept its owner's terms first: {page}. {whose}"
    if isinstance(error, RevisionNotFoundError):
        return f"no revision {revision!r} on the hub. Give a branch, a tag or a commit of it."
    if has_token and status == 401:
        return f"{hub} does not accept the token here ({text}). `hf auth login` again, or correct HF_TOKEN."
    if isinstance(error, RepositoryNotFoundError):
        way = "a private one needs `hf auth login`"
        if has_token:
            way = "the token here may not read it if it is private"
        return f"{_MISSING[kind]}, {hub}. Check the spelling; {way}."
    if status == 403:
        return f"{hub}: the token here has no right to read it ({text}). Give the token that right."
    place = "not a folder, not in the local cache, and the hub" if kind == "model" else "the hub"
    return f"{place} cannot be reached: {hub} ({text}). Check the network, or give local files."
