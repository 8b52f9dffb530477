"""A model at an OpenAI-compatible address: a request with a key, tried again where the server is busy, within
its time and size. Judges and teachers are reached by it alone."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from typing import Literal

from tunesmith.errors import InputError
from tunesmith.phrases import plural
from tunesmith.types import Record

TRIES = 3
FIRST_WAIT_S, LONGEST_RETRY_S = 1.0, 60.0
"""Before the second try, doubled before the third, unless the reply names a time."""
MOST_REPLY_BYTES = 4 * 2**20


class RemoteError(Exception):
    """A request without a reply that can be used; its text begins with the address. `status`: of HTTP, where
    the server has refused the request."""

    def __init__(
        self, kind: Literal["timeout", "unreachable", "unreadable"], message: str, *, status: int | None = None
    ) -> None:
        super().__init__(message)
        self.kind: Literal["timeout", "unreachable", "unreadable"] = kind
        self.status = status


def key_of(key_env: str, place: str = "key_env") -> str:
    """The key in an environment variable; "" for none. Raises InputError, for the option `place`, where it is
    not set."""
    if key_env and not os.environ.get(key_env):
        raise InputError(f"{place}: {key_env}: this environment variable is not set. Set it to the key of the server.")
    return os.environ.get(key_env, "") if key_env else ""


def post(
    address: str,
    path: str,
    body: Record,
    *,
    key: str = "",
    seconds: float,
    most_bytes: int = MOST_REPLY_BYTES,
    sleep: Callable[[float], None] = time.sleep,
) -> Record:
    """The JSON object that POST ADDRESS/PATH gives. `seconds`: of all tries together. Raises RemoteError."""
    request = urllib.request.Request(f"{address}/{path}", json.dumps(body).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    ends = time.monotonic() + seconds
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=max(0.1, ends - time.monotonic())) as reply:
                return dict(json.loads(_read(reply, ends, most_bytes)))
        except urllib.error.HTTPError as error:
            why, named = f"status {error.code}: {_words_of(error, ends)}", error.headers.get("Retry-After", "")
            if error.code not in (408, 409, 429) and error.code < 500:
                raise RemoteError("unreachable", f"{address}: {why}", status=error.code) from None
        except (OSError, HTTPException) as error:
            why, named = str(getattr(error, "reason", error)) or type(error).__name__, ""
        except (ValueError, TypeError, RecursionError):
            raise RemoteError("unreadable", f"{address}: its reply is not a JSON object") from None
        wait = float(named) if re.fullmatch(r"\d+(\.\d+)?", named) else FIRST_WAIT_S * 2**attempt
        if attempt == TRIES - 1 or wait > LONGEST_RETRY_S or time.monotonic() + wait > ends:
            break
        sleep(wait)
    if time.monotonic() >= ends:
        raise RemoteError("timeout", f"{address}: it took more than {seconds:g} s")
    asked_to_wait = f"; it wants to be left for {wait:,.0f} s" if named and attempt < TRIES - 1 else ""
    raise RemoteError("unreachable", f"{address}: {why}, after {plural(attempt + 1, 'try')}{asked_to_wait}")


def _read(reply: HTTPResponse | urllib.error.HTTPError, ends: float, most_bytes: int) -> bytes:
    """The body. Raises TimeoutError at time.monotonic() == `ends`, however slowly it drips."""
    parts, num_bytes = list[bytes](), 0
    while num_bytes < most_bytes and (part := reply.read1(most_bytes - num_bytes)):
        parts.append(part)
        num_bytes += len(part)
        if time.monotonic() > ends:
            raise TimeoutError("the reply was not whole in time")
    return b"".join(parts)


def _words_of(error: urllib.error.HTTPError, ends: float) -> str:
    """The words of a refusal, as far as they come in time."""
    try:
        text = _read(error, ends, MOST_REPLY_BYTES).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        return str(json.loads(text)["error"]["message"])[:300].rstrip(".")
    except (ValueError, TypeError, KeyError, RecursionError):
        return " ".join(text.split())[:300] or str(error.reason)
