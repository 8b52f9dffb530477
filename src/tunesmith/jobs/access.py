"""Keys of projects: what each may do, and the project of a request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from tunesmith.errors import InputError
from tunesmith.jobs.names import DEFAULT_PROJECT, check_project, new_id
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import keys
from tunesmith.serve.middleware import ApiKeys, wrong_key
from tunesmith.serve.protocol import RequestError
from tunesmith.types import Record

SCOPES = ("models.ask", "models.delete", "files.read", "files.write", "jobs.read", "jobs.write", "admin")
"""`admin`: everything."""
_READ, _WRITE = 0, 1
_NEEDED: tuple[tuple[str, tuple[str | None, str | None]], ...] = (
    ("/v1/files", ("files.read", "files.write")),
    ("/v1/uploads", ("files.write", "files.write")),
    ("/v1/fine_tuning/checkpoints", ("admin", "admin")),
    ("/v1/fine_tuning", ("jobs.read", "jobs.write")),
    ("/v1/models", (None, "models.delete")),
    ("/v1", ("models.ask", "models.ask")),
    ("/metrics", ("admin", "admin")),
)
"""Scopes to read and to change what is under a path, the first that matches; None: any key."""
USE_NOTED_S = 3600
"""Seconds between two notes of a key's last use."""
KEPT_S = 1.0
"""Most seconds until a key that another program made or revoked is obeyed."""


def scope_of(method: str, path: str) -> str | None:
    """The scope that a request needs; None: any key will do."""
    for prefix, scopes in _NEEDED:
        if path == prefix or path.startswith(f"{prefix}/"):
            return scopes[_READ if method in ("GET", "HEAD") else _WRITE]
    return None


def create_key(
    store: Store,
    *,
    project: str = DEFAULT_PROJECT,
    scopes: Sequence[str] = (),
    days: float | None = None,
    label: str = "",
) -> tuple[Record, str]:
    """The row of a new key, and the key, which is kept nowhere. Raises InputError."""
    check_project(project)
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise InputError(f"--scope: {unknown[0]}: there is no such scope. Any of {', '.join(SCOPES)}.")
    name, now = new_id("key-"), int(time.time())
    key = f"ts-{name.removeprefix('key-')}-{secrets.token_urlsafe(32)}"
    row = {
        "id": name, "project": project, "label": label, "digest": _digest(key), "scopes": list(scopes or ("admin",)),
        "expires_at": None if days is None else now + int(days * 86_400),
    }  # fmt: skip
    store.insert(keys, row)
    return store.one(keys, id=name) or {}, key


def revoke_key(store: Store, name: str) -> None:
    """Raises InputError for a key that is not there."""
    if not store.update(keys, {"revoked_at": int(time.time())}, id=name):
        raise InputError(f"{name}: there is no such key. `tunesmith keys list` shows them.")


def state_of(row: Record) -> str:
    """active, revoked or expired."""
    if row["revoked_at"] is not None:
        return "revoked"
    return "expired" if row["expires_at"] is not None and row["expires_at"] <= time.time() else "active"


@dataclass
class ProjectKeys:
    """Admits requests by the keys of a store, or by a key file, whose keys may do all in the first project."""

    store: Store
    from_file: ApiKeys | None
    may_be_open: bool
    """Whether requests without a key are for the first project, as long as no key was ever made."""
    _keys: Mapping[str, Record] = field(default_factory=dict)
    _read_at: tuple[int, float] = (-1, 0.0)
    """Version of the store and time of `_keys`."""
    _rates: MovingWindowRateLimiter = field(default_factory=lambda: MovingWindowRateLimiter(MemoryStorage()))

    async def admit(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> str:
        """See middleware.Admission."""
        version, now = self.store.version, time.monotonic()
        if self._read_at[0] != version or now - self._read_at[1] >= KEPT_S:
            self._keys = await asyncio.to_thread(self.store.keys)
            self._read_at = version, now
        authorization = headers.get(b"authorization", b"")
        if self.from_file is not None and self.from_file.accepts(authorization):
            return self._for_project(DEFAULT_PROJECT, headers)
        if self.from_file is None and self.may_be_open and not self._keys:
            return self._counted(DEFAULT_PROJECT)  # whatever key and project a program sends along
        row = self._find(authorization)
        if time.time() - (row["used_at"] or 0) > USE_NOTED_S:
            await asyncio.to_thread(self.store.update, keys, {"used_at": int(time.time())}, id=row["id"])
        needed = scope_of(method, path)
        if needed is not None and not {needed, "admin"} & set(row["scopes"]):
            message = f"This key lacks the scope {needed}; it has {', '.join(row['scopes'])}."
            raise RequestError(message, status=403, code="missing_scope")
        return self._for_project(row["project"], headers)

    def _find(self, authorization: bytes) -> Record:
        scheme, _, credentials = authorization.partition(b" ")
        key = credentials.strip().decode("latin-1")
        row = self._keys.get(f"key-{key.split('-')[1]}") if key.count("-") >= 2 else None
        if row is None or scheme.lower() != b"bearer" or not hmac.compare_digest(row["digest"], _digest(key)):
            raise wrong_key()
        if (state := state_of(row)) != "active":
            raise wrong_key(f"This API key is {state}.")
        return row

    def _for_project(self, project: str, headers: Mapping[bytes, bytes]) -> str:
        wanted = headers.get(b"openai-project", project.encode())
        if wanted != project.encode():
            message = "OpenAI-Project: is not the project of this key."
            raise RequestError(message, status=401, code="mismatched_project")
        return self._counted(project)

    def _counted(self, project: str) -> str:
        if (most := self.store.rules.of(project).requests_per_minute) is not None:
            window = RateLimitItemPerMinute(most)
            if not self._rates.hit(window, project):
                wait = max(1, math.ceil(self._rates.get_window_stats(window, project).reset_time - time.time()))
                message, headers = f"Most requests a minute: {most}. Try again in {wait} s.", {"Retry-After": str(wait)}
                raise RequestError(message, status=429, code="rate_limit_exceeded", headers=headers)
        return project


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
