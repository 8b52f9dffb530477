"""A stand-in of the hub: the endpoints that huggingface_hub calls, over repositories in memory; links may fail."""

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

LFS_BYTES = 1000
"""Larger files are kept in LFS, as on the hub; smaller ones are git blobs."""
PAGE = 3
"""Entries of a page of a listing."""


@dataclass
class Repo:
    """A repository: branches, and commits with their files."""

    card: dict[str, Any] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    readers: tuple[str, ...] = ()
    """Tokens that may read it where it is gated or private."""
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def push(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """A new commit on a branch, with these files and no others."""
        text = "".join(f"{name} {hashlib.sha1(content).hexdigest()}" for name, content in sorted(files.items()))
        commit = hashlib.sha1(f"{branch} {len(self.commits)} {text}".encode()).hexdigest()
        self.branches[branch] = commit
        self.commits[commit] = dict(files)
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]

    def commit(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The server: its repositories by kind and id, every request, and what goes wrong."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        """Tokens that the hub knows."""
        self.powerless: set[str] = set()
        """Tokens that it knows, and that may read nothing."""
        self.cut_after: list[int] = []
        """Bytes after which the connection of each of the next downloads is cut."""
        self.down = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer's body waits 40 ms for a word about its headers

            def log_message(self, *args: object) -> None:
                return None

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def dataset(self, name: str, files: Mapping[str, bytes], **facts: Any) -> Repo:
        repo = self.repos[f"datasets/{name}"] = Repo(**facts)
        repo.push(files)
        return repo

    def model(self, name: str, files: Mapping[str, bytes], **facts: Any) -> Repo:
        repo = self.repos[f"models/{name}"] = Repo(**facts)
        repo.push(files)
        return repo

    def downloads(self) -> list[str]:
        """The files whose content was asked for, with the range if there was one."""
        return [one.partition(" ")[2] for one in self.requests if one.startswith("GET ") and "/resolve/" in one]

    def answer(self, call: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(call.path).path).strip("/")
        span = call.headers.get("Range", "")
        self.requests.append(f"{call.command} {path}{' ' + span if span else ''}")
        body = call.rfile.read(int(call.headers.get("Content-Length") or 0))
        if self.down:
            call.close_connection = True
            return
        token = (call.headers.get("Authorization") or "").removeprefix("Bearer ")
        if match := re.fullmatch(r"api/(datasets|models)/([^/]+/[^/]+)(?:/(.*))?", path):
            self._api(call, f"{match[1]}/{match[2]}", match[3] or "", token, body)
        elif match := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/(refs/\w+/\w+|[^/]+)/(.*)", path):
            kind = "datasets" if match[1] else "models"
            self._file(call, f"{kind}/{match[2]}", match[3], match[4], token)
        else:
            _send(call, 404, b"{}")

    def _repo(self, call: BaseHTTPRequestHandler, name: str, token: str, *, content: bool) -> Repo | None:
        """The repository if this token may read it; else the answer is sent."""
        repo = self.repos.get(name)
        if token in self.powerless:
            _send(call, 403, b"{}", {"X-Error-Message": "This token has no permission to read repositories"})
            return None
        if token and token not in self.tokens:
            _send(call, 401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return None
        if repo is None or (repo.private and token not in repo.readers):
            _send(call, 404 if token else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        if content and repo.gated and token not in repo.readers:
            _send(call, 403 if token else 401, b"{}", {"X-Error-Code": "GatedRepo"})
            return None
        return repo

    def _api(self, call: BaseHTTPRequestHandler, name: str, rest: str, token: str, body: bytes) -> None:
        verb, _, rest = rest.partition("/")
        repo = self._repo(call, name, token, content=verb == "auth-check")
        if repo is None:
            return
        revision, rest = _revision(rest) if rest else ("main", "")
        commit = repo.commit(revision)
        if commit is None:
            _send(call, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif verb == "tree":
            self._tree(call, repo.commits[commit], rest)
        else:
            _send(call, 200, json.dumps(_facts(repo, name, verb, commit, body)).encode())

    def _tree(self, call: BaseHTTPRequestHandler, files: Mapping[str, bytes], folder: str) -> None:
        query = parse_qs(urlsplit(call.path).query)
        entries = _entries(files, folder, recursive=query.get("recursive", ["False"])[0].lower() == "true")
        at = int(query.get("cursor", ["0"])[0])
        more = {}
        if at + PAGE < len(entries):
            base = call.path.partition("?")[0]
            more = {"Link": f'<{self.url}{base}?recursive=true&expand=false&cursor={at + PAGE}>; rel="next"'}
        if entries:
            _send(call, 200, json.dumps(entries[at : at + PAGE]).encode(), more)
        else:
            _send(call, 404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _file(self, call: BaseHTTPRequestHandler, name: str, revision: str, path: str, token: str) -> None:
        repo = self._repo(call, name, token, content=True)
        if repo is None:
            return
        commit = repo.commit(revision)
        if commit is None:
            return _send(call, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path not in repo.commits[commit]:
            return _send(call, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = repo.commits[commit][path]
        entry = next(entry for entry in _entries({path: content}, "", recursive=True) if entry["type"] == "file")
        digest = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        if call.command == "GET" and self.cut_after:
            cut = self.cut_after.pop(0)
            call.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                call.send_header(key, value)
            call.end_headers()
            call.wfile.write(content[:cut])
            call.wfile.flush()
            call.close_connection = True
            return
        _send(call, status, content, headers)


def _facts(repo: Repo, name: str, verb: str, commit: str, body: bytes) -> Any:
    """The answer of an endpoint about a repository at a commit."""
    files = repo.commits[commit]
    if verb == "auth-check":
        return {}
    if verb == "refs":
        branches = [{"name": one, "ref": f"refs/heads/{one}", "targetCommit": at} for one, at in repo.branches.items()]
        return {"branches": branches, "tags": [], "converts": []}
    if verb == "paths-info":
        wanted = parse_qs(body.decode()).get("paths", [])
        return [entry for entry in _entries(files, "", recursive=True) if entry["path"] in wanted]
    assert verb in ("", "revision"), verb
    facts = {"id": name.partition("/")[2], "sha": commit, "private": repo.private}
    facts["gated"] = "manual" if repo.gated else False
    return {**facts, "cardData": repo.card or None, "siblings": [{"rfilename": one} for one in sorted(files)]}


def _revision(rest: str) -> tuple[str, str]:
    parts = rest.split("/")
    num = 3 if parts[0] == "refs" else 1
    return "/".join(parts[:num]), "/".join(parts[num:])


def _entries(files: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below a folder as the hub lists them."""
    found: dict[str, dict[str, Any]] = {}
    prefix = f"{folder}/" if folder else ""
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            name = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(name.encode()).hexdigest()
            found.setdefault(name, {"type": "directory", "path": name, "oid": oid, "size": 0})
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": oid, "size": len(content)}
        if len(content) > LFS_BYTES:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        found[path] = entry
    shown = (entry for name, entry in found.items() if recursive or "/" not in name.removeprefix(prefix))
    return list(shown)


def _send(call: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    call.send_response(status)
    for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
        call.send_header(key, value)
    call.end_headers()
    if call.command != "HEAD":
        call.wfile.write(body)


@contextmanager
def hub_at(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for the real one, with empty caches below `tmp_path`."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "cache" / "assets"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


def parquet(rows: list[dict[str, Any]], **how: Any) -> bytes:
    """Rows as a Parquet file."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, **how)
    return file.getvalue()


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
