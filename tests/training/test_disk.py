"""A run that its disk has no room for is refused before its first step."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from tiny_run import chats, model_folder, tiny_recipe
from tunesmith.cli.app import app
from tunesmith.errors import DoesNotFitError, Stopped
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import Listener, resume, train


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def leave(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - num_bytes, num_bytes))


def test_train_refuses_and_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, 1000)
    with pytest.raises(DoesNotFitError) as refused:
        train(tiny_recipe(tmp_path), root=tmp_path / "runs")
    text = str(refused.value)
    assert f"{tmp_path / 'runs'}: the disk has 1000 B free, but this run needs " in text
    assert "for checkpoints and" in text
    assert "choose a folder on a larger disk with --runs, or keep fewer checkpoints" in text
    assert refused.value.needed > refused.value.room == 1000
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".rows"]


def test_a_disk_that_does_not_say_its_free_space_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Any) -> Any:
        raise OSError("not here")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    run = train(tiny_recipe(tmp_path), root=tmp_path / "runs")
    plan = next(event for event in run.events() if event.kind == "plan")
    assert f"{tmp_path / 'runs'}: free space unknown" in plan.values["warnings"]


def test_what_is_needed_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that a refusal names is what checkpoints and result really take, and little more."""
    recipe = tiny_recipe(tmp_path)
    leave(monkeypatch, 1000)
    with pytest.raises(DoesNotFitError) as refused:
        train(recipe, root=tmp_path / "runs")
    leave(monkeypatch, refused.value.needed)
    run = train(recipe, root=tmp_path / "runs")
    tensors = [*run.path.glob("checkpoints/*/*.safetensors"), *run.path.glob("adapter/*.safetensors")]
    written = sum(path.stat().st_size for path in tensors)
    # Three checkpoints are counted, of which one is written while two are kept; names and headers are not.
    assert 0.6 * refused.value.needed < written < 1.1 * refused.value.needed


def test_resume_counts_what_the_run_has_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    listener = Listener(on_event=lambda event: steps.append(event.step), should_stop=lambda: max(steps) >= 6)
    with pytest.raises(Stopped):
        train(tiny_recipe(tmp_path), root=tmp_path, out=tmp_path / "half", listener=listener)
    run = Run.open("half", tmp_path)
    leave(monkeypatch, 1000)
    with pytest.raises(DoesNotFitError, match="of which it has") as refused:
        resume(run)
    leave(monkeypatch, refused.value.needed)
    assert resume(run).state() == "done"


def test_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = model_folder(tmp_path / "model"), chats(tmp_path / "rows.jsonl", 20)
    leave(monkeypatch, 1000)
    words = ["plan", str(model), str(data), "--runs", str(tmp_path / "runs"), "--offline", "--no-probe"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "the disk has 1000 B free, but this run needs" in " ".join(done.output.split())
