"""The command that makes the tables of docs/export.md: a number for each export, or a word where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import exports
from export.exports import of_architecture
from tunesmith.export import export_run, llama_cpp, verify
from tunesmith.export.target import EXACT


@pytest.fixture(autouse=True)
def _few_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {name: exports.COLUMNS[name] for name in ("merged float32", "gguf f16", "gguf-adapter f16")}
    monkeypatch.setattr(exports, "COLUMNS", columns)
    monkeypatch.setattr(exports, "WIDTH", 64)
    monkeypatch.setattr(verify, "launch", verify.launch)  # which the command sets, and a test puts back


def test_a_row_for_each_architecture_and_another_in_llama_cpp() -> None:
    lines = list(exports.tiny_tables(["llama", "bert"]))
    assert lines[0] == "|  | merged float32 | gguf f16 | gguf-adapter f16 |"
    name, merged, gguf, adapter = cells(lines[2])
    assert (name, merged[-4:], gguf[-4:], adapter[-4:]) == ("llama", "100%", "100%", "100%")
    assert cells(lines[3])[2:] == ["–", "–"]  # llama.cpp is for models that write
    theirs = lines[lines.index("") + 1 :]
    assert theirs[0] == "| in llama.cpp | gguf f16 | gguf-adapter f16 |"
    assert [cells(line)[0] for line in theirs[2:]] == (["llama"] if llama_cpp.is_installed() else [])


def test_what_fails_stands_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    run = of_architecture("llama")
    monkeypatch.setattr(export_run, "_tolerances", lambda target, *given: export_run.replace(EXACT, kl=-1.0))
    lines = list(exports.real_table(Path(run.path)))
    assert cells(lines[2])[:2] == ["merged float32", "fails"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]
