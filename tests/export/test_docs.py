"""Every target is documented, and the verb's help names them all."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from tunesmith.cli.app import app
from tunesmith.export.exporting import EXPORTS
from tunesmith.export.gguf_models import ARCHITECTURES

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")


def test_every_target_has_a_section() -> None:
    assert [name for name in EXPORTS if f"### {name}\n" not in PAGE] == []


def test_every_architecture_stands_in_the_table() -> None:
    assert [name for name in ARCHITECTURES if f"| {name} |" not in PAGE] == []


def test_help_names_every_target() -> None:
    text = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).stdout
    assert [name for name in EXPORTS if name not in text] == []
