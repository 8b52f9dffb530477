"""The verb: every target is documented and in its help; what it prints, for people and for machines."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from export.exports import finished, quick
from tunesmith.cli.app import app
from tunesmith.cli.eval import export_note
from tunesmith.export import verify
from tunesmith.export.export_run import TARGETS
from tunesmith.export.gguf_models import ARCHITECTURES
from tunesmith.export.onnx import KNOWN
from tunesmith.export.run_result import open_result

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "export.md").read_text("utf-8")


def test_every_target_has_a_section() -> None:
    assert [name for name in TARGETS if f"### {name}\n" not in PAGE] == []


def test_every_architecture_stands_in_the_table() -> None:
    assert [name for name in ARCHITECTURES if f"`{name}`" not in PAGE.partition("### gguf")[2]] == []


def test_every_model_type_of_onnx_is_named() -> None:
    assert [name for name in KNOWN if f"`{name}`" not in PAGE.partition("### onnx")[2]] == []


def test_the_verb_prints_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    words = ["export", str(finished("chat").path), "--to", "merged", "--out", str(tmp_path / "out"), "--offline"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert (
        "agrees with the tuned model within limits: 2 of 2 held-out rows, each alone, by transformers" in result.stdout
    )
    assert "  tokens of rows and prompts: identical (must be identical)" in result.stdout
    assert "loss on these rows, tuned and exported" in result.stdout
    note = export_note(tmp_path / "out")
    assert note.startswith(
        "an export (merged): `tunesmith show` has the loss of its run on rows held out there; on the 2 "
    )
    was, now = note.rpartition("the loss of the run was ")[2].split(", of this ")
    assert f"tuned and exported: {was}, {now} (" in result.stdout
    told = json.loads(CliRunner().invoke(app, [*words, "--json", "--no-verify"]).stdout)
    assert (told["target"], told["verified"], told["proof"]) == ("merged", False, None)
    assert export_note(tmp_path / "out").endswith("on rows held out there")
    for text in ('{"ok": true}', "[]", "{", '{"target": "x", "loss_tuned": "?", "loss_exported": 1, "rows": 1}'):
        (tmp_path / "out" / "verify.json").write_text(text)  # of another tool
        assert export_note(tmp_path / "out") == "", text
    wrong = CliRunner().invoke(app, [*words[:3], "coreml"])
    assert wrong.exit_code == 2
    assert "--to: coreml: there is no such target. One of merged, adapter, gguf, ollama, onnx." in wrong.output


def test_rows_that_were_compared_are_counted_of_all_that_were_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MAX_ROWS", 1)
    rows = verify.find_rows(open_result(finished("chat"), offline=True))
    assert (len(rows.examples), rows.described) == (1, "of 2 held-out rows")
