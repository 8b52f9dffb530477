"""Every malformed file ends in a named error with its line and exit code 2; no traceback, and nothing is written."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data.malformed_corpus import CASES, Case
from tiny_run import model_folder
from tunesmith.cli.app import app

IDS = [case.name for case in CASES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own to stand in: whatever a verb would write, it would write here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(place: Path, case: Case) -> list[str]:
    """Files that were not there before. The list of problems may be; half-written ones may not."""
    everything = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
    return [name for name in everything if name != case.filename and Path(name).name != "problems.jsonl"]


@pytest.mark.parametrize("case", CASES[::8], ids=IDS[::8])  # tests/data/test_malformed.py reads all of them
def test_check_names_the_line(case: Case, place: Path) -> None:
    (place / case.filename).write_bytes(case.payload)
    result = CliRunner().invoke(app, ["check", case.filename])
    assert result.exit_code == 2
    assert f"{case.place}: {case.code}: " in result.stdout
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    assert written(place, case) == []


@pytest.mark.parametrize("case", CASES[::24], ids=IDS[::24])  # each costs a tokenizer
def test_train_refuses_before_anything_is_written(case: Case, place: Path, model: Path) -> None:
    (place / case.filename).write_bytes(case.payload)
    result = CliRunner().invoke(app, ["train", str(model), case.filename, "--offline"])
    assert result.exit_code == 2, result.output
    assert f"{case.place}: {case.code}: " in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout.replace("encoding rows\n", "") == ""
    assert written(place, case) == []


@pytest.mark.parametrize("case", CASES[:: len(CASES) // 8], ids=IDS[:: len(CASES) // 8])
def test_machines_are_told_the_same(case: Case, place: Path) -> None:
    (place / case.filename).write_bytes(case.payload)
    told = json.loads(CliRunner().invoke(app, ["check", case.filename, "--json"]).stdout)
    assert told["ok"] is False
    findings = [(problem["code"], problem["source"]["line"]) for problem in told["problems"]]
    assert (case.code, case.line) in findings


def test_an_empty_file_and_a_missing_one_are_named(place: Path, model: Path) -> None:
    (place / "empty.jsonl").write_bytes(b"")
    for name in ("empty.jsonl", "missing.jsonl"):
        for words in (["check", name], ["train", str(model), name, "--offline"]):
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 2
            assert name in result.output
            assert "Traceback" not in result.output


def test_a_missing_file_is_said_once_and_a_model_folder_is_named(place: Path, model: Path) -> None:
    (place / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    alone = CliRunner().invoke(app, ["check", "nofile.jsonl"])
    assert alone.stdout.count("nofile.jsonl") == 1
    assert alone.stdout.endswith("refused: data.train: no row can be used\n")
    together = CliRunner().invoke(app, ["check", "rows.jsonl", "nofile.jsonl"])
    assert together.stdout.endswith("refused: nofile.jsonl cannot be used as it is\n")
    swapped = CliRunner().invoke(app, ["check", str(model), "rows.jsonl"])
    assert alone.exit_code == together.exit_code == swapped.exit_code == 2
    assert f"a model folder, not data. Write: tunesmith check DATA --model {model}" in " ".join(swapped.stderr.split())
