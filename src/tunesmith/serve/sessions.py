"""Who may open pages: by a link that works once, a session, or a key; and whose page may act.

A loopback address is open to every user and every page of a machine, so there is no
way in without one of the three.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import cookie_parser

from tunesmith.errors import StorageError
from tunesmith.runs.atomic import from_json, to_json, write_atomic
from tunesmith.serve.commands import look
from tunesmith.serve.middleware import ApiKeys, wrong_key
from tunesmith.serve.protocol import RequestError
from tunesmith.types import JsonObject

SESSION_S = 30 * 86_400
MOST_SESSIONS = 100
MOST_WRONG, WRONG_S = 5, 60.0
"""Wrong keys that are looked at, and in how many seconds."""
OPEN_PATHS = ("/ui/open", "/ui/login")
"""Paths that need no session: they lead to one."""
ASSETS = "/ui/static/"
READING = ("GET", "HEAD")
WORKING = ("/v1/", "/ui/new", "/ui/data", "/ui/compare")
"""Paths that start processes though they are read: a page of another port leads to none."""
ASKING = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/classify", "/v1/models")
"""Paths that a key for a program opens: it asks the loaded model, and does nothing else."""
KEY = "key {} "
"""Stands in front of the digest of such a key, with its name."""
OF_KEY = "by {} "
"""Stands in front of the digest of a session that a key of the server opened, with that key's digest."""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Access:
    """The sessions of one server, by digests in `file`, which outlive it."""

    file: Path
    port: int
    keys: ApiKeys | None = None
    _links: set[str] = field(default_factory=set)
    """Digests of the links that were not opened yet."""
    _sessions: dict[str, float] = field(default_factory=dict)
    """When each session began, by its digest."""
    _wrong: deque[float] = field(default_factory=deque)
    _seen: object = None  # what the file was like when it was read or written

    def _read(self) -> None:
        """Read the sessions again if the file was replaced. If it was removed, all sessions have ended."""
        if (now := look(self.file)) == self._seen:
            return
        self._seen, self._sessions = now, {}
        with suppress(OSError, ValueError, TypeError, AttributeError):
            known = from_json(self.file.read_bytes())
            self._sessions = {str(name): float(since) for name, since in known.items()}

    @property
    def cookie(self) -> str:
        """The name of the cookie, with the port: cookies themselves do not distinguish ports."""
        return f"tunesmith-{self.port}"

    def new_link(self) -> str:
        """The path of a link that opens a session, and works once."""
        code = secrets.token_urlsafe(32)
        self._links.add(_digest(code))
        return f"/ui/open?code={code}"

    def open_link(self, code: str) -> str | None:
        """The token of a new session for the code of a link; None: the link was
        opened before, or never made."""
        digest = _digest(code)
        if digest not in self._links:
            return None
        self._links.discard(digest)
        return self._new_session()

    def open_by_key(self, key: str) -> str | None:
        """The token of a new session for a key; None: the key is not accepted. Raises RequestError 429 after
        too many wrong keys."""
        now = time.monotonic()
        while self._wrong and now - self._wrong[0] > WRONG_S:
            self._wrong.popleft()
        if len(self._wrong) >= MOST_WRONG:
            message = f"{MOST_WRONG} wrong keys within a minute. Try again in a minute."
            raise RequestError(message, status=429, code="too_many_keys", headers={"Retry-After": f"{WRONG_S:.0f}"})
        if self.keys is None or not self.keys.accepts(b"Bearer " + key.encode()):
            self._wrong.append(now)
            return None
        return self._new_session(OF_KEY.format(_digest(key)))

    def new_key(self) -> str:
        """A key for a program that asks the loaded model, good as long as a session: it is sent as
        `Authorization: Bearer KEY`, and begins with its name."""
        name = secrets.token_hex(4)
        return self._new_session(KEY.format(name), f"{name}-")

    def keys_of_programs(self) -> list[JsonObject]:
        """{name, made} of each key for a program, newest first."""
        self._read()
        words = [(since, name.split()) for name, since in self._sessions.items() if _is_alive(since)]
        of_programs = [(since, parts) for since, parts in words if len(parts) == 3 and parts[0] == "key"]
        keys = [{"name": parts[1], "made": since} for since, parts in of_programs]
        return sorted(keys, key=lambda key: -key["made"])

    def end_key(self, name: str) -> bool:
        """End the key of that name for a program. Returns whether there was one. Raises RequestError 507
        where the file cannot be written: the next server would take the key."""
        self._read()
        start = KEY.format(name)
        others = {known: since for known, since in self._sessions.items() if not known.startswith(start)}
        had_one = len(others) < len(self._sessions)
        try:
            self._write(others)
        except (StorageError, OSError) as error:
            raise RequestError(f"{self.file}: cannot be written: {error}.", status=507, code="storage") from error
        return had_one

    def _new_session(self, kind: str = "", head: str = "") -> str:
        self._read()  # another server may have added some
        token = head + secrets.token_urlsafe(32)
        alive = sorted(self._sessions.items(), key=lambda item: -item[1])[: MOST_SESSIONS - 1]
        sessions = {name: since for name, since in alive if _is_alive(since)}
        with suppress(StorageError, OSError):  # it lives as long as this server then
            self._write({**sessions, kind + _digest(token): time.time()})
        return token

    def _write(self, sessions: dict[str, float]) -> None:
        self._sessions = sessions
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.file, to_json(sessions))
        self.file.chmod(0o600)
        self._seen = look(self.file)

    async def admit(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> str:
        """See middleware.Admission."""
        if path in OPEN_PATHS or (path.startswith(ASSETS) and method in READING):
            return ""
        if self.keys is not None and self.keys.accepts(headers.get(b"authorization")):
            return ""
        scheme, _, bearer = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() == "bearer" and self._is_key(bearer.strip()):
            if path in ASKING or path.startswith("/v1/models/"):
                return ""  # no browser sends it by itself
            message = "This key asks the loaded model and does nothing else. Other routes take a key of --key-file."
            raise RequestError(message, status=403, code="key_not_allowed")
        cookies = cookie_parser(headers.get(b"cookie", b"").decode("latin-1"))
        if not self._is_session(cookies.get(self.cookie, "")):
            raise wrong_key("This server needs a session: open the link that `tunesmith ui` printed, or give a key.")
        site, mode = headers.get(b"sec-fetch-site", b""), headers.get(b"sec-fetch-mode", b"")
        is_led = site in (b"same-site", b"cross-site") and (mode != b"navigate" or path.startswith(WORKING))
        if method not in READING or is_led:
            _refuse_foreign(headers)
        return ""

    def _is_key(self, bearer: str) -> bool:
        name = bearer.partition("-")[0]
        return name.isascii() and self._is_session(bearer, KEY.format(name))

    def _is_session(self, token: str, kind: str = "") -> bool:
        """Whether a session goes on; one that a key opened ends with its key."""
        self._read()
        opened_by = [] if kind or self.keys is None else [OF_KEY.format(digest.hex()) for digest in self.keys.digests]
        names = [before + _digest(token) for before in (kind, *opened_by)]
        known = [name for name, since in self._sessions.items() if _is_alive(since)]
        return any(hmac.compare_digest(name, other) for name in names for other in known)


def _is_alive(since: float) -> bool:
    return time.time() - since < SESSION_S


def _refuse_foreign(headers: Mapping[bytes, bytes]) -> None:
    """Raise RequestError unless the request comes from a page of this server. Browsers count other ports as the
    same site, so `Origin` decides."""
    host = headers.get(b"host", b"").lower()
    is_own = headers.get(b"origin", b"").lower() in (b"http://" + host, b"https://" + host)
    is_same = headers.get(b"sec-fetch-site", b"same-origin") == b"same-origin"
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if not (is_own and is_same and (kind == b"application/json" or headers.get(b"x-tunesmith") == b"1")):
        message = "A session acts from a page of this server alone. A program sends a key: Authorization: Bearer KEY."
        raise RequestError(message, status=403, code="foreign_origin")
