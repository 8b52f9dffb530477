"""API keys: read from a file or the environment, kept as hashes, compared in constant time, never written anywhere."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import InputError

VARIABLE = "TUNESMITH_API_KEY"
SHORTEST = 20
"""Characters of a key: what can be guessed is no key."""

_MAKE_ONE = 'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'


@dataclass(frozen=True)
class Keys:
    """SHA-256 of every key that is let in."""

    digests: tuple[bytes, ...]

    def let_in(self, authorization: bytes | None) -> bool:
        """Whether the value of an Authorization header carries one of the keys."""
        scheme, _, given = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        same = [hmac.compare_digest(digest, known) for known in self.digests]  # every one: which fits must not show
        return scheme.lower() == b"bearer" and any(same)

    @classmethod
    def of(cls, keys: Sequence[str]) -> Keys | None:
        """None: there are none."""
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in keys)) if keys else None


def read_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The keys of `file`, one a line, or else the one in TUNESMITH_API_KEY, if there is one. And notes.

    Raises InputError where the file cannot be read or holds no key, and for a key too short to be one.
    """
    notes = []
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
            mode = file.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or "it is no UTF-8 text"
            raise InputError(f"{file}: no key can be read: {why}.") from None
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InputError(f"{file}: holds no key. One a line. {_MAKE_ONE}")
        if mode & 0o077:
            notes.append(f"{file}: others on this machine may read it. chmod 600 {file} keeps it yours.")
        place = str(file)
    elif environment.get(VARIABLE):
        keys, place = [environment[VARIABLE].strip()], VARIABLE
    else:
        return [], notes
    for number, key in enumerate(keys, 1):
        where = place if len(keys) == 1 else f"{place}: key {number}"
        if len(key) < SHORTEST:
            raise InputError(f"{where}: a key needs {SHORTEST} characters or more, and has {len(key)}. {_MAKE_ONE}")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"{where}: a key is of letters, digits and signs of ASCII, without blanks. {_MAKE_ONE}")
    return keys, notes
