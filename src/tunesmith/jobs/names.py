"""Ids of files, jobs and events, and the names of tuned models."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import unicodedata

from tunesmith.errors import InputError

BASE_62 = string.digits + string.ascii_letters
DEFAULT_PROJECT = "tunesmith"
"""The project of requests where there are no keys, and of the keys in a key file."""
ID_LENGTH = 24
MAX_NAME_BYTES = 255
SNAPSHOT = ":ckpt-step-"


def new_id(prefix: str) -> str:
    """`file-` or `ftjob-` and 24 characters from the system's random source."""
    return prefix + "".join(secrets.choice(BASE_62) for _ in range(ID_LENGTH))


def derived_id(prefix: str, *parts: object, length: int = ID_LENGTH) -> str:
    """An id that follows from its parts, so that what is written twice is written once."""
    number = int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest(), "big")
    digits = ""
    for _ in range(length):
        number, digit = divmod(number, len(BASE_62))
        digits += BASE_62[digit]
    return prefix + digits


def check_project(name: str) -> None:
    """Raises InputError."""
    if not re.fullmatch(r"[a-z0-9-]{1,32}", name):
        raise InputError(f"{name[:60]!r}: a project's name has 1 to 32 small letters, digits and hyphens.")


def project_of(tuned: str) -> str:
    """The project that a tuned model belongs to, by its name."""
    parts = tuned.split(":")
    return parts[2] if len(parts) > 2 else DEFAULT_PROJECT


def tuned_name(base: str, project: str, suffix: str | None, job: str) -> str:
    """ft:BASE:PROJECT:SUFFIX:8 characters. The suffix keeps letters, digits and hyphens, in lower case."""
    clean_suffix = re.sub(r"[^a-z0-9-]", "-", (suffix or "").lower())
    return f"ft:{base}:{project}:{clean_suffix}:{derived_id('', job, 'model', length=8)}"


def snapshot_name(base: str, project: str, suffix: str | None, job: str, step: int) -> str:
    """The name of the result at the end of an epoch, which has 8 characters of its own."""
    return f"{tuned_name(base, project, suffix, f'{job} {step}')}{SNAPSHOT}{step}"


def snapshot_step(name: str) -> int | None:
    """The step that a name of a snapshot ends with; None: it is the name of a last result."""
    _, mark, step = name.rpartition(SNAPSHOT)
    return int(step) if mark else None


def shown_name(raw: bytes) -> str:
    """A client's file name as data: last component, no control characters, at most 255 bytes of UTF-8."""
    last = re.split(r"[/\\]", raw.decode("utf-8", "replace"))[-1]
    plain = "".join(char for char in last if unicodedata.category(char) not in ("Cc", "Cf"))
    return plain.encode()[:MAX_NAME_BYTES].decode("utf-8", "ignore") or "upload"
