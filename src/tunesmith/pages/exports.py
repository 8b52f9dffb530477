"""Exports that pages start, by `tunesmith export` in a process of its own, and a run's exports with their
proof."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.jobs.launcher import ChildProcess
from tunesmith.pages.launches import ENDED_SILENTLY, OUTPUT, start_process
from tunesmith.runs.folder import Run
from tunesmith.serve.protocol import RequestError
from tunesmith.summaries.runs import UNREADABLE
from tunesmith.types import JsonObject, Record

EXPORT_WORD = re.compile(r"[a-z]+(:[a-z0-9_]+)?")
OFFERED = ("merged", "adapter", "gguf:f16", "gguf:q8_0", "gguf:q4_k_m", "ollama:q8_0", "onnx")
"""Words of `export.to` that pages name; programs may name others."""
CHECK_FILE = "verify.json"
"""See export.hub, which imports torch."""


def start(run: Run, word: str, *, offline: bool) -> JsonObject:
    """Begin an export by its word of `export.to`, TARGET or TARGET:VALUE. Raises RequestError."""
    if not EXPORT_WORD.fullmatch(word):
        raise RequestError(f"to: {word[:100]!r}: is no export. One of {', '.join(OFFERED)}.", param="to")
    try:
        run.result()
        run.refuse_links()
    except TunesmithError as error:
        raise RequestError(str(error), status=409, code="conflict") from error
    target, _, value = word.partition(":")
    options = ["--dtype" if target == "merged" else "--quant", value] if value else []
    place = run.export_path(word)
    words = ["export", str(run.path), "--to", target, *options, *(["--offline"] if offline else []), "--json"]
    start_process(place, words, says=True)
    return {"name": place.name, "state": "making"}


def exports_of(run: Run) -> list[JsonObject]:
    """{name, path, state, progress, error, bytes, check} of each export, by name. `state`: making, done or
    failed; `check`: what was compared with the tuned model, with `lines` of (what, value, bound)."""
    folder = run.path / "exports"
    try:
        present = sorted(folder.iterdir())
    except OSError:
        return []
    names = {match["run"] for path in present if (match := OUTPUT.fullmatch(path.name))}
    names |= {path.name for path in present if path.name[0] != "." and (path / CHECK_FILE).is_file()}
    rows = (_export(run, folder / name) for name in sorted(names))
    return [row for row in rows if row["state"]]


def _proof(check: Record) -> JsonObject:
    """The part of a file of a check that a page shows; an earlier version wrote no `lines`."""
    lines = [line for line in check.get("lines", ()) if isinstance(line, list) and len(line) == 3]
    facts = {key: check.get(key, "") for key in ("verified", "rows", "rows_are", "loaded_by")}
    return {**facts, "lines": lines, "notes": list(check.get("notes", ()))}


def _export(run: Run, place: Path) -> JsonObject:
    child = ChildProcess(place)
    row: JsonObject = {"name": place.name, "path": str(place), "progress": child.says(), "check": None, "bytes": 0}
    printed = child.printed() or {}
    error = {"message": "", **printed, "problems": []} if printed.get("kind") == "error" else None
    with suppress(*UNREADABLE):
        row["check"] = _proof(run.read_json(f"exports/{place.name}/{CHECK_FILE}"))
        row["bytes"] = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    if child.is_alive():
        return row | {"state": "making", "error": None}
    if row["check"] is None and error is None and printed.get("kind") != "export":
        error = {"message": ENDED_SILENTLY}
    state = "done" if row["check"] is not None else "failed" if error else ""  # "": it was moved away since
    return row | {"state": state, "error": error}
