"""Libraries of the pages are byte for byte what their archives hold, and pages stay small."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tunesmith.pages import markup

STATIC = markup.HERE / "static"
VENDOR = STATIC / "vendor"
MOST_SCRIPT, MOST_TEMPLATE, MOST_STYLE = 1_400, 1_000, 450
"""Lines of our own scripts, templates and styles: see docs/inside/decisions/004-size-of-the-package.md."""


def lines(paths: list[Path]) -> int:
    return sum(path.read_text("utf-8").count("\n") for path in paths)


def test_vendored_files_are_those_of_their_archives() -> None:
    entries = json.loads((VENDOR / "vendor.json").read_text())
    files = {path.relative_to(VENDOR).as_posix() for path in VENDOR.rglob("*") if path.is_file()} - {"vendor.json"}
    named = {
        f"{entry['name']}-{entry['version']}/{file}": sha for entry in entries for file, sha in entry["sha256"].items()
    }
    assert files == set(named)
    for name, sha in named.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == sha, name
    for entry in entries:
        assert "LICENSE" in entry["sha256"]
        assert entry["licence"] in ("MIT", "0BSD")


def test_scripts_templates_and_styles_keep_to_their_lines() -> None:
    assert lines(sorted(STATIC.glob("*.js"))) <= MOST_SCRIPT
    assert lines(sorted((markup.HERE / "templates").glob("*"))) <= MOST_TEMPLATE
    assert lines(sorted(STATIC.glob("*.css"))) <= MOST_STYLE


def test_an_asset_is_kept_by_browsers_under_the_digest_of_all() -> None:
    address = markup.asset("pages.css")
    _, _, _, digest, name = address.split("/")
    answer = markup.asset_response(digest, name)
    assert "immutable" in answer.headers["Cache-Control"]
    assert answer.media_type == "text/css"
