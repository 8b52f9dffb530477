"""`python -m benchmarks.data`: every row is another, encoded once and then found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.data import encode, write_rows

from tiny_run import model_folder


def test_rows_are_encoded_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "rows.jsonl", 40)
    lines = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()
    assert len(set(lines)) == 40
    model = str(model_folder(tmp_path / "model"))
    for num_proc in ("2", "1"):
        encode(model, str(tmp_path / "rows.jsonl"), str(tmp_path / "encoded"), num_proc)
    first, again = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["rows"] == again["rows"] == 40
    assert first["tokens"] == again["tokens"]
    assert first["peak"] > 50 * 2**20  # more than an interpreter
    assert len(list((tmp_path / "encoded").glob("*.arrow"))) == 1
