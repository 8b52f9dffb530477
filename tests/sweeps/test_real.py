"""Sweeps of real tiny runs, by the command line: one after the other, and on a local Ray."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

import fresh
from tiny_run import chats, model_folder
from tunesmith.cli.app import app
from tunesmith.environment.children import for_child
from tunesmith.runs.folder import Run, runs

FILE = """
base:
  model: model
  method: {{name: lora, rank: 4}}
  data: {{train: [chats.jsonl], held_out: 0.2}}
  train: {{epochs: 2, rows_per_step: 6}}
  evaluation: {{every: 2, samples: 0, general: false, surprising: 0}}
  precision: float32
  device: cpu
  threads: 1
grid:
  optim.lr: {rates}
"""


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tunesmith", "sweep", "lr.yaml", "--offline", *words]
    return subprocess.run(command, cwd=folder, env=for_child(), capture_output=True, check=False)


def made(folder: Path, rates: str) -> None:
    model_folder(folder / "model")
    chats(folder / "chats.jsonl", 24)
    (folder / "lr.yaml").write_text(FILE.format(rates=rates), "utf-8")


@pytest.mark.parametrize("rates", [["1e-2"], pytest.param(["1e-2", "1e-4"], marks=pytest.mark.slow)])
def test_runs_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: list[str]) -> None:
    def swept(*words: str, code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["sweep", "lr.yaml", "--offline", *words])
        assert result.exit_code == code, result.output
        return result

    made(tmp_path, f"[{', '.join(rates)}]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(fresh.python()))
    done = swept("--json")
    found = orjson.loads(done.stdout)
    names = ["lr-01", "lr-02"][: len(rates)]
    assert found["best"] == "lr-01"
    assert [trial["state"] for trial in found["trials"]] == ["done"] * len(rates)
    rows = [Run(tmp_path / "runs" / name).metrics["loss"] for name in names]
    assert [trial["measure"] for trial in found["trials"]] == rows
    assert [run.path.name for run in runs(tmp_path / "runs")] == names
    assert "of optim.lr" in done.stderr
    before = (tmp_path / "runs" / "lr-01" / "events.jsonl").read_bytes()
    assert ("compare runs/lr-02 runs/lr-01" in swept().stdout) == (len(rates) > 1)
    assert (tmp_path / "runs" / "lr-01" / "events.jsonl").read_bytes() == before

    (tmp_path / "lr.yaml").write_text(FILE.format(rates="[1e-2, -1]"), "utf-8")
    assert "lr.yaml:12: grid: optim.lr: -1 is not a number above 0" in swept("--name", "b", code=2).output
    assert not (tmp_path / "runs" / "b").exists()


def test_rows_that_no_trial_can_use_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "[1e-2]")
    (tmp_path / "chats.jsonl").write_text('{"messages": 3}\n' * 30)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(fresh.python()))
    result = CliRunner().invoke(app, ["sweep", "lr.yaml", "--offline"])
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "trial lr-01 (optim.lr=0.01) cannot be run: data.train: no row can be read chats.jsonl:1: " in said
    assert "chats.jsonl:5: " in said
    assert "chats.jsonl:6: " not in said
    assert not (tmp_path / "runs" / "lr-01").exists()


@pytest.mark.slow
def test_four_runs_on_a_local_ray_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    made(tmp_path, "[1e-2, 3e-3, 1e-3, 1e-4]")
    done = sweep(tmp_path, "--ray", "local", "--json", "--name", "ray")
    assert done.returncode == 0, done.stderr.decode()
    assert sweep(tmp_path, "--json").returncode == 0
    assert len(os.listdir(tmp_path / "runs" / "ray" / "recipes")) == 4
    for i in range(1, 5):
        one, other = (Run(tmp_path / "runs" / f"{name}-0{i}").metrics["loss"] for name in ("ray", "lr"))
        assert one == other


@pytest.mark.slow
def test_two_workers_of_ray_train_as_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    made(tmp_path, "[1e-2]")
    base = (tmp_path / "lr.yaml").read_text("utf-8").partition("grid:")[0].partition("base:\n")[2]
    (tmp_path / "recipe.yaml").write_text(textwrap.dedent(base), "utf-8")
    command = [sys.executable, "-m", "tunesmith", "train", "--recipe", "recipe.yaml", "--offline", "--json"]
    losses = []
    for words, more in ((["--out", "runs/ray", "--ray", "2"], {"RAY_ADDRESS": "local"}), (["--out", "runs/alone"], {})):
        done = subprocess.run([*command, *words], cwd=tmp_path, env=for_child(**more), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert orjson.loads(done.stdout.splitlines()[-1])["kind"] == "result"
        events = Run(tmp_path / words[1]).events()
        losses.append([event.values["loss"] for event in events if event.kind == "step"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
