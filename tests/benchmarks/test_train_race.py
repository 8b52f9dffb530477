"""`python -m benchmarks train`: the same tokens for all, results that outlive an interruption, one judge."""

import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.__main__ import main
from benchmarks.classify import UnusableError
from benchmarks.measured import Child
from benchmarks.peers import given_rows, held_out
from benchmarks.peers.render_rows import render
from benchmarks.train import OURS, Log, Peer, Race, Settings, Turn, told, write
from benchmarks.train_page import page
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from benchmarks import train, train_page
from tiny_run import chats, model_folder
from tunesmith.cli.app import app

PEER = """
import json, sys, time, shutil
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
rows = json.loads(Path(job["rows"]).read_text())["train"]
print("seen", len(rows), job["method"], job["rank"], job["arguments"])
result = Path(job["folder"], "result")
shutil.copytree(job["model"], result, dirs_exist_ok=True)
told = {"step_ends": [time.time() + i for i in range(4)], "tokens": [9] * 4, "targets": [3] * 4, "losses": [1.0] * 4}
Path(sys.argv[2]).write_text(json.dumps({**told, "result": str(result), "versions": {"peer": "1.0"}}))
"""
SETTINGS = Settings("m", "chat", "lora", rank=4, alpha=8, lr=1e-3, rows_per_step=2, steps=4, threads=1)
CHILD = Child(code=0, wall_seconds=2.0, peak_bytes=2**30, load_before=0.5, tail="")


def turn(name: str, round_: int, rate: float, **fields: Any) -> Turn:
    whole: Mapping[str, Any] = {"tokens_per_second": rate, "first_step_seconds": 5.0, "held_out": 1.5, **fields}
    return Turn(name, round_, asdict(SETTINGS), {"torch": "2.13.0"}, {}, asdict(CHILD), **whole)


def in_this_process(words: Sequence[str], *, log: Path, settings: Mapping[str, str] | None = None) -> Child:
    """What `run_child` does, without the seconds that new processes need to import torch."""
    begun, said = time.time(), ""
    if words[1:3] == ["-m", "tunesmith"]:
        outcome = CliRunner().invoke(app, [*words[3:], "--set", "threads=1"])
        return Child(outcome.exit_code, time.time() - begun, 2**20, 0.0, outcome.output)
    match Path(words[1]).name:
        case "render_rows.py":
            folder = Path(words[3])
            (folder / "rows.json").write_text(json.dumps(render(words[2], folder)), "utf-8")
        case "held_out.py":
            said = str(held_out.loss(held_out.load(*words[2:4]), json.loads(Path(words[4]).read_text("utf-8"))["eval"]))
        case _:
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            said = done.stdout
    return Child(0, time.time() - begun, 2**20, 0.0, said)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with a peer that trains nothing, and says so."""
    bin_ = tmp_path / "environments" / "quick" / "bin"
    bin_.mkdir(parents=True)
    (bin_ / "python").symlink_to(sys.executable)
    script = tmp_path / "quick.py"
    script.write_text(PEER, "utf-8")
    monkeypatch.setitem(train.__dict__, "PEERS", {"Quick": Peer("quick", str(script), {"loud": True})})
    return tmp_path / "environments"


@pytest.mark.slow
def test_all_train_on_the_same_tokens_and_are_judged_alike(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.train_command.PEERS", train.PEERS)
    for module in ("train", "rows"):
        monkeypatch.setattr(f"benchmarks.{module}.run_child", in_this_process)
    model, out = model_folder(tmp_path / "model"), tmp_path / "table.md"
    train_rows, eval_rows = chats(tmp_path / "train.jsonl", 12), chats(tmp_path / "eval.jsonl", 6, seed=1)
    words = ["train", "--model", str(model), "--rows", "chat", str(train_rows), str(eval_rows)]
    words += ["--work", str(tmp_path / "work"), "--environments", str(environment), "--peers", "Quick"]
    words += ["--rounds", "1", "--steps", "4", "--rows-per-step", "2", "--held-out", "4", "--methods", "lora"]
    kept = tmp_path / "kept.md"
    kept.write_text(f"# Title\n{train_page.BEGIN}\nold\n{train_page.END}\nbehind\n", "utf-8")
    words += ["--threads", "1", "--rank", "4", "--out", str(out), "--page", str(kept)]
    assert main(words) == 0, capsys.readouterr().out
    text = out.read_text("utf-8")
    assert "8 rows of" in text
    whole = kept.read_text("utf-8")
    assert text in whole
    assert "old" not in whole.split("\n")
    assert whole.endswith(f"{train_page.END}\nbehind\n")
    assert "Tunesmith over Quick, round by round: tokens/s" in text
    assert "Quick: `loud=True`" in text
    assert str(tmp_path) not in text
    ours, quick = (json.loads(next((tmp_path / "work" / "turns").glob(f"*{name}-0.json")).read_text("utf-8"))
                   for name in ("tunesmith", "quick"))  # fmt: skip
    assert len(ours["losses"]) == 4
    # The peer saved the untouched model; a rate of 5e-4 on four steps of a random model changes little, but something.
    assert ours["held_out"] != quick["held_out"]
    assert math.isclose(ours["held_out"], quick["held_out"], rel_tol=0.2)

    files = sorted((tmp_path / "work" / "turns").glob("*.json"))
    before = [path.stat().st_mtime_ns for path in files]
    assert main(words) == 0  # nothing is run again: what is there is read
    assert [path.stat().st_mtime_ns for path in files] == before


@torch.no_grad()
def test_judge_is_the_loss_of_each_row_by_itself(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path / "m"), dtype=torch.float32).eval()
    rows = [{"ids": [5, 6, 7, 8], "trained": [1, 0, 1, 1]}, {"ids": [9, 3], "trained": [0, 1]}]
    nats = []
    for row, places in zip(
        rows, ((2, 3), (1,)), strict=True
    ):  # the first token is never a target: nothing is before it
        chances = model(input_ids=torch.tensor([row["ids"]])).logits[0].double().log_softmax(-1)
        nats += [-float(chances[place - 1, row["ids"][place]]) for place in places]
    assert held_out.loss(model, rows) == pytest.approx(sum(nats) / 3, rel=1e-12)


def test_rendered_rows_are_those_that_are_trained_on(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    for name, num in (("train", 5), ("eval", 3)):
        chats(tmp_path / f"{name}.jsonl", num, seed=num)
    rows = render(str(model), tmp_path)
    assert [len(rows[side]) for side in ("train", "eval")] == [5, 3]
    assert all(len(row["ids"]) == len(row["trained"]) and any(row["trained"]) for row in rows["train"])


def test_peers_get_the_same_tokens_and_targets(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": [{"ids": [5, 6, 7], "trained": [1, 0, 1]}], "eval": []}), "utf-8")
    assert given_rows.labelled(str(path), "train") == [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}]


def test_clock_of_a_trainer_counts_what_each_step_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(train.SCRIPTS)  # a peer's environment runs its script by its path
    clock = importlib.import_module("trainer_log").Clock()
    loader = SimpleNamespace(collate_fn=len)
    clock.on_train_begin(None, None, None, train_dataloader=SimpleNamespace(base_dataloader=loader))
    row = {"input_ids": [5, 6, 7], "labels": [5, -100, 7]}  # the first token is no target: nothing is before it
    assert [loader.collate_fn(batch) for batch in ([row, row], [row], [row], [row])] == [2, 1, 1, 1]
    for loss in (2.0, 1.5):
        clock.on_log(None, None, None, logs={"loss": loss})
        clock.on_step_end()
    clock.on_log(None, None, None, logs={"train_runtime": 3.0})
    log = Log(**clock.told(batches=2), result="", versions={})
    assert (log.tokens, log.targets, log.losses) == ([9, 6], [3, 2], [2.0, 1.5])
    assert len(log.step_ends) == 2


def test_rate_leaves_the_first_half_of_few_steps_out() -> None:
    log = Log([10.0, 11.0, 13.0, 15.0], [100, 100, 7, 9], [9, 9, 2, 2], [1.0] * 4, "", {})
    assert log.rates() == (16 / 4, 4 / 4)
    with pytest.raises(ValueError, match="1 steps ended, and 1 had tokens"):
        Log([10.0], [1], [1], [1.0], "", {}).rates()


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    race = Race(tmp_path, tmp_path, [], rounds=1)
    write(race.path(SETTINGS, OURS, 0), turn(OURS, 0, 10.0))
    assert [found.tokens_per_second for found in race.turns(SETTINGS)] == [10.0]
    with pytest.raises(UnusableError, match="a result with other settings"):
        list(race.turns(replace(SETTINGS, lr=1.0)))


def test_failure_stands_on_the_page(tmp_path: Path) -> None:
    child = replace(CHILD, code=1, tail="out of memory")
    failed = told(turn("TRL, tuned", 0, 0.0), child, tmp_path / "nothing", begun=0.0)
    assert failed.error == "exit code 1\nout of memory"
    empty = told(turn("TRL, tuned", 1, 0.0), CHILD, tmp_path / "nothing", begun=0.0)
    assert empty.error.startswith("what it left cannot be used: FileNotFoundError")
    text = page("command", [turn(OURS, 0, 10.0), failed], {"chat": {"rows": 8, "tokens": 50.0, "targets": 9.0}})
    assert "0 of 1: the others failed" in text
    assert "out of memory" in text
    assert "Tunesmith over TRL" not in text


def test_ratios_are_taken_within_a_round() -> None:
    turns = [turn(OURS, 0, 10.0), turn(OURS, 1, 40.0), turn("TRL", 0, 5.0), turn("TRL", 1, 10.0)]
    text = page("command", turns, {"chat": {"rows": 8, "tokens": 50.0, "targets": 9.0}})
    assert "tokens/s 3.00 (2.00 to 4.00) times" in text  # of the medians it would be 25 / 7.5
