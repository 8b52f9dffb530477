"""Runs work whatever the current folder, and say where their model and data were when these are gone."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tunesmith
from export.exports import quick
from tiny_run import chats, model_folder
from tunesmith.cli.app import app
from tunesmith.errors import ModelError, RunError
from tunesmith.runs.folder import Run

OPTIONS = {
    "method": {"name": "lora", "rank": 4},
    "optim": {"lr": 1e-2},
    "train": {"max_steps": 4, "rows_per_step": 3},
    "evaluation": {"samples": 2, "sample_tokens": 4, "general": False},
    "checkpoint": {"every": 1},
    "precision": "float32",
    "threads": 1,
}
HOME = "my wörk"
"""With a blank, and a letter that is not ASCII."""


def said(*words: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and a finished run, all typed as relative paths."""
    home = tmp_path_factory.mktemp("made") / HOME
    home.mkdir()
    model_folder(home / "base")
    chats(home / "chats.jsonl", 12)
    os.symlink("base", home / "link")
    (home / "deep").mkdir()
    before = Path.cwd()
    os.chdir(home / "deep")
    try:
        tunesmith.train("../link", "../chats.jsonl", root="../runs", out="../runs/done", offline=True, **OPTIONS)
    finally:
        os.chdir(before)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in a place of its own, whose run says that it was made there; the current folder is another one."""
    place = tmp_path / HOME
    shutil.copytree(made, place, symlinks=True)
    facts = place / "runs" / "done" / "run.json"
    facts.write_text(facts.read_text().replace(str(made), str(place)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return place


def test_every_verb_finds_model_and_data_from_another_folder(home: Path) -> None:
    run = home / "runs" / "done"
    assert said("chat", run, "--once", "hello", "--offline")
    assert said("predict", run, "--text", "hello", "--bare", "--offline")
    assert "12 rows" in said("eval", run, home / "chats.jsonl", "--samples", "0", "--offline")
    said("export", run, "--to", "adapter", "--no-verify", "--offline")
    assert (run / "exports" / "adapter").is_dir()
    model, _ = tunesmith.load(run, offline=True)
    assert model.num_parameters()


def test_an_export_is_proven_on_held_out_rows_from_another_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    assert "held-out rows" in said("export", home / "runs" / "done", "--to", "merged", "--offline")


def test_a_run_goes_on_from_another_folder_as_if_nothing_had_happened(home: Path) -> None:
    run = Run(home / "runs" / "done")
    whole = [event.values for event in run.events() if event.kind == "step"]
    killed(run, after=2)
    resumed = tunesmith.resume(run.path, offline=True)
    assert [event.values for event in resumed.events() if event.kind == "step"] == whole


def killed(run: Run, *, after: int) -> None:
    """Leave the run as a kill after that step does."""
    shutil.rmtree(run.adapter_path)
    lines = run.events_path.read_bytes().splitlines(keepends=True)
    steps = [i for i, line in enumerate(lines) if json.loads(line)["kind"] == "checkpoint"]
    run.events_path.write_bytes(b"".join(lines[: steps[after] + 1]))
    for folder in run.checkpoints_path.iterdir():
        if int(folder.name.rpartition("-")[2]) > after:
            shutil.rmtree(folder)


def test_a_folder_that_was_moved_as_a_whole_is_found(home: Path) -> None:
    moved = home.with_name("moved")
    home.rename(moved)
    assert said("predict", moved / "runs" / "done", "--text", "hello", "--bare", "--offline")


def test_a_base_that_was_moved_is_told_with_its_place_and_found_by_model(home: Path) -> None:
    run, away = home / "runs" / "done", home.with_name("away")
    (home / "base").rename(away)
    for words in (("chat", run, "--once", "hi"), ("predict", run, "--text", "hi"), ("export", run, "--to", "adapter")):
        told = said(*words, "--offline", code=2)
        assert f"this run was made in {home / 'deep'} from ../link; it is not there now" in told
        assert "pass --model PATH" in told
    assert said("chat", run, "--once", "hi", "--model", away, "--offline")
    assert said("predict", run, "--text", "hi", "--bare", "--model", away, "--offline")
    said("export", run, "--to", "adapter", "--no-verify", "--model", away, "--offline")
    data = home / "chats.jsonl"
    said("compare", run, away, "--data", data, "--model", away, "--offline")
    killed(Run(run), after=2)
    assert Run(tunesmith.resume(run, model=away, offline=True).path).state() == "done"


def test_another_model_is_refused_by_its_hash(home: Path) -> None:
    run = home / "runs" / "done"
    other = model_folder(home / "other", seed=1)
    told = said("chat", run, "--once", "hi", "--model", other, "--offline", code=2)
    assert "model.safetensors: not the file that" in told
    with pytest.raises(RunError, match="not the file"):
        tunesmith.load(run, model=other, offline=True)
    shutil.rmtree(home / "base")
    other.rename(home / "base")
    with pytest.raises(RunError, match="not the file"):
        tunesmith.predict(run, "hello", offline=True)


def test_data_that_was_moved_is_told_with_its_place(home: Path) -> None:
    killed(Run(home / "runs" / "done"), after=2)
    (home / "chats.jsonl").rename(home / "other.jsonl")
    told = said("resume", home / "runs" / "done", "--offline", code=2)
    assert f"this run was made with {home / 'deep' / '..' / 'chats.jsonl'}, and it is not there now" in told


def test_an_earlier_versions_run_works_in_its_folder_else_says_the_way_out(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = home / "runs" / "done" / "run.json"
    old = {key: value for key, value in json.loads(facts.read_text()).items() if key != "made"}
    facts.write_text(json.dumps(old))
    with pytest.raises(ModelError, match=r"pass --model PATH"):
        tunesmith.load(home / "runs" / "done", offline=True)
    monkeypatch.chdir(home / "deep")
    tunesmith.load("../runs/done", offline=True)


def test_a_model_needs_no_base(home: Path) -> None:
    told = said("chat", home / "base", "--once", "hi", "--model", home / "base", "--offline", code=2)
    assert "--model: says where the base of a run is" in told


@pytest.mark.parametrize("made", [None, [], {"places": []}, {"places": {"a": 1}}, {"in": 3, "places": {"a": "\0"}}])
def test_a_record_that_makes_no_sense_is_passed_over(tmp_path: Path, made: object) -> None:
    from tunesmith.recipe.origin import Origin

    assert Origin.of(tmp_path, {"made": made}, base=None).find("b") == "b"
